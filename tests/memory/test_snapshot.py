import errno
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import struct
import time

import pytest
import torch

from ogpstream.memory.canonical import canonical_hash, canonical_json
from ogpstream.memory.snapshot import SnapshotDamaged, SnapshotFormat, SnapshotStore

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _no_disk():
    """SIGKILL does not touch the page cache, so the disk's latency would only make this slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def state(version):
    generator = torch.Generator().manual_seed(version)
    slab = torch.randn(12, generator=generator)
    tensors = {
        "slab": slab,
        "view": slab[3:9].view(2, 3),
        "transposed": slab[:6].view(2, 3).T,
        "bf16": slab.to(torch.bfloat16),
        "ids": torch.tensor([[0, 65535], [1, version]]).to(torch.uint16),
        "empty": torch.empty(0, 4, dtype=torch.bfloat16),
        "empty2": torch.empty(3, 0),
        "scalar": torch.tensor(version),
        "flags": torch.tensor([True, False]),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "grad": torch.ones(2, requires_grad=True),
    }
    return tensors, {"journal": version * 10, "medians": [0.1, 1e-300], "name": "é"}


def saved(store, *versions):
    for version in versions:
        store.save(version, *state(version))
    return store


def check(snapshot, version):
    tensors, meta = state(version)
    assert snapshot is not None and snapshot.version == version and snapshot.meta == meta
    assert canonical_hash(snapshot.tensors, snapshot.meta) == canonical_hash(tensors, meta)


def test_every_kind_of_tensor_comes_back_bit_for_bit(tmp_path):
    tensors, meta = state(7)
    path = SnapshotStore(tmp_path / "a" / "b").save(7, tensors, meta)
    assert path == tmp_path / "a" / "b" / "snapshot-7"
    back, meta_back, version = SnapshotStore(tmp_path / "a" / "b").load()
    assert (version, meta_back, back.keys()) == (7, meta, tensors.keys())
    for name, tensor in tensors.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(
            back[name].nan_to_num() if name == "nan" else back[name],
            tensor.nan_to_num() if name == "nan" else tensor,
        )
        assert back[name].is_contiguous()
    back["view"].zero_()
    assert back["slab"].count_nonzero() == 12, "no shared storage after loading"
    assert tensors["view"].data_ptr() == tensors["slab"][3:].data_ptr(), "the caller's views are left alone"


def test_an_empty_folder_has_nothing_and_an_unknown_version_is_named(tmp_path):
    store = SnapshotStore(tmp_path)
    assert (store.load(), store.versions(), store.pins()) == (None, [], {})
    saved(store, 3)
    with pytest.raises(SnapshotDamaged, match="no snapshot of version 4; there are: 3"):
        store.load(4)
    with pytest.raises(FileNotFoundError):
        SnapshotStore(tmp_path / "nowhere", readonly=True).load()


def test_retention_keeps_the_newest_and_the_pinned(tmp_path):
    store = saved(SnapshotStore(tmp_path), 1, 2)
    store.pin(1, "last-known-good")
    store.pin(2, "before the merge")
    saved(store, 9, 10, 11)
    assert store.versions() == [1, 2, 10, 11]
    store.pin(10, "last-known-good")
    store.pin(10, "before the merge")
    saved(store, 12, 13)
    assert SnapshotStore(tmp_path).versions() == [10, 12, 13]
    assert SnapshotStore(tmp_path, readonly=True).pins() == {"last-known-good": 10, "before the merge": 10}
    check(store.load(10), 10)
    check(store.load(), 13)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "pins.json",
        "snapshot-10",
        "snapshot-12",
        "snapshot-13",
    ]


def test_the_same_version_again_replaces_the_first_only_when_it_reads_back(tmp_path):
    store = saved(SnapshotStore(tmp_path, keep=1), 5)
    tensors, meta = state(5)
    path = store.save(5, tensors, meta | {"journal": 51})
    assert path.name == "snapshot-5.1"
    assert store.load().meta["journal"] == 51
    assert [p.name for p in tmp_path.iterdir()] == ["snapshot-5.1"]
    (path / "state.json").write_bytes(b"{}")
    assert store.save(5, tensors, meta).name == "snapshot-5.2"
    assert store.load().meta == meta


def corrupt(path, rng):
    data = bytearray(path.read_bytes())
    position = rng.randrange(len(data))
    match rng.randrange(4):
        case 0:
            data[position] ^= 1 << rng.randrange(8)
        case 1:
            del data[position:]
        case 2:
            data[position : position + 64] = bytes(64)
            data[position] ^= 0xFF
        case 3:
            data.insert(position, rng.randrange(256))
    path.write_bytes(data)


def test_a_damaged_newest_falls_back_and_says_so(tmp_path, caplog):
    rng = random.Random(0)
    store = saved(SnapshotStore(tmp_path), 1, 2)
    whole = {path: path.read_bytes() for path in (tmp_path / "snapshot-2").iterdir()}
    for trial in range(300):
        path = sorted(whole)[trial % 2]
        corrupt(path, rng)
        if path.read_bytes() == whole[path]:
            continue
        check(store.load(), 1)
        assert len(store.problems) == 1 and "snapshot-2" in store.problems[0]
        with pytest.raises(SnapshotDamaged, match="no valid snapshot"):
            store.load(2)
        path.write_bytes(whole[path])
    assert "snapshot-2" in caplog.text
    check(store.load(), 2)
    assert store.problems == []
    for path in whole:
        path.unlink()
        check(store.load(), 1)
        path.write_bytes(whole[path])


def test_every_bit_of_the_tensor_file_is_covered(tmp_path):
    store = saved(SnapshotStore(tmp_path), 1)
    for name in ("state.safetensors", "state.json"):
        path = tmp_path / "snapshot-1" / name
        data = path.read_bytes()
        for position in range(len(data)):
            path.write_bytes(
                data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :]
            )
            with pytest.raises((SnapshotDamaged, SnapshotFormat)):
                store.load()
        path.write_bytes(data)
    check(store.load(), 1)


def test_a_damaged_one_takes_no_place_of_the_kept(tmp_path):
    store = saved(SnapshotStore(tmp_path), 1, 2)
    (tmp_path / "snapshot-2" / "state.safetensors").write_bytes(b"")
    saved(store, 3)
    assert store.versions() == [1, 2, 3]
    assert "snapshot-2/state.safetensors: 0 bytes" in store.problems[0]
    saved(store, 4)
    assert store.versions() == [3, 4]


def seal(value):
    return canonical_json(value | {"sha256": hashlib.sha256(canonical_json(value)).hexdigest()})


def test_other_formats_pickles_and_strange_json_are_refused(tmp_path):
    store = saved(SnapshotStore(tmp_path), 1, 2)
    path = tmp_path / "snapshot-2" / "state.json"
    good = json.loads(path.read_bytes())
    del good["sha256"]
    path.write_bytes(seal(good | {"format": 2}))
    with pytest.raises(SnapshotFormat, match="format 2, this release reads 1"):
        store.load()

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "unpickled"),)

    data = pickle.dumps(Trap())
    (tmp_path / "snapshot-2" / "state.safetensors").write_bytes(data)
    size = {"tensors_bytes": len(data), "tensors_sha256": hashlib.sha256(data).hexdigest()}
    path.write_bytes(seal(good | size))
    check(store.load(), 1)
    assert not (tmp_path / "unpickled").exists()

    for text in (
        b"",
        b"[]",
        b"null",
        b"[" * 100_000,
        b"\xff",
        b'{"format":1}',
        seal({"format": 1}),
        seal(good | {"version": 3}),
    ):
        path.write_bytes(text)
        check(store.load(), 1)
        assert len(store.problems) == 1 and len(store.problems[0]) < 300


@pytest.mark.parametrize(
    "meta", [{"x": float("nan")}, {"x": (1,)}, {1: 2}, {"x": "\ud800"}, {"x": torch.ones(1)}], ids=repr
)
def test_a_meta_that_is_not_plain_json_is_refused_before_anything_is_written(tmp_path, meta):
    store = saved(SnapshotStore(tmp_path), 1)
    with pytest.raises(ValueError):
        store.save(2, {}, meta)
    assert [path.name for path in tmp_path.iterdir()] == ["snapshot-1"]


@pytest.mark.parametrize("call", ["fsync", "replace", "write", "mkdir", "open"])
def test_an_error_at_any_call_of_a_save_leaves_a_valid_state(tmp_path, monkeypatch, call):
    real = getattr(os, call)
    for nth in range(1, 40):
        folder = tmp_path / str(nth)
        store = saved(SnapshotStore(folder), 1, 2)
        store.pin(1, "good")
        calls = 0

        def fail(*args, nth=nth, **options):
            nonlocal calls
            calls += 1
            if calls == nth:
                raise OSError(errno.EIO, "planted")
            return real(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            try:
                saved(store, 3)
                acknowledged = True
            except OSError:
                acknowledged = False
        fresh = SnapshotStore(folder)
        assert not list(folder.glob(".tmp*"))
        assert {1, 2} <= set(fresh.versions())
        newest = fresh.load().version
        assert newest == 3 if acknowledged else newest in (2, 3)
        check(fresh.load(), newest)
        check(fresh.load(2), 2)
        saved(store, 4)
        check(SnapshotStore(folder).load(), 4)
        if calls < nth:
            break
    assert acknowledged and nth > 1


def test_nothing_is_removed_before_the_new_one_has_been_read_back(tmp_path, monkeypatch):
    store = saved(SnapshotStore(tmp_path, keep=1), 1)
    real = os.replace

    def rotten(source, target):
        real(source, target)
        if str(target).endswith("snapshot-2"):
            with open(target / "state.safetensors", "r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\x55")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", rotten)
        with pytest.raises(OSError, match="does not read back"):
            saved(store, 2)
    assert store.versions() == [1]
    check(store.load(), 1)


def test_pins_refuse_what_is_not_valid_and_unreadable_pins_stop_removal(tmp_path):
    store = saved(SnapshotStore(tmp_path), 1, 2)
    with pytest.raises(
        SnapshotDamaged, match="no valid snapshot of version 7 to pin as 'x': there are: 1, 2"
    ):
        store.pin(7, "x")
    shutil.copytree(tmp_path / "snapshot-1", tmp_path / "snapshot-8")
    with pytest.raises(SnapshotDamaged, match="holds version 1, the folder was renamed"):
        store.pin(8, "x")
    shutil.rmtree(tmp_path / "snapshot-8")
    store.pin(1, "good")
    pins = tmp_path / "pins.json"
    pins.write_bytes(pins.read_bytes().replace(b'"good":1', b'"good":2'))
    with pytest.raises(SnapshotDamaged, match="pins.json"):
        store.pins()
    saved(store, 3, 4)
    assert store.versions() == [1, 2, 3, 4]
    assert "nothing is removed" in store.problems[0]
    pins.unlink()
    saved(store, 5)
    assert store.versions() == [4, 5]


def test_a_removal_that_stops_half_way_leaves_no_half_generation(tmp_path, monkeypatch):
    store = saved(SnapshotStore(tmp_path), 1, 2)

    def half(path, ignore_errors=False):
        if os.path.exists(path):
            os.unlink(os.path.join(path, "state.json"))
            raise OSError(errno.EIO, "planted")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        saved(store, 3)
    assert "planted" in store.problems[0]
    assert store.versions() == [2, 3]
    SnapshotStore(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["snapshot-2", "snapshot-3"]


def test_a_reader_changes_nothing(tmp_path):
    saved(SnapshotStore(tmp_path), 1)
    (tmp_path / ".tmp-snapshot-2").mkdir()
    reader = SnapshotStore(tmp_path, readonly=True)
    check(reader.load(), 1)
    for call in (lambda: reader.save(2, {}, {}), lambda: reader.pin(1, "x")):
        with pytest.raises(ValueError, match="reading only"):
            call()
    assert (tmp_path / ".tmp-snapshot-2").exists()
    SnapshotStore(tmp_path)
    assert not (tmp_path / ".tmp-snapshot-2").exists()


def save_until_killed(folder, acknowledgements):
    store = SnapshotStore(folder)
    newest = store.load()
    version = newest.version + 1 if newest else 1
    while True:
        store.save(version, {"x": torch.full((20_000,), version)}, {"version": version})
        os.write(acknowledgements, struct.pack("<Q", version))
        if version % 5 == 0:
            store.pin(version, "good")
        version += 1


def test_a_valid_snapshot_survives_every_kill(tmp_path):
    rng = random.Random(1)
    newest = 0
    for trial in range(30):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(read)
                save_until_killed(tmp_path, write)
            finally:
                os._exit(1)
        os.close(write)
        # every other child gets far enough to acknowledge something, on a slow machine too
        data = os.read(read, 8) if trial % 2 else b""
        time.sleep(rng.uniform(0.002, 0.04))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(read, "rb") as pipe:
            data += pipe.read()
        acknowledged = struct.unpack_from("<Q", data, len(data) // 8 * 8 - 8)[0] if len(data) >= 8 else newest
        store = SnapshotStore(tmp_path)
        snapshot = store.load()
        assert store.problems == []
        newest = snapshot.version if snapshot else 0
        assert newest >= acknowledged
        if snapshot:
            assert snapshot.tensors["x"].unique().tolist() == [snapshot.meta["version"]] == [newest]
        for version in store.pins().values():
            assert store.load(version) is not None
    assert newest >= 15
    store.save(newest + 1, {}, {})
    assert set(store.versions()) == {newest, newest + 1, *store.pins().values()}
