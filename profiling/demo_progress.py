"""How far the demo is: bars on a terminal, and lines where there is none."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class DemoProgress:
    """Progress of named jobs on stderr; without a terminal a line at the start and for every tenth of a job.

    Args:
        console: where to; None shows nothing.
        totals: steps of each job.
    """

    def __init__(self, console: Console | None, totals: Mapping[str, int]) -> None:
        columns = (TextColumn("{task.description:<18}"), BarColumn(), TimeElapsedColumn(),
                   TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[note]}"))
        bars = console is not None and console.is_terminal
        self._progress = Progress(*columns, console=console, disable=not bars)
        self._lines = None if bars else console
        self._totals = totals
        self._bars = {name: self._progress.add_task(name, total=total, note="") for name, total in totals.items()}
        self._tenths = dict.fromkeys(totals, 0)
        self._started = time.perf_counter()

    def __enter__(self) -> DemoProgress:
        self._progress.start()
        if self._totals:
            self._tell(f"begun: {', '.join(self._totals)}")
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, name: str, done: int, note: str = "") -> None:
        """One job has done so many steps."""
        self._progress.update(self._bars[name], completed=done, note=note)
        total, tenth = self._totals[name], 10 * done // self._totals[name]
        if tenth > self._tenths[name]:
            self._tenths[name] = tenth
            self._tell(", ".join(filter(None, (f"{name}: {done}/{total}", note,
                                               f"{time.perf_counter() - self._started:.0f} s"))))

    def _tell(self, line: str) -> None:
        if self._lines is not None:
            self._lines.print(line, markup=False, highlight=False, soft_wrap=True)
