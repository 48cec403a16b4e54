"""Snapshots of the learner's state: generations on disk that are there wholly or not at all.

A generation is a folder `snapshot-<version>` with `state.safetensors` and `state.json`: format number,
version, meta, size and sha256 of the tensor file, and a sha256 of all that. It is written under a temporary
name, fsynced, and renamed; nothing that exists is ever written to. Saving a version again makes
`snapshot-<version>.1` (then .2, ...), and the older one goes once the new one reads back valid. Loading never
unpickles: safetensors and JSON only.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from ogpstream.memory.canonical import canonical_json
from ogpstream.memory.files import fsync_folder, write_file

FORMAT = 1
TENSORS, STATE, PINS = "state.safetensors", "state.json", "pins.json"
# meta is counters, names and RNG state; a larger file is garbage, and is not read
MAX_JSON = 64 * 2**20

_NAME = re.compile(r"snapshot-(0|[1-9]\d*)(?:\.([1-9]\d*))?")
_TEMPORARY = ".tmp-snapshot"
_CHUNK = 2**20

logger = logging.getLogger(__name__)


class SnapshotDamaged(ValueError):
    """No valid snapshot where one was asked for; says what is wrong with each."""


class SnapshotFormat(ValueError):
    """A valid snapshot of another release's format: refused, not skipped."""


class Snapshot(NamedTuple):
    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    version: int


class _Generation(NamedTuple):
    version: int
    edition: int  # 0 for the first save of this version

    @property
    def name(self) -> str:
        return f"snapshot-{self.version}" + (f".{self.edition}" if self.edition else "")


class SnapshotStore:
    """The generations of one folder. The writer must be alone: it holds the journal's lock, which this class
    does not take.

    `keep` newest versions stay, and the pinned ones. `problems` lists, one line each, what the last `load`
    or `save` found damaged; the same lines are logged as warnings. `readonly=True` sweeps
    nothing and refuses to write.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 2, readonly: bool = False):
        if keep < 1:
            raise ValueError(f"keep = {keep}: at least one snapshot must stay")
        self.folder = Path(folder)
        self.keep = keep
        self.readonly = readonly
        self.problems: list[str] = []
        if not readonly:
            self.folder.mkdir(parents=True, exist_ok=True)
            fsync_folder(self.folder.parent)
            for left in self.folder.glob(f"{_TEMPORARY}*"):
                _remove(left)

    def save(self, version: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
        """Write one generation and return its folder; it is on the disk, and was read back, when this
        returns.

        Tensors may be views, share storage, or lie on any device; they come back as separate contiguous CPU
        tensors. On an error (OSError; ValueError for a meta that is not plain JSON) the generations before it
        are untouched.
        """
        self._check_writable()
        self.problems = []
        if version < 0:
            raise ValueError(f"version {version}: versions count from 0")
        data = tensors_to_bytes(_separate(tensors))
        state: dict[str, Any] = {
            "format": FORMAT,
            "version": version,
            "meta": dict(meta),
            "tensors_bytes": len(data),
            "tensors_sha256": hashlib.sha256(data).hexdigest(),
        }
        text = _sealed(state)
        if len(text) > MAX_JSON:
            raise ValueError(f"meta of {len(text)} bytes is over the limit of {MAX_JSON}; store large parts as tensors")
        same = [g.edition for g in self._generations() if g.version == version]
        generation = _Generation(version, max(same) + 1 if same else 0)
        temporary, final = self.folder / f"{_TEMPORARY}-{generation.name}", self.folder / generation.name
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            write_file(temporary / TENSORS, data)
            write_file(temporary / STATE, text)
            fsync_folder(temporary)
            os.replace(temporary, final)
            fsync_folder(self.folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        try:
            self._verify(generation)
        except (SnapshotDamaged, OSError) as error:
            self._discard(generation)
            raise OSError(f"{final}: does not read back what was written ({error}); check the disk") from error
        self._retire(version)
        return final

    def load(self, version: int | None = None) -> Snapshot | None:
        """The newest valid snapshot, or the newest valid one of `version`; None when the folder has no
        snapshot at all.

        Damaged ones are passed over and listed in `problems`. Raises SnapshotDamaged when none is valid,
        SnapshotFormat.
        """
        self.problems = []
        candidates = [g for g in self._generations() if version is None or g.version == version]
        for generation in candidates:
            try:
                state = self._state(generation)
                data = self._tensor_file(generation, state).read_bytes()
                if hashlib.sha256(data).hexdigest() != state["tensors_sha256"]:
                    raise SnapshotDamaged(f"{generation.name}/{TENSORS}: the checksum does not match")
                return Snapshot(tensors_from_bytes(data), state["meta"], generation.version)
            except (SnapshotDamaged, SafetensorError, OSError) as error:
                self._note(error)
        if candidates:
            raise SnapshotDamaged(
                f"{self.folder}: no valid snapshot: {'; '.join(self.problems)}; restore one from a copy"
            )
        if version is not None:
            kept = ", ".join(map(str, self.versions())) or "none"
            raise SnapshotDamaged(f"{self.folder}: no snapshot of version {version}; there are: {kept}")
        return None

    def meta(self, version: int) -> dict[str, Any] | None:
        """The JSON values of the newest readable snapshot of `version`, without its tensors; None if there is none."""
        for generation in (g for g in self._generations() if g.version == version):
            try:
                meta: dict[str, Any] = self._state(generation)["meta"]
                return meta
            except (SnapshotDamaged, OSError) as error:
                self._note(error)
        return None

    def versions(self) -> list[int]:
        """Versions that have a snapshot, ascending, whether valid or not."""
        return sorted({g.version for g in self._generations()})

    def pins(self) -> dict[str, int]:
        """Name -> version that is kept for it. Raises SnapshotDamaged when the list of pins cannot be
        read."""
        path = self.folder / PINS
        return _unsealed(path, PINS, {"pins"})["pins"] if path.exists() else {}

    def pin(self, version: int, name: str) -> None:
        """Keep `version` under `name` until that names another one.

        Raises SnapshotDamaged when `version` has no valid snapshot.
        """
        self._check_writable()
        faults = []
        for generation in (g for g in self._generations() if g.version == version):
            try:
                self._verify(generation)
                break
            except (SnapshotDamaged, OSError) as error:
                faults.append(str(error))
        else:
            why = "; ".join(faults) or f"there are: {', '.join(map(str, self.versions())) or 'none'}"
            raise SnapshotDamaged(f"{self.folder}: no valid snapshot of version {version} to pin as {name!r}: {why}")
        self._write_pins(self.pins() | {name: version})

    def _generations(self) -> list[_Generation]:
        """Newest first."""
        found = (_NAME.fullmatch(name) for name in os.listdir(self.folder))
        return sorted((_Generation(int(m[1]), int(m[2] or 0)) for m in found if m), reverse=True)

    def _state(self, generation: _Generation) -> dict[str, Any]:
        path = self.folder / generation.name / STATE
        state = _unsealed(path, f"{generation.name}/{STATE}", {"version", "meta", "tensors_bytes", "tensors_sha256"})
        if state["version"] != generation.version:
            raise SnapshotDamaged(f"{generation.name}: holds version {state['version']}, the folder was renamed")
        return state

    def _tensor_file(self, generation: _Generation, state: dict[str, Any]) -> Path:
        path = self.folder / generation.name / TENSORS
        # before reading: a file of another size is not even loaded into memory
        size = path.stat().st_size
        if size != state["tensors_bytes"]:
            raise SnapshotDamaged(f"{generation.name}/{TENSORS}: {size} bytes instead of {state['tensors_bytes']}")
        return path

    def _verify(self, generation: _Generation) -> None:
        state = self._state(generation)
        digest = hashlib.sha256()
        with self._tensor_file(generation, state).open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        if digest.hexdigest() != state["tensors_sha256"]:
            raise SnapshotDamaged(f"{generation.name}/{TENSORS}: the checksum does not match")

    def _retire(self, saved: int) -> None:
        """Remove what is neither pinned nor among the `keep` newest valid versions; `saved` is valid."""
        try:
            wanted = set(self.pins().values())
        except SnapshotDamaged as error:
            self._note(f"{error}; nothing is removed until it is deleted or pinned anew")
            return
        valid: set[int] = set()
        for generation in self._generations():
            useful = generation.version not in valid and (len(valid) < self.keep or generation.version in wanted)
            try:
                if useful:
                    if generation.version != saved:
                        self._verify(generation)
                    valid.add(generation.version)
                else:
                    self._discard(generation)
            except (SnapshotDamaged, SnapshotFormat, OSError) as error:
                # a damaged one stays for inspection, without a place among the kept, until enough newer ones
                # are valid
                self._note(error)

    def _discard(self, generation: _Generation) -> None:
        # renamed first: a crash while files are being deleted leaves no half generation under a valid name
        away = self.folder / f"{_TEMPORARY}-old-{generation.name}"
        shutil.rmtree(away, ignore_errors=True)
        os.replace(self.folder / generation.name, away)
        _remove(away)

    def _write_pins(self, pins: dict[str, int]) -> None:
        temporary = self.folder / f"{_TEMPORARY}-{PINS}"
        write_file(temporary, _sealed({"format": FORMAT, "pins": pins}))
        os.replace(temporary, self.folder / PINS)
        fsync_folder(self.folder)

    def _check_writable(self) -> None:
        if self.readonly:
            raise ValueError(f"{self.folder}: the snapshots are open for reading only")

    def _note(self, problem: object) -> None:
        self.problems.append(str(problem))
        logger.warning("%s: %s", self.folder, problem)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors of which no two share storage, as safetensors wants them; copied only where
    needed."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu()
        if not tensor.is_contiguous() or tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(tensor.untyped_storage().data_ptr())
        separate[name] = tensor
    return separate


def _sealed(value: dict[str, Any]) -> bytes:
    """Canonical JSON of `value` with the sha256 of that as one more key."""
    return canonical_json(value | {"sha256": hashlib.sha256(canonical_json(value)).hexdigest()})


def _unsealed(path: Path, label: str, keys: set[str]) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON:
            raise SnapshotDamaged(f"{label}: larger than {MAX_JSON} bytes")
        text = path.read_bytes()
        value = json.loads(text)
        if not isinstance(value, dict) or _sealed({k: v for k, v in value.items() if k != "sha256"}) != text:
            raise SnapshotDamaged(f"{label}: the checksum does not match")
    except FileNotFoundError:
        raise SnapshotDamaged(f"{label}: missing") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, SnapshotDamaged):
            raise
        raise SnapshotDamaged(f"{label}: not JSON") from None
    if value.get("format") != FORMAT:
        raise SnapshotFormat(
            f"{path}: format {value.get('format')!r}, this release reads {FORMAT}; use the one that wrote it"
        )
    if value.keys() != keys | {"format", "sha256"}:
        raise SnapshotDamaged(f"{label}: has the keys {sorted(value)}")
    return value


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
