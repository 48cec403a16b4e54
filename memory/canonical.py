"""One spelling of a value: canonical JSON, and the hash of a state of tensors and JSON values."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


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
        raise ValueError("does not come back equal from JSON; use lists instead of tuples and strings as keys")
    return data


def canonical_hash(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> str:
    """sha256 (hex) over names, dtypes, shapes and bytes of the tensors by name, and canonical JSON of `meta`.

    Independent of device, strides, storage sharing and insertion order; every bit of a value counts (-0.0 is
    not 0.0).
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        # the JSON says where it ends and how many bytes follow, so no two contents give the same stream
        for part in (canonical_json([name, str(tensor.dtype), list(tensor.shape)]), _bytes(tensor)):
            digest.update(part)
    digest.update(canonical_json(dict(meta)))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.stride(0) != 1:
        # an array of one element or none counts as contiguous with any stride, but cannot be viewed as bytes
        flat = flat.clone(memory_format=torch.contiguous_format)
    # uint8, since numpy has no bfloat16
    return flat.view(torch.uint8).numpy().data
