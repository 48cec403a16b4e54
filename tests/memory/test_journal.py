import errno
import os
import random
import signal
import struct
import time
import tracemalloc
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ogpstream.memory import frames
from ogpstream.memory.canonical import canonical_json
from ogpstream.memory.frames import JournalDamaged
from ogpstream.memory.journal import Journal, JournalFailed, JournalLocked

HEADER = 24


@pytest.fixture(scope="module", autouse=True)
def _no_disk():
    """SIGKILL and truncation do not touch the page cache, so the disk's latency would only make this slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def fill(folder, count, *, group=1):
    with Journal(folder) as journal:
        for number in range(1, count + 1):
            journal.append({"kind": "sample", "text": f"text {number} {'é' * (number % 5)}"})
            if number % group == 0:
                journal.sync()


def seqs(folder, after=0):
    with Journal(folder, readonly=True) as journal:
        return [record["seq"] for record in journal.records(after)]


def segment(folder):
    return max(folder.glob("journal-*.log"))


def frame_ends(data):
    """(end, last sequence number up to there) of each frame, from the format as documented."""
    ends, offset, seq = [(HEADER, 0)], HEADER, 0
    while offset < len(data):
        length, _ = struct.unpack_from("<II", data, offset)
        payload = data[offset + 8 : offset + 8 + length]
        offset += 8 + length
        seq += not payload.startswith(b'{"durable"')
        ends.append((offset, seq))
    return ends


def test_numbers_are_dense_and_survive_reopening(tmp_path):
    with Journal(tmp_path / "new" / "journal") as journal:
        assert (journal.last_seq, list(journal.records())) == (0, [])
        assert [journal.append({"kind": "a"}), journal.append({"kind": "b"})] == [1, 2]
        assert journal.last_seq == 2
        assert list(journal.records()) == [], "what is not durable is not shown"
        assert journal.sync() == 2
    with Journal(tmp_path / "new" / "journal") as journal:
        assert journal.append({"kind": "c", "n": 1}) == 3
    assert seqs(tmp_path / "new" / "journal", after=1) == [2, 3]


def test_one_fsync_for_all_appended_records(tmp_path, monkeypatch):
    calls = []
    with Journal(tmp_path) as journal:
        monkeypatch.setattr(os, "fsync", calls.append)
        for _ in range(50):
            journal.append({"kind": "a"})
        journal.sync()
        journal.sync()
        assert len(calls) == 1


def test_the_record_is_copied_when_it_is_appended(tmp_path):
    record = {"kind": "a", "ids": [1, 2]}
    with Journal(tmp_path) as journal:
        journal.append(record)
        record["ids"].append(3)
        journal.sync()
        assert [r["ids"] for r in journal.records()] == [[1, 2]]


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"kind": 3},
        {"kind": "a", "seq": 1},
        {"kind": "a", "durable": 1},
        {"kind": "a", "x": float("nan")},
        {"kind": "a", "x": (1, 2)},
        {"kind": "a", "x": {1: 2}},
        {"kind": "a", "x": "\ud800"},
        {"kind": "a", "x": "\ud83d" + "\ude00"},
        {"kind": "a", "x": Ellipsis},
    ],
    ids=repr,
)
def test_what_would_not_come_back_equal_is_refused_and_leaves_no_gap(tmp_path, record):
    with Journal(tmp_path) as journal:
        with pytest.raises(ValueError):
            journal.append(record)
        assert journal.append({"kind": "good"}) == 1


def test_a_record_over_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(frames, "MAX_RECORD", 100)
    with Journal(tmp_path) as journal:
        with pytest.raises(ValueError, match="over the limit of 100"):
            journal.append({"kind": "a", "x": "y" * 100})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.dictionaries(st.text(), JSON, max_size=4), max_size=5), rotate=st.booleans())
def test_any_json_comes_back_equal(tmp_path_factory, values, rotate):
    folder = tmp_path_factory.mktemp("journal")
    records = [
        {k: v for k, v in value.items() if k not in ("seq", "durable")} | {"kind": "x"} for value in values
    ]
    with Journal(folder) as journal:
        for record in records:
            journal.append(record)
            if rotate:
                journal.rotate()
    with Journal(folder) as journal:
        back = list(journal.records())
    assert back == [record | {"seq": number} for number, record in enumerate(records, 1)]
    assert canonical_json(back) == canonical_json([r | {"seq": n} for n, r in enumerate(records, 1)])


@pytest.mark.parametrize("group", [1, 3])
def test_truncation_at_every_byte_cuts_at_the_last_good_record(tmp_path, group):
    fill(tmp_path, 6, group=group)
    path = segment(tmp_path)
    data = path.read_bytes()
    ends = frame_ends(data)
    assert ends[-1] == (len(data), 6)
    for size in range(len(data)):
        path.write_bytes(data[:size])
        if size < HEADER:
            with pytest.raises(JournalDamaged, match="header"):
                Journal(tmp_path)
            continue
        good, last = max(end for end in ends if end[0] <= size)
        assert seqs(tmp_path) == list(range(1, last + 1))
        assert path.stat().st_size == size, "reading must not cut"
        with Journal(tmp_path) as journal:
            assert (journal.cut, journal.last_seq, path.stat().st_size) == (size - good, last, good)
            assert journal.append({"kind": "next"}) == last + 1
        assert seqs(tmp_path) == list(range(1, last + 2))


def test_a_flipped_bit_in_acknowledged_bytes_is_reported_wherever_it_is(tmp_path):
    fill(tmp_path, 5)
    path = segment(tmp_path)
    data = path.read_bytes()
    mark = frame_ends(data)[-2][0]
    assert data[mark + 8 :].startswith(b'{"durable"')
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :])
        if position >= mark:
            # only the last mark is hit: every record is there
            with Journal(tmp_path) as journal:
                assert (journal.last_seq, journal.cut) == (5, len(data) - mark)
            continue
        before = path.read_bytes()
        # a flip in the format number also breaks the header's checksum: damage, not "another format"
        with pytest.raises(JournalDamaged) as raised:
            Journal(tmp_path)
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)
        assert 0 <= raised.value.offset <= position
        assert path.read_bytes() == before, "a damaged file is left as it is"


def test_a_flipped_bit_in_bytes_that_were_never_acknowledged_is_a_torn_tail(tmp_path):
    fill(tmp_path, 3)
    path = segment(tmp_path)
    acknowledged = len(path.read_bytes())
    with Journal(tmp_path) as journal:
        for _ in range(3):
            journal.append({"kind": "group"})
    data = path.read_bytes()
    unmarked = data[: frame_ends(data)[-2][0]]
    for position in range(acknowledged, len(unmarked)):
        path.write_bytes(unmarked[:position] + bytes([unmarked[position] ^ 0x10]) + unmarked[position + 1 :])
        with Journal(tmp_path) as journal:
            assert 3 <= journal.last_seq < 6
            assert journal.cut > 0
    # sectors of one write may reach the disk in any order: a hole in front of intact records
    path.write_bytes(unmarked[:acknowledged] + bytes(20) + unmarked[acknowledged + 20 :])
    with Journal(tmp_path) as journal:
        assert journal.last_seq == 3


def test_damage_in_a_segment_that_is_not_the_last_is_reported(tmp_path):
    with Journal(tmp_path) as journal:
        for _ in range(3):
            journal.append({"kind": "a"})
            journal.append({"kind": "b"})
            journal.rotate()
    first = min(tmp_path.glob("journal-*.log"))
    data = first.read_bytes()
    for size in range(len(data)):
        first.write_bytes(data[:size])
        if size == frame_ends(data)[-2][0]:
            assert seqs(tmp_path) == [1, 2, 3, 4, 5, 6], "only the mark is gone"
            continue
        for readonly in (False, True):
            with pytest.raises(JournalDamaged):
                Journal(tmp_path, readonly=readonly)


def test_missing_swapped_repeated_and_renamed_parts_are_reported(tmp_path):
    with Journal(tmp_path) as journal:
        for _ in range(3):
            journal.append({"kind": "a"})
            journal.append({"kind": "a"})
            journal.rotate()
    one, two, three, four = sorted(tmp_path.glob("journal-*.log"))
    kept = {path: path.read_bytes() for path in (one, two, three, four)}
    two.unlink()
    with pytest.raises(JournalDamaged, match="starts with record 5, but the segment before it ends with 2"):
        Journal(tmp_path)
    two.write_bytes(kept[one])
    with pytest.raises(JournalDamaged, match="renamed"):
        Journal(tmp_path)
    (_, _), (a, _), (b, _), (c, _) = frame_ends(kept[two])
    for wrong in (
        kept[two][:a] + kept[two][a:b] * 2,
        kept[two][:HEADER] + kept[two][a:b] + kept[two][HEADER:a],
    ):
        two.write_bytes(wrong + kept[two][b:c])
        with pytest.raises(JournalDamaged, match="belongs"):
            Journal(tmp_path)


def test_garbage_lengths_allocate_nothing(tmp_path):
    fill(tmp_path, 1)
    path = segment(tmp_path)
    for length in (2**32 - 1, 2**31, frames.MAX_RECORD + 1, 1000):
        with path.open("ab") as file:
            file.write(struct.pack("<II", length, 0) + b"x" * 500)
        tracemalloc.start()
        with Journal(tmp_path) as journal:
            assert (journal.last_seq, journal.cut) == (1, 508)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2**20


def test_text_that_imitates_a_mark_is_not_taken_for_one(tmp_path):
    fake = b'{"durable":99}'
    with Journal(tmp_path) as journal:
        journal.append({"kind": "a"})
        journal.sync()
        whole = segment(tmp_path).stat().st_size
        journal.append(
            {
                "kind": "b",
                "text": f"{struct.pack('<II', 14, zlib.crc32(fake) & 0x7F7F7F7F).decode()}{fake.decode()}",
            }
        )
        journal.append({"kind": "c", "text": fake.decode()})
    path = segment(tmp_path)
    data = bytearray(path.read_bytes()[: frame_ends(path.read_bytes())[-2][0]])
    data[whole + 4] ^= 1
    path.write_bytes(data)
    with Journal(tmp_path) as journal:
        assert journal.last_seq == 1


def test_another_format_is_refused_by_name(tmp_path):
    fill(tmp_path, 1)
    path = segment(tmp_path)
    data = path.read_bytes()
    fields = data[:8] + struct.pack("<I", 2) + data[12:20]
    path.write_bytes(fields + struct.pack("<I", zlib.crc32(fields)) + data[24:])
    with pytest.raises(ValueError, match="format 2, this release reads 1") as raised:
        Journal(tmp_path)
    assert not isinstance(raised.value, JournalDamaged)


def test_random_files_never_open_and_never_crash(tmp_path):
    rng = random.Random(5)
    path = tmp_path / f"journal-{1:020d}.log"
    for _ in range(300):
        path.write_bytes(rng.randbytes(rng.randrange(200)))
        with pytest.raises(JournalDamaged):
            Journal(tmp_path)


def test_asking_for_records_that_are_gone_is_an_error(tmp_path):
    with Journal(tmp_path) as journal:
        for _ in range(4):
            journal.append({"kind": "a"})
            journal.rotate()
        assert journal.drop_before(2) == 2
        assert [r["seq"] for r in journal.records(2)] == [3, 4]
        with pytest.raises(JournalDamaged, match="starts with record 3, 2 was asked for"):
            journal.records(1)
        with pytest.raises(JournalDamaged, match="ends with record 4, but record 9 was acknowledged"):
            journal.records(9)


def test_rotation_and_drop_keep_the_numbers_going(tmp_path):
    with Journal(tmp_path) as journal:
        journal.rotate()
        assert len(list(tmp_path.glob("journal-*.log"))) == 1, "an empty segment is not rotated"
        for _ in range(3):
            journal.append({"kind": "a"})
        journal.rotate()
        journal.append({"kind": "b"})
        journal.sync()
        assert journal.drop_before(2) == 0, "record 3 is in the same segment"
        assert journal.drop_before(100) == 1, "the segment being written stays"
    assert sorted(path.name for path in tmp_path.glob("journal-*")) == [f"journal-{4:020d}.log"]
    with Journal(tmp_path) as journal:
        journal.rotate()
        assert journal.drop_before(4) == 1
    with Journal(tmp_path) as journal:
        assert journal.last_seq == 4
        assert journal.append({"kind": "c"}) == 5


def test_a_segment_is_synced_to_its_last_byte_before_the_next_one_exists(tmp_path, monkeypatch):
    synced = {}

    def record(descriptor):
        synced[os.fstat(descriptor).st_ino] = (
            os.fstat(descriptor).st_size,
            len(list(tmp_path.glob("journal-*.log"))),
        )

    with Journal(tmp_path) as journal:
        first = segment(tmp_path)
        journal.append({"kind": "a"})
        monkeypatch.setattr(os, "fsync", record)
        journal.rotate()
        assert synced[first.stat().st_ino] == (first.stat().st_size, 1)
        assert synced[tmp_path.stat().st_ino][1] == 2, "the folder is synced after the rename"


def test_a_failed_fsync_ends_the_journal(tmp_path, monkeypatch):
    journal = Journal(tmp_path)
    journal.append({"kind": "kept"})
    journal.sync()
    journal.append({"kind": "lost"})

    def fail(descriptor):
        raise OSError(errno.EIO, "planted")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(JournalFailed, match="records after 1 are not acknowledged"):
            journal.sync()
    # the next fsync would report success for pages that the kernel has thrown away
    for call in (
        journal.sync,
        journal.rotate,
        lambda: journal.append({"kind": "x"}),
        lambda: journal.drop_before(1),
    ):
        with pytest.raises(JournalFailed):
            call()
    journal.close()
    with Journal(tmp_path) as again:
        assert [record["kind"] for record in again.records()] == ["kept"]
        assert again.cut == 0
        assert again.append({"kind": "new"}) == 2


def test_a_full_disk_gives_no_acknowledgement_and_learning_goes_on_after_it(tmp_path, monkeypatch):
    real = os.write
    with Journal(tmp_path) as journal:
        journal.append({"kind": "a"})
        journal.sync()
        size = segment(tmp_path).stat().st_size
        room = [30]

        def full(descriptor, data):
            if not room[0]:
                raise OSError(errno.ENOSPC, "planted")
            written = real(descriptor, bytes(data[: room[0]]))
            room[0] -= written
            return written

        journal.append({"kind": "b", "text": "x" * 100})
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            for _ in range(2):
                with pytest.raises(OSError, match="planted"):
                    journal.sync()
                assert ([r["seq"] for r in journal.records()], segment(tmp_path).stat().st_size) == ([1], size)
                room[0] = 17
        journal.append({"kind": "c"})
        assert journal.sync() == 3
        assert [record["kind"] for record in journal.records()] == ["a", "b", "c"]
    assert seqs(tmp_path) == [1, 2, 3]


def test_a_mark_that_does_not_fit_on_the_disk_costs_no_record(tmp_path, monkeypatch):
    real = os.write

    def no_mark(descriptor, data):
        if b"durable" in bytes(data):
            real(descriptor, bytes(data[:9]))
            raise OSError(errno.ENOSPC, "planted")
        return real(descriptor, data)

    with Journal(tmp_path) as journal:
        monkeypatch.setattr(os, "write", no_mark)
        for number in (1, 2):
            journal.append({"kind": "a"})
            assert journal.sync() == number
    assert seqs(tmp_path) == [1, 2]
    with Journal(tmp_path) as journal:
        assert journal.cut == 0


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_a_rotation_that_fails_at_any_call_leaves_a_journal_that_opens(tmp_path, monkeypatch, call):
    """With all that was acknowledged, after it too: what goes on in the old segment is not behind an empty new one."""
    for nth in range(1, 6):
        folder = tmp_path / str(nth)
        journal = Journal(folder)
        journal.append({"kind": "a"})
        journal.sync()
        real, calls = getattr(os, call), [0]

        def fail(*args, real=real, calls=calls, nth=nth):
            calls[0] += 1
            if calls[0] == nth:
                raise OSError(errno.EIO, "planted")
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            try:
                journal.rotate()
                finished = True
            except OSError:
                finished = False
        acknowledged = [1]
        try:
            acknowledged.append(journal.append({"kind": "b"}))
            journal.sync()
            journal.rotate()
        except JournalFailed:
            acknowledged = [1]
        journal.close()
        with Journal(folder) as again:
            assert [record["seq"] for record in again.records()] == acknowledged
            assert not list(folder.glob(".tmp*"))
            assert again.append({"kind": "c"}) == len(acknowledged) + 1
        if finished:
            break
    assert finished and nth > 1


def test_only_one_writer_and_any_number_of_readers(tmp_path):
    with Journal(tmp_path) as journal:
        with pytest.raises(JournalLocked, match=f"in use by process {os.getpid()}"):
            Journal(tmp_path)
        journal.append({"kind": "a"})
        journal.sync()
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        assert seqs(tmp_path) == seqs(tmp_path) == [1]
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
        with Journal(tmp_path, readonly=True) as reader, pytest.raises(ValueError, match="reading only"):
            reader.append({"kind": "x"})
    with pytest.raises(ValueError, match="closed"):
        journal.append({"kind": "x"})
    Journal(tmp_path).close()
    with pytest.raises(FileNotFoundError):
        Journal(tmp_path / "nowhere", readonly=True)


def test_the_lock_is_free_after_close_although_a_forked_child_lives(tmp_path):
    journal = Journal(tmp_path)
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    try:
        journal.close()
        Journal(tmp_path).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def write_until_killed(folder, acknowledgements):
    """Child process: appends in groups, rotates and drops, and reports each durable number by a pipe."""
    rng = random.Random(os.getpid())
    journal = Journal(folder)
    while True:
        for _ in range(rng.randrange(1, 5)):
            journal.append({"kind": "a", "text": "x" * rng.randrange(3000)})
        os.write(acknowledgements, struct.pack("<Q", journal.sync()))
        if rng.random() < 0.1:
            journal.rotate()
            journal.drop_before(journal.last_seq - 50)


def test_nothing_acknowledged_is_lost_when_the_writer_is_killed(tmp_path):
    rng = random.Random(3)
    acknowledged = 0
    for trial in range(30):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(read)
                write_until_killed(tmp_path, write)
            finally:
                os._exit(1)
        os.close(write)
        # every other child gets far enough to acknowledge something, on a slow machine too
        data = os.read(read, 8) if trial % 2 else b""
        time.sleep(rng.uniform(0.001, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(read, "rb") as pipe:
            data += pipe.read()
        if len(data) >= 8:
            acknowledged = struct.unpack("<Q", data[len(data) // 8 * 8 - 8 : len(data) // 8 * 8])[0]
        with Journal(tmp_path) as journal:
            assert journal.last_seq >= acknowledged
            first = int(min(tmp_path.glob("journal-*.log")).name[8:28])
            assert [r["seq"] for r in journal.records(first - 1)] == list(range(first, journal.last_seq + 1))
            acknowledged = journal.last_seq
    assert acknowledged >= 15
