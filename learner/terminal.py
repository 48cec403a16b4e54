"""What the command line shows: results as text, one line a message, and how far it is."""

from __future__ import annotations

import logging
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from ogpstream.learner.answer import Answer
    from ogpstream.learner.stream import StreamResult

WIDTH = 80
# seconds between lines of progress in a log, which is read later: one a minute is 1440 in a day
EVERY = 60.0


def tell(message: str, kind: str = "error") -> None:
    print(f"ogpstream: {kind}: {message}", file=sys.stderr, flush=True)


class _ToStderr(logging.Handler):
    """One line a record, above the progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        print(" ".join(record.getMessage().split()), file=sys.stderr, flush=True)


_HANDLER = _ToStderr()


def log_to_stderr(verbose: bool = False) -> None:
    """Show this package's warnings, and with `verbose` its information."""
    logger = logging.getLogger("ogpstream")
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    if _HANDLER not in logger.handlers:
        logger.addHandler(_HANDLER)


def busy(text: str) -> AbstractContextManager[Any]:
    """A spinner with a text while something takes long."""
    console = Console(stderr=True)
    return console.status(text) if console.is_terminal else nullcontext()


class LearnProgress:
    """A progress bar on stderr while a file is learned; where stderr is no terminal a line a minute."""

    def __init__(self, path: Path) -> None:
        console = Console(stderr=True)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                   TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        lines = _count_lines(path) if console.is_terminal else None
        self._task = self._bar.add_task("learning", total=lines)
        self._said = time.monotonic()

    def __enter__(self) -> LearnProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, result: StreamResult, line: int | None) -> None:
        if line is not None:
            doing = f"learned {result.learned}, rejected {result.rejected}"
        elif result.looked is None:
            doing = "rehearsing what was learned once"
        else:
            doing = f"rehearsing what was forgotten: {result.known} of the last {result.looked} looked at were known"
        if not self._bar.disable:
            self._bar.update(self._task, description=doing, completed=line)
        elif time.monotonic() - self._said >= EVERY:
            self._said = time.monotonic()
            tell(doing if line is None else f"line {line}: {doing}", "progress")


def learn_summary(result: StreamResult, state: Path) -> str:
    """What one run over a file did."""
    parts = [f"learned {result.learned} of {result.samples} samples now, {result.learned_in_all} in all"]
    counts = ((result.recovered, "left over from an earlier run"), (result.skipped, "skipped as known"),
              (result.rejected, "rejected"), (result.quarantined, "kept, not trained on"), (result.cut, "cut to fit"))
    parts += [f"{count} {name}" for count, name in counts if count]
    lines = ["; ".join(parts)]
    if result.update_ms_p50 is not None:
        lines.append(f"{result.update_ms_p50:.1f} ms a sample (median; 95 %: {result.update_ms_p95:.1f})")
    if result.choice is not None:
        told = result.choice
        lines.append(f"{told['limited']} updates were fitted to the time budget, the least with {told['tokens_min']} "
                     f"tokens and the top {told['layers_min']} of {told['depth']} layers")
    # of few samples both are means of the same ones
    if result.loss_first != result.loss_last:
        lines.append(f"loss before the update {result.loss_first:.3f} at first, {result.loss_last:.3f} at last, "
                     "nats a token")
    if result.looked:
        lines.append(f"{result.known} of the {result.looked} samples at hand were known when they were last looked at")
    lines.append(f"{state} serves version {result.version}")
    return "\n".join(lines)


def answers_shown(answers: Sequence[Answer]) -> str:
    """Answers, who gave each, and that of the base model where it is not the same; of several also the prompts."""
    blocks = []
    for one in answers:
        lines = [] if len(answers) == 1 else [f"> {' '.join(str(one.prompt).split())}"]
        if one.experts:
            lines.append(f"{' and '.join(one.experts)}:{_inset(one.answer)}")
        same = one.experts and one.answer.strip() == one.base_answer.strip()
        lines.append("base model: the same" if same else f"base model:{_inset(one.base_answer)}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _inset(text: str) -> str:
    """Text behind a name; of several lines below it, and where there is nothing to be seen as Python writes it."""
    if not text.strip():
        return f" {text!r}"
    text = text.strip("\n")
    return f" {text.strip()}" if "\n" not in text else "\n" + textwrap.indent(text, "    ", lambda line: True)


def status_table(fields: Mapping[str, Any]) -> str:
    """A line a field, 80 columns wide; the names are those of --json."""
    margin = max(map(len, fields)) + 2
    lines = []
    for name, value in fields.items():
        if isinstance(value, bool):
            text = "yes" if value else "no"
        elif isinstance(value, list):
            text = ", ".join(map(str, value))
        elif isinstance(value, float):
            text = f"{value:.3g}"
        else:
            text = f"{value[:32]}..." if name == "state_sha256" else str(value)
        lines.append(f"{name:<{margin}}" + f"\n{'':<{margin}}".join(textwrap.wrap(text, WIDTH - margin)))
    return "\n".join(lines)


def _count_lines(path: Path) -> int | None:
    """Lines of a regular file; None for a pipe, which can be read only once."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(2**20), b""))
