"""Segments of the journal on disk: a header, then frames, little endian, in `journal-<first seq, 20 digits>.log`.

    header   magic 8 B | format u32 | first seq u64 | crc32 u32 of these 20 bytes
    record   length u32 | crc32 u32 of the payload | payload, canonical UTF-8 JSON with "seq" and "kind"
    mark     framed the same, payload `{"durable":<seq>}`: the records up to this one had been synced

A mark tells two faults apart that look alike: bytes that a crash left half written (no mark covers them: cut
off) and bytes that rotted after they had been acknowledged (a later mark covers them: `JournalDamaged`).
"""

import json
import mmap
import os
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ogpstream.memory.canonical import canonical_json

MAGIC = b"OGPJRNL\n"
FORMAT = 1
# a length read from a damaged file may not allocate more than this
MAX_RECORD = 64 * 2**20

_HEADER = struct.Struct("<8sIQI")
# CRC-32 of the standard library, not CRC32C: both find every burst of up to 32 bits and miss 2^-32 of the rest
_FRAME = struct.Struct("<II")
_MARK = b'{"durable":'
_NAME = re.compile(r"journal-(\d{20})\.log")


class JournalDamaged(ValueError):
    """Bytes that were acknowledged cannot be read back; names the file and the offset."""

    def __init__(self, path: Path, offset: int, why: str):
        super().__init__(f"{path}: damaged at byte {offset}: {why}; restore this file from a copy")
        self.path, self.offset = path, offset


class _BadFrame(Exception):
    def __init__(self, offset: int, why: str):
        super().__init__(why)
        self.offset = offset


@dataclass
class Segment:
    """One file of the journal, as far as it is good; a segment without records has last = first - 1."""

    path: Path
    first: int  # seq of its first record
    last: int  # seq of its last good record
    end: int  # bytes up to the last good frame

    @classmethod
    def empty(cls, folder: Path, first: int) -> "Segment":
        """The segment that starts with record `first` while it holds its header alone."""
        return cls(folder / f"journal-{first:020d}.log", first, first - 1, _HEADER.size)

    def records(self, after: int) -> Iterator[dict[str, Any]]:
        """Its records with seq > `after`, up to `end` as it was when this began. Raises JournalDamaged."""
        expected = self.first
        try:
            with self.path.open("rb") as file:
                _check_header(file, self.path, self.first)
                for _, payload in _frames(file, self.end):
                    if payload.startswith(_MARK):
                        continue
                    record = json.loads(payload)
                    if record["seq"] != expected:
                        raise _BadFrame(file.tell(), f"record {record['seq']} where {expected} belongs")
                    expected += 1
                    if record["seq"] > after:
                        yield record
        except _BadFrame as bad:
            raise JournalDamaged(self.path, bad.offset, str(bad)) from None
        except FileNotFoundError:
            raise JournalDamaged(self.path, 0, "was removed while it was being read") from None
        if expected != self.last + 1:
            raise JournalDamaged(self.path, self.end, f"lost the records from {expected} on while it was open")


def header(first: int) -> bytes:
    """What the segment that starts with record `first` begins with."""
    fields = _HEADER.pack(MAGIC, FORMAT, first, 0)[:-4]
    return fields + struct.pack("<I", zlib.crc32(fields))


def record_frame(record: dict[str, Any]) -> bytes:
    """The frame of one record. Raises ValueError: it is not plain JSON, or is over MAX_RECORD bytes."""
    payload = canonical_json(record)
    if len(payload) > MAX_RECORD:
        raise ValueError(f"a record of {len(payload)} bytes is over the limit of {MAX_RECORD}; split it")
    return _frame(payload)


def mark_frame(seq: int) -> bytes:
    """The frame that says that the records up to `seq` are durable."""
    return _frame(canonical_json({"durable": seq}))


def scan(folder: Path) -> list[Segment]:
    """Verify all segments of a folder; the result ends before a torn tail of the last one.

    Raises:
        JournalDamaged: acknowledged bytes cannot be read back, or a segment is missing.
        ValueError: a segment has another format.
    """
    names = [match for match in map(_NAME.fullmatch, sorted(os.listdir(folder))) if match]
    segments: list[Segment] = []
    for position, name in enumerate(names):
        segment = Segment.empty(folder, int(name[1]))
        path, first = segment.path, segment.first
        if segments and first != segments[-1].last + 1:
            raise JournalDamaged(
                path, 0, f"starts with record {first}, but the segment before it ends with {segments[-1].last}"
            )
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


def _sequence(payload: bytes, segment: Segment, end: int) -> int:
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
