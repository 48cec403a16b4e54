"""Adapters as PEFT folders, written and read by PEFT's own code."""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from ogpstream.learner.errors import ModelError, StateError
from ogpstream.learner.sites import Attachment

_log = logging.getLogger(__name__)

_CARD = "README.md"
_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_UNREADABLE = (SafetensorError, UnpicklingError)
_PREFIX = "base_model.model."

_EXPORTED = "Exported by `ogp-lora-stream`: "
# the last line of a card: it proves that the card, or the files beside it, are as they were written
_SEAL = "<!-- sha256 of the text above: {}, of the adapter beside it: {} -->\n"
_SEALED = re.compile("(?P<text>.*\n)" + _SEAL.format("(?P<card>[0-9a-f]{64})", "(?P<adapter>[0-9a-f]{64})"), re.DOTALL)

# what makes an adapter more than y += scaling x A B
_EXTRAS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
# initialisations that leave the base weights alone; the others (pissa, olora, corda, ...) subtract from them
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class ImportedAdapter:
    """A LoRA adapter read from a PEFT folder: y += scaling x A B at each site.

    `factors` has one (A `[D_in, rank]`, B `[rank, D_out]`) per site of the attachment, float32 or wider, and
    None where the adapter has none. Sites of lower rank are padded by zeros in A and B, which stay zero.
    """

    rank: int
    scaling: float
    factors: list[tuple[Tensor, Tensor] | None]


def export_adapter(
    folder: str | os.PathLike[str],
    *,
    model: PreTrainedModel,
    attachment: Attachment,
    factors: Sequence[tuple[Tensor, Tensor]],
    base_model_name: str,
    about: str = "",
    replace: bool = False,
) -> None:
    """Write one LoRA adapter y += x A B that plain PEFT loads.

    The adapter appears complete under its name or not at all. All else that is in its folder stays as it is.

    Args:
        factors: A `[D_in, R]`, B `[R, D_out]` per site, all scaling in B: A = [A | U], B = [scaling B ; V].
            R may differ between sites; the folder has the largest one.
        base_model_name: path or id of the base model, written into the adapter's configuration.
        about: what the model card says of where the adapter comes from.
        replace: an adapter that is there, but for a model card that is not as it was exported.

    Raises:
        StateError: the folder holds something else than an adapter, or cannot be written.
        ModelError: a copy of the model built from its configuration has other linears than the model.
    """
    target = Path(os.path.realpath(folder))
    # without its configuration where a kill ended an export
    replaces = (target / _CONFIG).is_file() or _own_card(target) is not None
    if target.exists() and not replaces and (not target.is_dir() or any(target.iterdir())):
        raise StateError(f"{folder} exists and is no PEFT adapter: choose another folder")
    if replaces and not replace:
        raise StateError(f"{folder} holds an adapter already: choose another folder, or replace it "
                         "(replace=True, --force)")
    rank = max([1, *(A.shape[1] for A, _ in factors)])
    weights = {}
    for site, (A, B) in zip(attachment.sites, factors, strict=True):
        weights[f"{_PREFIX}{site.name}.lora_A.default.weight"] = _padded(A.T, rank, 0)
        weights[f"{_PREFIX}{site.name}.lora_B.default.weight"] = _padded(B.T, rank, 1)
    # modules without memory: PEFT needs their names and shapes, and names the base model after the attribute
    with torch.device("meta"):
        skeleton = type(model)(copy.deepcopy(model.config))
    skeleton.name_or_path = base_model_name
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=attachment.target_modules,
        fan_in_fan_out=any(site.module.fan_in_fan_out for site in attachment.sites),
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(skeleton, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
    # not by set_peft_model_state_dict, which moves the factors to the device of the base weights, meta
    result = adapted.load_state_dict(weights, strict=False, assign=True)
    wrong = [*result.unexpected_keys, *(key for key in result.missing_keys if ".lora_" in key)]
    if wrong:
        raise ModelError(
            f"{type(model).__name__} built from its configuration has other linears than the model itself "
            f"({wrong[0]}): the adapter cannot be exported"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            fresh = Path(scratch, "new")
            adapted.save_pretrained(str(fresh), save_embedding_layers=False)
            card = _card(base_model_name, config, about)
            # PEFT's own is a form to fill in
            (fresh / _CARD).write_bytes((card + _SEAL.format(_sha256(card), _adapter_sha256(fresh))).encode())
            if replaces:
                _swap(target, fresh, Path(scratch))
            else:
                fresh.rename(target)
    except OSError as error:
        raise StateError(f"cannot write the adapter to {folder}: {error.strerror or error}; choose another "
                         "folder") from error


def _swap(target: Path, fresh: Path, scratch: Path) -> None:
    """Put the files of an adapter in the place of another one's, one by one.

    The configuration goes first and comes last, but for the card: without it a folder holds no adapter.
    """
    files = [_CONFIG, _WEIGHTS[0]]
    old = scratch / "old"
    old.mkdir()
    theirs = (target / _CARD).exists() and _own_card(target) is None
    try:
        for name in files:
            if (target / name).is_file():
                (target / name).rename(old / name)
        for name in reversed(files):
            (fresh / name).rename(target / name)
        if not theirs:
            (fresh / _CARD).replace(target / _CARD)
    except BaseException:
        for name in files:
            # the new ones go in the order in which the old ones went
            if not (fresh / name).exists():
                (target / name).unlink()
        for name in reversed(files):
            if (old / name).exists():
                (old / name).replace(target / name)
        raise
    if theirs:
        _log.warning("%s is not as it was exported: it stays, and does not tell of the new adapter", target / _CARD)


def adapters_in(folder: Path) -> list[Path]:
    """The folders of adapters inside a folder, which may be one too."""
    return [inner for inner in folder.iterdir() if (inner / _CONFIG).is_file()]


def remove_export(folder: Path, about: str) -> None:
    """Remove an adapter if `export_adapter` wrote it, `about` something that begins so, and it was not changed since.

    Other files in its folder stay.

    Raises:
        StateError: it cannot be removed.
    """
    try:
        own = _own_card(folder)
        if own is None or folder.is_symlink() or f"\n{_EXPORTED}{about}" not in own["text"]:
            return
        if not (folder / _WEIGHTS[0]).is_file() or own["adapter"] != _adapter_sha256(folder):
            return
        # first what makes it an adapter
        for name in (_CONFIG, _WEIGHTS[0], _CARD):
            (folder / name).unlink()
        if not any(folder.iterdir()):
            folder.rmdir()
    except OSError as error:
        raise StateError(f"cannot remove {folder}, an earlier export: {error.strerror or error}; "
                         "remove it by hand") from error


def _own_card(folder: Path) -> re.Match[str] | None:
    """The card in a folder, taken apart, if `export_adapter` wrote it and nobody has changed it since."""
    try:
        found = _SEALED.fullmatch((folder / _CARD).read_bytes().decode())
    except (OSError, UnicodeDecodeError):
        return None
    return found if found and found["card"] == _sha256(found["text"]) else None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _adapter_sha256(folder: Path) -> str:
    """Of the configuration and the weights, one after the other."""
    digest = hashlib.sha256()
    for name in (_CONFIG, _WEIGHTS[0]):
        with open(folder / name, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def _card(base: str, config: LoraConfig, about: str) -> str:
    """The model card: what is known of an adapter, and nothing else."""
    base = base or "the model it was trained on"
    return f"""---
library_name: peft
tags: [lora, ogp-lora-stream]
---
# A LoRA adapter for {base}

{_EXPORTED}{about or "an expert"}.

- base model: `{base}`, unchanged
- rank {config.r}: what is still trained and what is held of it, as one LoRA; alpha {config.lora_alpha}
- adapted linears: {", ".join(sorted(config.target_modules or []))}
- it answers every prompt; the learner that it comes from serves it, if not set otherwise, to prompts like those that it
  learned, and the base model to all others

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), "the folder of this file")
```

Folders inside, where there are any, hold the learner's other experts: `model.load_adapter(folder, name)` brings one in,
and `model.set_adapter(name)` lets it answer. PEFT does not choose by the prompt, as the learner does.

It was trained on the corrections of one user or server. Nothing was measured on it beyond these.
"""


def read_adapter(folder: str | os.PathLike[str], attachment: Attachment) -> ImportedAdapter:
    """Read a LoRA adapter trained by PEFT for the sites of an attachment.

    Ranks and alphas of single modules become one rank (padded) and one scaling (the rest goes into B).

    Raises:
        StateError: no readable PEFT adapter is there.
        ModelError: the adapter is more than a plain LoRA, or adapts other linears than the attachment has.
    """
    config, weights = _load(folder)
    extras = [name for name in _EXTRAS if getattr(config, name, None)]
    extras += [f"bias={config.bias!r}"] if config.bias != "none" else []
    if config.init_lora_weights not in _PLAIN_INITS:
        extras.append(f"init_lora_weights={config.init_lora_weights!r}")
    if extras:
        raise ModelError(f"the adapter in {folder} uses {', '.join(extras)}: import a plain LoRA")
    pairs = _pairs(folder, weights)
    names = {site.name for site in attachment.sites}
    strange = sorted(pairs.keys() - names)
    if strange:
        wanted = sorted({name.rpartition(".")[2] for name in pairs} | set(attachment.target_modules))
        raise ModelError(
            f"the adapter in {folder} adapts {len(strange)} linears that this learner does not, such as "
            f"{strange[0]}: set target_modules to {', '.join(wanted)}"
        )
    rank = max(A.shape[1] for A, _ in pairs.values())
    scalings = {name: _scaling(config, name, A.shape[1]) for name, (A, _) in pairs.items()}
    # of equal scalings the ratio below is exactly 1
    scaling = max(scalings.values(), key=abs) or 1.0
    factors: list[tuple[Tensor, Tensor] | None] = []
    for site in attachment.sites:
        if site.name not in pairs:
            factors.append(None)
            continue
        A, B = pairs[site.name]
        if A.shape[0] != site.shape.d_in or B.shape[1] != site.shape.d_out or A.shape[1] != B.shape[0]:
            raise ModelError(
                f"the adapter in {folder} has A {list(A.shape)} and B {list(B.shape)} for {site.name}, "
                f"which is {site.shape.d_in} to {site.shape.d_out}: use the base model that it was trained on"
            )
        factors.append((_padded(A, rank, 1), _padded(B * (scalings[site.name] / scaling), rank, 0)))
    return ImportedAdapter(rank, scaling, factors)


def _load(folder: str | os.PathLike[str]) -> tuple[LoraConfig, dict[str, Tensor]]:
    # checked first, because PEFT looks on the hub for what a folder lacks
    if not Path(folder, _CONFIG).is_file() or not any(Path(folder, name).is_file() for name in _WEIGHTS):
        raise StateError(f"{folder} holds no PEFT adapter: give a folder with {_CONFIG} and {_WEIGHTS[0]}")
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if not isinstance(config, LoraConfig):
            kind = config.peft_type and config.peft_type.value
            raise ModelError(f"the adapter in {folder} is of type {kind}: import a LoRA")
        weights = load_peft_weights(str(folder), device="cpu")
    except (OSError, LookupError, RuntimeError, TypeError, ValueError, *_UNREADABLE) as error:
        reason = str(error).partition("\n")[0]
        raise StateError(f"the adapter in {folder} cannot be read ({reason}): save it again") from error
    return config, weights


def _pairs(folder: str | os.PathLike[str], weights: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """(A `[D_in, r]`, B `[r, D_out]`) by the name of the adapted module."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        name, _, part = key.removeprefix(_PREFIX).partition(".lora_")
        if part not in ("A.weight", "B.weight") or tensor.dim() != 2:
            raise ModelError(f"the adapter in {folder} has {key}: import a LoRA on linears only")
        if not tensor.isfinite().all():
            raise StateError(f"the adapter in {folder} has non-finite values in {key}: save it again")
        # masters are float32, or float64 where that is what was saved
        parts.setdefault(name, {})[part] = tensor.T.to(torch.promote_types(tensor.dtype, torch.float32))
    half = [name for name, pair in parts.items() if len(pair) < 2]
    if half or not parts:
        raise StateError(f"the adapter in {folder} lacks A or B of {half[0] if half else 'all linears'}")
    return {name: (pair["A.weight"], pair["B.weight"]) for name, pair in parts.items()}


def _scaling(config: LoraConfig, name: str, rank: int) -> float:
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
    return float(alpha / math.sqrt(rank) if config.use_rslora else alpha / rank)


def _padded(matrix: Tensor, size: int, dim: int) -> Tensor:
    """A contiguous copy, grown to `size` along `dim` by zeros."""
    shape = list(matrix.shape)
    shape[dim] = size
    padded = matrix.new_zeros(shape)
    padded.narrow(dim, 0, matrix.shape[dim]).copy_(matrix)
    return padded
