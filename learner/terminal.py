"""What the command line shows on stderr: one line a message, and progress where stderr is a terminal."""

from __future__ import annotations

import logging
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ogpstream.learner.stream import StreamResult


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
    """A progress bar on stderr while a file is learned; nothing where stderr is no terminal."""

    def __init__(self, path: Path) -> None:
        console = Console(stderr=True)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                   TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        lines = _count_lines(path) if console.is_terminal else None
        self._task = self._bar.add_task("learning", total=lines)

    def __enter__(self) -> LearnProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, result: StreamResult, line: int | None) -> None:
        if line is None:
            self._bar.update(self._task, description="rehearsing what was learned once", total=None)
        else:
            self._bar.update(self._task, completed=line,
                             description=f"learned {result.learned}, rejected {result.rejected}")


def _count_lines(path: Path) -> int | None:
    """Lines of a regular file; None for a pipe, which can be read only once."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(2**20), b""))
