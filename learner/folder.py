"""A state folder: the journal of everything that was acknowledged, snapshots of the state, and the quarantine.

A sample is acknowledged once its record is on disk. Recovery is the newest valid snapshot and the journal after it,
without the records that could not be written at once:

    withdrawn   the records numbered `of`, before it, are none: whoever brought them was told so
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from ogpstream.learner.errors import StateError
from ogpstream.memory.canonical import canonical_json
from ogpstream.memory.files import fsync_folder, write_file
from ogpstream.memory.frames import JournalDamaged
from ogpstream.memory.journal import Journal, JournalFailed, JournalLocked
from ogpstream.memory.snapshot import Snapshot, SnapshotDamaged, SnapshotFormat, SnapshotStore

# a JSON object with `kind` and, once the journal has it, `seq`
Record = dict[str, Any]

_WITHDRAWN = "withdrawn"
# a remedy for a folder that could be written when it was opened
_DISK = "check the disk"


class StateFolder:
    """The folder of one learner, opened by one process at a time.

    Args:
        path: made if missing.
        readonly: look without a lock and without changing anything.

    Raises:
        StateError: it cannot be written, is in use, or is damaged beyond the last record.
    """

    def __init__(self, path: str | os.PathLike[str], *, readonly: bool = False) -> None:
        self.path = Path(path)
        with self._named():
            if readonly and not (self.path / "snapshots").is_dir():
                raise StateError(f"{self.path} holds no learner state: give the folder that `learn --state` wrote")
            if not readonly:
                self.path.mkdir(parents=True, exist_ok=True)
            self.journal = Journal(self.path / "journal", readonly=readonly)
            try:
                self.snapshots = SnapshotStore(self.path / "snapshots", readonly=readonly)
            except BaseException:
                self.journal.close()
                raise
        self._quarantined: set[int] | None = None
        self._withdrawing = False  # the journal may hold what it has not written
        if not readonly and self.empty and self.journal.last_seq:
            self.journal.close()
            raise StateError(f"{self.path} is damaged: it has a journal and no snapshot; "
                             "restore the folder from a copy")

    @property
    def empty(self) -> bool:
        """Nothing was ever saved here."""
        return not self.snapshots.versions()

    def load(self, version: int | None = None) -> Snapshot:
        """A snapshot, by default the newest valid one.

        Raises:
            StateError: there is none.
        """
        with self._named():
            known = self.snapshots.versions()
            if version is not None and version not in known:
                raise StateError(f"{self.path} has no version {version}: it has "
                                 f"{', '.join(map(str, known)) or 'none'}")
            snapshot = self.snapshots.load(version)
        if snapshot is None:
            raise StateError(f"{self.path} holds no learner state: give the folder that `learn --state` wrote, or "
                             "where it was stopped before its first version, run it again")
        return snapshot

    def append(self, record: dict[str, Any]) -> int:
        """Number a record; `sync` or `withdraw` comes next."""
        with self._named(_DISK):
            if self._withdrawing:
                # first, so that on a full disk the journal holds one failure, and not all that were tried
                self.journal.sync()
                self._withdrawing = False
            return self.journal.append(record)

    def sync(self) -> None:
        """Make all appended records durable: the acknowledgement."""
        with self._named(_DISK):
            self.journal.sync()

    def withdraw(self, numbers: Sequence[int]) -> None:
        """Take back records that were appended and not made durable: no reader finds them.

        A journal keeps what it could not write for its next write, which says with this that they are none. Only a kill
        within that write can leave them there, as one can that comes just before an acknowledgement.
        """
        # a journal that has ended writes nothing any more
        with suppress(JournalFailed):
            if numbers:
                self.journal.append({"kind": _WITHDRAWN, "of": list(numbers)})
                self._withdrawing = True

    def records(self, after: int) -> Iterator[dict[str, Any]]:
        """The records behind a number, in order, but those that were withdrawn."""
        with self._named():
            found = self.journal.records(after)
            # what withdraws a record comes after it
            gone = {number for record in self.journal.records(after) if record["kind"] == _WITHDRAWN
                    for number in (record["seq"], *record["of"])}
            yield from (record for record in found if record["seq"] not in gone)

    def kept(self, after: int) -> Iterator[dict[str, Any]]:
        """The same without those that were dropped already: a pinned snapshot can be older than the journal."""
        return self.records(max(after, self.journal.first_seq - 1))

    def save(self, version: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Write a snapshot; drop the journal that no kept snapshot needs any more, and the imports that it named."""
        with self._named(_DISK):
            self.journal.sync()
            self.snapshots.save(version, tensors, meta)
            self.journal.rotate()
            # pinned older snapshots are whole by themselves: only the newest ones need the journal behind them
            newest = sorted(self.snapshots.versions())[-self.snapshots.keep :]
            metas = [self.snapshots.meta(kept) for kept in newest]
            self.journal.drop_before(min(m["position"]["seq"] for m in metas if m is not None))
            for adapter in self.imports():
                if int(adapter.name.rpartition("-")[2]) < self.journal.first_seq:
                    shutil.rmtree(adapter)

    def quarantine(self, entry: Mapping[str, Any]) -> None:
        """Keep a sample that is not learned, with the reason, for a person to review.

        A record is kept once, with its first reason: not again when it is applied again after a kill, or undone by a
        rollback after it was refused. What a person has written into the file stays.
        """
        with self._named(_DISK), open(self.path / "quarantine.jsonl", "ab+") as file:
            if self._quarantined is None:
                self._quarantined = _entries(file)
            if entry["seq"] in self._quarantined:
                return
            entries, self._quarantined = self._quarantined, None  # to be read again if this fails half-way
            file.write((b"" if _ends_a_line(file) else b"\n") + canonical_json(entry) + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self._quarantined = entries | {entry["seq"]}

    def keep_import(self, adapter: Path, name: str) -> str:
        """Copy an adapter's files in, so that the journal can name it: whole or not at all; returns its name here."""
        with self._named():
            place, copy = self.path / "imports", f"{name}-{self.journal.last_seq + 1}"
            place.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=place) as folder:
                made = Path(folder) / copy
                made.mkdir()
                for file in (*adapter.glob("adapter_config.json"), *adapter.glob("adapter_model.*")):
                    write_file(made / file.name, file.read_bytes())
                fsync_folder(made)
                shutil.rmtree(place / copy, ignore_errors=True)
                made.rename(place / copy)
            fsync_folder(place)
            fsync_folder(self.path)
            return copy

    def imported(self, name: str) -> Path:
        """Where the adapter of that name is; the state folder may have been moved since."""
        return self.path / "imports" / name

    def imports(self) -> list[Path]:
        """Adapters that the journal may still name: NAME-NUMBER, with the number of their record."""
        return [path for path in (self.path / "imports").glob("*-*") if path.name.rpartition("-")[2].isdecimal()]

    def sizes(self) -> dict[str, int]:
        """Bytes of what stands beside journal and snapshots; a quarantine is a person's to shorten."""
        with self._named():
            place = self.path / "quarantine.jsonl"
            imports = [file.stat().st_size for adapter in self.imports() for file in adapter.iterdir()]
            return {"quarantine_bytes": place.stat().st_size if place.exists() else 0, "imports_bytes": sum(imports)}

    def versions(self) -> list[int]:
        return sorted(self.snapshots.versions())

    def pin(self, version: int, name: str) -> None:
        """Keep a snapshot beyond the newest ones."""
        with self._named():
            self.snapshots.pin(version, name)

    def close(self) -> None:
        with self._named(_DISK):
            self.journal.close()

    @contextmanager
    def _named(self, remedy: str = "choose a folder that can be written") -> Iterator[None]:
        """Turn what the disk and the files say into one line with the folder and a remedy."""
        try:
            yield
        except (JournalDamaged, SnapshotDamaged) as error:
            raise StateError(f"{self.path} is damaged: {error}; restore the folder from a copy") from error
        except SnapshotFormat as error:
            raise StateError(f"{self.path}: {error}") from error
        except JournalLocked as error:
            raise StateError(f"{self.path} is in use by another process: stop it first; or by another "
                             "learner of this one, which close() ends") from error
        except JournalFailed as error:
            raise StateError(f"{self.path} cannot be written any more: {error}; check the disk, restart") from error
        except OSError as error:
            raise StateError(f"{self.path} cannot be used: {error.strerror or error}; {remedy}") from error
        except ValueError as error:
            raise StateError(f"{self.path}: {error}") from error


def _entries(file: BinaryIO) -> set[int]:
    """The journal numbers of what a quarantine holds; a line that a kill left half written is cut off.

    Other lines that are no entry are those of a person.
    """
    file.seek(0)
    entries = set()
    end = 0
    for line in file:
        number = _number(line)
        if number is not None:
            entries.add(number)
        elif line.startswith(b"{") and not line.endswith(b"\n"):
            file.truncate(end)
        end += len(line)
    return entries


def _number(line: bytes) -> int | None:
    """The journal number of an entry of a quarantine; None for a line that is none."""
    try:
        number = json.loads(line)["seq"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return number if isinstance(number, int) else None


def _ends_a_line(file: BinaryIO) -> bool:
    """Whether what is appended to a file begins a line."""
    if not file.seek(0, os.SEEK_END):
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


class MemoryFolder:
    """The same for a learner without a folder: nothing outlives the process; the latest two saves are kept."""

    def __init__(self) -> None:
        self._last_seq = 0
        self._saves: dict[int, Snapshot] = {}

    def load(self, version: int | None = None) -> Snapshot:
        return self._saves[max(self._saves) if version is None else version]

    def append(self, record: dict[str, Any]) -> int:
        self._last_seq += 1
        return self._last_seq

    def sync(self) -> None:
        """Nothing is written."""

    def withdraw(self, numbers: Sequence[int]) -> None:
        """Nothing is kept either."""

    def records(self, after: int) -> Iterator[dict[str, Any]]:
        """None are kept."""
        return iter(())

    kept = records

    def save(self, version: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        self._saves[version] = Snapshot({name: t.clone() for name, t in tensors.items()}, dict(meta), version)
        for old in sorted(self._saves)[:-2]:
            del self._saves[old]

    def quarantine(self, entry: Mapping[str, Any]) -> None:
        """Counted by the learner, kept nowhere."""

    def keep_import(self, adapter: Path, name: str) -> str:
        return str(adapter)

    def imported(self, name: str) -> Path:
        return Path(name)

    def sizes(self) -> dict[str, int]:
        return {"quarantine_bytes": 0, "imports_bytes": 0}

    def versions(self) -> list[int]:
        return sorted(self._saves)

    def pin(self, version: int, name: str) -> None:
        """The next two saves may still be made before it is needed again."""

    def close(self) -> None:
        """Nothing is open."""
