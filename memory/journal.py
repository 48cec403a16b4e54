"""Append-only journal: what it has acknowledged survives a kill and a power loss.

A folder holds segments `journal-<first seq, 20 digits>.log`, little endian:

    header   magic 8 B | format u32 | first seq u64 | crc32 u32 of these 20 bytes
    record   length u32 | crc32 u32 of the payload | payload, canonical UTF-8 JSON with "seq" and "kind"

"seq" is dense and starts at 1. After each fsync a mark `{"durable":<seq>}` is written in the same framing,
without an fsync of its own. It tells two faults apart that look alike: bytes that a crash left half written
(no mark covers them: cut off) and bytes that rotted after they had been acknowledged (a later mark covers
them: `JournalDamaged`).
"""

import fcntl
import json
import mmap
import os
import re
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NoReturn

MAGIC = b"OGPJRNL\n"
FORMAT = 1
# a length read from a damaged file may not allocate more than this
MAX_RECORD = 64 * 2**20

_HEADER = struct.Struct("<8sIQI")
# CRC-32 of the standard library, not CRC32C: both find every burst of up to 32 bits and miss 2^-32 of the
# rest
_FRAME = struct.Struct("<II")
_MARK = b'{"durable":'
_NAME = re.compile(r"journal-(\d{20})\.log")
_TEMPORARY = ".tmp-journal"


class JournalDamaged(ValueError):
    """Bytes that were acknowledged cannot be read back; names the file and the offset."""

    def __init__(self, path: Path, offset: int, why: str):
        super().__init__(f"{path}: damaged at byte {offset}: {why}; restore this file from a copy")
        self.path, self.offset = path, offset


class JournalLocked(RuntimeError):
    """Another process or object writes to this folder."""


class JournalFailed(OSError):
    """An fsync failed: what the kernel shows of the file may not be on the disk, so appending ends."""


def canonical_json(value: Any) -> bytes:
    """The one UTF-8 spelling of a JSON value: sorted keys, no blanks, floats by repr.

    Raises ValueError for what would not come back equal (NaN, infinities, tuples, keys that are not strings,
    lone surrogates).
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        data = text.encode("utf-8")
        same = json.loads(text) == value
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"not storable as JSON: {error}; use finite numbers, valid text, lists and string keys"
        ) from error
    if not same:
        raise ValueError(
            "does not come back equal from JSON; use lists instead of tuples and strings as keys"
        )
    return data


def fsync_folder(folder: Path) -> None:
    """Make creations, renames and deletions in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes) -> None:
    """os.write until everything is written; OSError (disk full, say) may leave a part behind."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


@dataclass
class _Segment:
    path: Path
    first: int  # seq of its first record
    last: int  # seq of its last good record, first - 1 when it has none
    end: int  # bytes up to the last good frame


class _BadFrame(Exception):
    def __init__(self, offset: int, why: str):
        super().__init__(why)
        self.offset = offset


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
    def last_seq(self) -> int:
        """Sequence number of the last appended record, durable or not; 0 when there is none."""
        return self._last

    @property
    def durable_seq(self) -> int:
        """Sequence number of the last record known to be on the disk."""
        return self._durable

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
            payload = canonical_json({**record, "seq": seq})
            if len(payload) > MAX_RECORD:
                raise ValueError(
                    f"a record of {len(payload)} bytes is over the limit of {MAX_RECORD}; split it"
                )
            self._pending.append(_frame(payload))
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
            segments = [_Segment(s.path, s.first, s.last, s.end) for s in self._segments]
        last = segments[-1].last if segments else 0
        if after < 0:
            raise ValueError(f"after = {after}: sequence numbers start at 1, use 0 for all records")
        if after > last:
            where = segments[-1] if segments else _Segment(self.folder, 1, 0, 0)
            raise JournalDamaged(
                where.path, where.end, f"ends with record {last}, but record {after} was acknowledged"
            )
        if segments and after + 1 < segments[0].first:
            raise JournalDamaged(
                segments[0].path, 0, f"starts with record {segments[0].first}, {after + 1} was asked for"
            )
        return self._read(segments, after)

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
            segment = self._create(current.last + 1)
            descriptor = os.open(segment.path, os.O_WRONLY | os.O_APPEND)
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
            raise JournalLocked(
                f"{self.folder} is in use by process {owner}; stop it or use another folder"
            ) from None
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
        self._segments = self._scan() or [self._create(1)]
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
            raise ValueError(
                f"{self.folder}: the journal is {'closed' if self._closed else 'open for reading only'}"
            )

    def _raise_failure(self) -> NoReturn:
        assert self._failure is not None
        raise JournalFailed(
            self._failure.errno,
            f"{self._segments[-1].path}: could not be made durable ({self._failure}), records after"
            f" {self._durable} are not acknowledged; check the disk, then open the journal again",
        ) from self._failure

    def _fsync(self, segment: _Segment) -> None:
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._failure = error
            self._truncate(segment)
            self._raise_failure()

    def _truncate(self, segment: _Segment) -> None:
        """Remove what follows the last durable frame; an error here ends the journal too."""
        try:
            os.ftruncate(self._descriptor, segment.end)
        except OSError as error:
            self._failure = self._failure or error

    def _write_mark(self, segment: _Segment) -> None:
        mark = _frame(canonical_json({"durable": segment.last}))
        try:
            write_all(self._descriptor, mark)
        except OSError:
            # the records are safe without it: only rot in them could be taken for a torn tail
            self._truncate(segment)
        else:
            segment.end += len(mark)

    def _create(self, first: int) -> _Segment:
        path = self.folder / f"journal-{first:020d}.log"
        temporary = self.folder / f"{_TEMPORARY}-{first:020d}"
        fields = _HEADER.pack(MAGIC, FORMAT, first, 0)[:-4]
        # complete before it has its name: a crash never leaves a segment with half a header
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            write_all(descriptor, fields + struct.pack("<I", zlib.crc32(fields)))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        fsync_folder(self.folder)
        return _Segment(path, first, first - 1, _HEADER.size)

    def _scan_while_written(self) -> list[_Segment]:
        for _ in range(10):
            try:
                return self._scan()
            except FileNotFoundError:
                # the writer dropped a segment between listing and reading, unless the folder is missing
                if not self.folder.is_dir():
                    raise
        raise JournalLocked(f"{self.folder}: its writer keeps removing segments; try again")

    def _scan(self) -> list[_Segment]:
        """Verify all segments; the result ends before a torn tail of the last one."""
        names = sorted(name for name in os.listdir(self.folder) if _NAME.fullmatch(name))
        segments: list[_Segment] = []
        for position, name in enumerate(names):
            path = self.folder / name
            first = int(name[8:28])
            if segments and first != segments[-1].last + 1:
                raise JournalDamaged(
                    path,
                    0,
                    f"starts with record {first}, but the segment before it ends with {segments[-1].last}",
                )
            segment = _Segment(path, first, first - 1, _HEADER.size)
            with path.open("rb") as file:
                _check_header(file, path, first)
                try:
                    for end, payload in _frames(file, None):
                        if _sequence(payload, segment, end) == segment.last + 1:
                            segment.last += 1
                        segment.end = end
                except _BadFrame as bad:
                    if position < len(names) - 1 or _marked_durable(file, bad.offset):
                        raise JournalDamaged(path, bad.offset, str(bad)) from None
            segments.append(segment)
        return segments

    def _read(self, segments: list[_Segment], after: int) -> Iterator[dict[str, Any]]:
        for segment in segments:
            if segment.last <= after:
                continue
            expected = segment.first
            try:
                with segment.path.open("rb") as file:
                    _check_header(file, segment.path, segment.first)
                    for _, payload in _frames(file, segment.end):
                        if payload.startswith(_MARK):
                            continue
                        record = json.loads(payload)
                        if record["seq"] != expected:
                            raise _BadFrame(file.tell(), f"record {record['seq']} where {expected} belongs")
                        expected += 1
                        if record["seq"] > after:
                            yield record
            except _BadFrame as bad:
                raise JournalDamaged(segment.path, bad.offset, str(bad)) from None
            except FileNotFoundError:
                raise JournalDamaged(segment.path, 0, "was removed while it was being read") from None
            if expected != segment.last + 1:
                raise JournalDamaged(
                    segment.path, segment.end, f"lost the records from {expected} on while it was open"
                )


def _frame(payload: bytes) -> bytes:
    return _FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def _check_header(file: BinaryIO, path: Path, first: int) -> None:
    data = file.read(_HEADER.size)
    if len(data) < _HEADER.size:
        raise JournalDamaged(path, len(data), "the header is cut off")
    magic, version, named, crc = _HEADER.unpack(data)
    if magic != MAGIC or crc != zlib.crc32(data[:-4]):
        raise JournalDamaged(path, 0, "not a journal segment, or its header is damaged")
    if version != FORMAT:
        raise ValueError(
            f"{path}: journal format {version}, this release reads {FORMAT}; use the release that wrote it"
        )
    if named != first:
        raise JournalDamaged(path, 12, f"holds records from {named} on, not {first}: the file was renamed")


def _frames(file: BinaryIO, end: int | None) -> Iterator[tuple[int, bytes]]:
    """(offset behind it, payload) of each frame from the file's position to byte `end` (None: its end)."""
    size = os.fstat(file.fileno()).st_size
    end = size if end is None else min(end, size)
    offset = file.tell()
    while offset < end:
        if end - offset < _FRAME.size:
            raise _BadFrame(offset, "half a record")
        length, crc = _FRAME.unpack(file.read(_FRAME.size))
        if length > min(MAX_RECORD, end - offset - _FRAME.size):
            raise _BadFrame(offset, f"a record of {length} bytes does not fit")
        payload = file.read(length)
        if len(payload) < length or zlib.crc32(payload) != crc:
            raise _BadFrame(offset, "the checksum of a record does not match")
        offset += _FRAME.size + length
        yield offset, payload


def _sequence(payload: bytes, segment: _Segment, end: int) -> int:
    """Number of a record, or of the last one that a mark covers; _BadFrame when it does not belong here."""
    start = end - _FRAME.size - len(payload)
    try:
        record = json.loads(payload)
        mark = payload.startswith(_MARK)
        seq = record["durable" if mark else "seq"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _BadFrame(start, "not a journal record") from None
    expected = segment.last if mark else segment.last + 1
    if seq != expected:
        raise _BadFrame(start, f"{'mark' if mark else 'record'} {seq} where {expected} belongs")
    return expected


def _marked_durable(file: BinaryIO, offset: int) -> bool:
    """Whether a mark behind byte `offset` says that what lies there had been synced."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        # JSON text holds no NUL byte, a short frame's length holds three: text that imitates a mark is never
        # taken for one
        at = data.find(_MARK, offset)
        while at >= 0:
            if at >= _FRAME.size:
                length, crc = _FRAME.unpack(data[at - _FRAME.size : at])
                payload = data[at : at + length] if length <= 64 else b""
                if payload and zlib.crc32(payload) == crc:
                    return True
            at = data.find(_MARK, at + 1)
    return False
