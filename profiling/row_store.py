"""Finished rows of a benchmark in a file, a line each: a run that was killed goes on after them."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# folders of the package
_PARTS = ("kernels", "learner", "memory", "profiling")


def settings_digest(settings: Any) -> str:
    """What tells rows of different settings apart: 16 hexadecimal digits over JSON values."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def code_digest() -> str:
    """What tells rows of different versions of this package apart: 12 hexadecimal digits over its source."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(path for part in _PARTS for path in (root / part).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class Keyed:
    """A dataclass of what a row is of, as JSON values: with a `config` as `LearnerConfig.to_dict` has it."""

    config: dict[str, Any]

    @property
    def settings(self) -> str:
        """The key of the row: everything that it depends on, but not the number of threads."""
        return settings_digest({**vars(self), "threads": None})

    @property
    def seed(self) -> int:
        return int(self.config["seed"])


class RowStore:
    """Rows in `FOLDER/rows.jsonl`, by their field `settings`; in memory alone without a folder.

    Each has the `code` that made it. Rows of other code are found like others, and told by `found`. A line that a
    kill left half-written is skipped, and its row computed again.
    """

    def __init__(self, folder: Path | None) -> None:
        self.path = None if folder is None else folder / "rows.jsonl"
        self._rows: dict[str, Row] = {}
        if self.path is None or not self.path.exists():
            return
        for line in self.path.read_text("utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and "settings" in row:
                self._rows[row["settings"]] = row

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, settings: str) -> Row | None:
        return self._rows.get(settings)

    def found(self, settings: Iterable[str]) -> str | None:
        """A line on those of these rows that are here already, and whose code made them; None where none is."""
        asked = list(settings)
        rows = [self._rows[one] for one in asked if one in self._rows]
        if not rows:
            return None
        others = sum(row.get("code") != code_digest() for row in rows)
        told = f", {others} of them by another version of the code: another --out makes these anew" if others else ""
        return f"{len(rows)} of {len(asked)} rows are there already{told}"

    def rows(self) -> list[Row]:
        """All of them, in the order in which they were finished."""
        return list(self._rows.values())

    def add(self, row: Row) -> None:
        """Keep a row; it is on the disk when this returns."""
        row = {**row, "code": code_digest()}
        self._rows[row["settings"]] = row
        if self.path is None:
            return
        with self.path.open("a+b") as file:
            file.seek(0, os.SEEK_END)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                # after half of a line the next one begins on its own
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
