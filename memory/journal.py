"""Append-only journal: what it has acknowledged survives a kill and a power loss.

A folder holds segments (frames.py says what their bytes are). "seq" is dense over all of them and starts at 1.
After each fsync a mark is written, without an fsync of its own.
"""

import fcntl
import os
import threading
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from ogpstream.memory.files import fsync_folder, write_all, write_file
from ogpstream.memory.frames import JournalDamaged, Segment, header, mark_frame, record_frame, scan

_TEMPORARY = ".tmp-journal"


class JournalLocked(RuntimeError):
    """Another process or object writes to this folder."""


class JournalFailed(OSError):
    """An fsync failed: what the kernel shows of the file may not be on the disk, so appending ends."""


class Journal:
    """Append-only log of JSON records in a folder, with group commit.

    Opening takes an exclusive lock (gone with the process, however it dies), verifies every record, and cuts
    a torn tail of the last segment: `cut` is the number of bytes removed. `readonly=True` takes no lock,
    changes nothing, and sees what is readable at that moment, also while another process writes. `append` and
    `sync` may be called from several threads.

    Raises JournalLocked, JournalDamaged, ValueError (a segment of another format), OSError.
    """

    def __init__(self, folder: str | os.PathLike[str], *, readonly: bool = False):
        self.folder = Path(folder)
        self.readonly = readonly
        self.cut = 0
        self._pending: list[bytes] = []
        self._buffer_lock = threading.Lock()
        self._file_lock = threading.RLock()
        self._failure: OSError | None = None
        self._closed = False
        self._descriptor = -1
        self._lock = -1
        if readonly:
            self._segments = self._scan_while_written()
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            fsync_folder(self.folder.parent)
            self._lock = self._take_lock()
            try:
                self._open_for_writing()
            except BaseException:
                self._release()
                raise
        self._last = self._durable = self._segments[-1].last if self._segments else 0

    @property
    def first_seq(self) -> int:
        """Sequence number of the oldest record that is still kept, or the next one's when there is none."""
        return self._segments[0].first if self._segments else 1

    @property
    def last_seq(self) -> int:
        """Sequence number of the last appended record, durable or not; 0 when there is none."""
        return self._last

    def append(self, record: dict[str, Any]) -> int:
        """Buffer a copy of `record` and return its sequence number; durable once `sync` has returned.

        Raises ValueError when `record` has a "seq", no "kind" (str), or is not plain JSON of at most 64 MiB;
        JournalFailed.
        """
        if not isinstance(record.get("kind"), str):
            raise ValueError(f'a journal record needs a "kind" that is text, not {record.get("kind")!r}')
        if not record.keys().isdisjoint(("seq", "durable")):
            raise ValueError('"seq" and "durable" are the journal\'s own keys: leave them out of the record')
        with self._buffer_lock:
            self._check_writable()
            seq = self._last + 1
            self._pending.append(record_frame({**record, "seq": seq}))
            self._last = seq
        return seq

    def sync(self) -> int:
        """Write and fsync everything appended so far, at once; return the last durable sequence number.

        A failed write (disk full) leaves the file as it was and keeps the records, so that a later `sync` can
        succeed. A failed fsync ends this journal: it and every later call raises JournalFailed.
        """
        with self._file_lock:
            with self._buffer_lock:
                self._check_writable()
                data, last = b"".join(self._pending), self._last
                self._pending.clear()
            if not data:
                return self._durable
            segment = self._segments[-1]
            try:
                write_all(self._descriptor, data)
            except OSError:
                with self._buffer_lock:
                    self._pending.insert(0, data)
                self._truncate(segment)
                raise
            self._fsync(segment)
            segment.end += len(data)
            segment.last = self._durable = last
            self._write_mark(segment)
            return last

    def records(self, after: int = 0) -> Iterator[dict[str, Any]]:
        """Durable records with seq > `after`, in order, as far as they reach at the time of the call.

        Raises JournalDamaged, also when records between `after` and the oldest one kept, or `after` itself,
        are missing.
        """
        with self._file_lock:
            segments = [Segment(s.path, s.first, s.last, s.end) for s in self._segments]
        last = segments[-1].last if segments else 0
        if after < 0:
            raise ValueError(f"after = {after}: sequence numbers start at 1, use 0 for all records")
        if after > last:
            where = segments[-1] if segments else Segment(self.folder, 1, 0, 0)
            raise JournalDamaged(where.path, where.end, f"ends with record {last}, but record {after} was acknowledged")
        if segments and after + 1 < segments[0].first:
            raise JournalDamaged(
                segments[0].path, 0, f"starts with record {segments[0].first}, {after + 1} was asked for"
            )
        return chain.from_iterable(s.records(after) for s in segments if s.last > after)

    def rotate(self) -> None:
        """Sync, then start a new segment; nothing happens when the current one has no records."""
        with self._file_lock:
            self.sync()
            current = self._segments[-1]
            if current.last < current.first:
                return
            # the last mark must not be lost: in a segment that is not the last one half a frame counts as
            # damage
            self._fsync(current)
            segment, descriptor = self._begin(current.last + 1)
            os.close(self._descriptor)
            self._descriptor = descriptor
            self._segments.append(segment)

    def drop_before(self, seq: int) -> int:
        """Delete the segments with only records <= `seq`, never the one being written; return how many."""
        with self._file_lock:
            self._check_writable()
            dropped = 0
            while len(self._segments) > 1 and self._segments[0].last <= seq:
                self._segments[0].path.unlink()
                # one by one: two deletions that reach the disk in the other order would leave a gap after a
                # power loss
                fsync_folder(self.folder)
                del self._segments[0]
                dropped += 1
            return dropped

    def close(self) -> None:
        """Sync and release the folder; harmless when repeated. After a failure nothing is synced."""
        with self._file_lock:
            if self._closed:
                return
            try:
                if not self.readonly and self._failure is None:
                    self.sync()
            finally:
                self._closed = True
                self._release()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take_lock(self) -> int:
        path = self.folder / "journal.lock"
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(lock, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(lock)
            raise JournalLocked(f"{self.folder} is in use by process {owner}; stop it or use another folder") from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        return lock

    def _release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        if self._lock >= 0:
            # a forked child may hold a copy of the descriptor: closing ours would not free the lock
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            os.close(self._lock)
        self._descriptor = self._lock = -1

    def _open_for_writing(self) -> None:
        for path in self.folder.glob(f"{_TEMPORARY}*"):
            path.unlink()
        self._segments = scan(self.folder)
        if not self._segments:
            self._segments = [Segment.empty(self.folder, 1)]
            self._create(self._segments[0])
        segment = self._segments[-1]
        self._descriptor = os.open(segment.path, os.O_WRONLY | os.O_APPEND)
        self.cut = os.fstat(self._descriptor).st_size - segment.end
        if self.cut:
            os.ftruncate(self._descriptor, segment.end)
        # records that were written but not synced before a kill count as durable from here on
        os.fsync(self._descriptor)
        fsync_folder(self.folder)

    def _check_writable(self) -> None:
        if self._failure is not None:
            self._raise_failure()
        if self.readonly or self._closed:
            raise ValueError(f"{self.folder}: the journal is {'closed' if self._closed else 'open for reading only'}")

    def _raise_failure(self) -> NoReturn:
        assert self._failure is not None
        raise JournalFailed(
            self._failure.errno,
            f"{self._segments[-1].path}: could not be made durable ({self._failure}), records after"
            f" {self._durable} are not acknowledged; check the disk, then open the journal again",
        ) from self._failure

    def _fsync(self, segment: Segment) -> None:
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._failure = error
            self._truncate(segment)
            self._raise_failure()

    def _truncate(self, segment: Segment) -> None:
        """Remove what follows the last durable frame; an error here ends the journal too."""
        try:
            os.ftruncate(self._descriptor, segment.end)
        except OSError as error:
            self._failure = self._failure or error

    def _write_mark(self, segment: Segment) -> None:
        mark = mark_frame(segment.last)
        try:
            write_all(self._descriptor, mark)
        except OSError:
            # the records are safe without it: only rot in them could be taken for a torn tail
            self._truncate(segment)
        else:
            segment.end += len(mark)

    def _create(self, segment: Segment) -> None:
        temporary = self.folder / f"{_TEMPORARY}-{segment.first:020d}"
        # complete before it has its name: a crash never leaves a segment with half a header
        write_file(temporary, header(segment.first))
        os.replace(temporary, segment.path)
        fsync_folder(self.folder)

    def _begin(self, first: int) -> tuple[Segment, int]:
        """A new segment, open for writing, or none: appends would go on in the old one behind its back."""
        segment = Segment.empty(self.folder, first)
        try:
            self._create(segment)
            return segment, os.open(segment.path, os.O_WRONLY | os.O_APPEND)
        except OSError as failure:
            try:
                segment.path.unlink(missing_ok=True)
            except OSError:
                # it is there for good, so nothing more may be acknowledged in the old one
                self._failure = failure
            raise

    def _scan_while_written(self) -> list[Segment]:
        for _ in range(10):
            try:
                return scan(self.folder)
            except FileNotFoundError:
                # the writer dropped a segment between listing and reading, unless the folder is missing
                if not self.folder.is_dir():
                    raise
        raise JournalLocked(f"{self.folder}: its writer keeps removing segments; try again")
