"""The canonical hash: every bit of the content counts, and nothing but the content."""

import hashlib

import torch

from ogpstream.memory.canonical import canonical_hash


def test_the_hash_depends_on_content_alone():
    slab = torch.randn(12, generator=torch.Generator().manual_seed(1))
    tensors = {
        "slab": slab,
        "view": slab[3:9].view(2, 3),
        "transposed": slab[:6].view(2, 3).T,
        "column": slab.view(6, 2)[:1, 1],
        "bf16": slab.to(torch.bfloat16),
        "ids": torch.tensor([0, 65535]).to(torch.uint16),
        "empty": torch.empty(0, 4, dtype=torch.bfloat16),
        "scalar": torch.tensor(1),
        "grad": torch.ones(2, requires_grad=True),
    }
    meta = {"journal": 10, "medians": [0.1, 1e-300], "name": "é"}
    base = canonical_hash(tensors, meta)
    assert base == canonical_hash(dict(reversed(tensors.items())), dict(reversed(meta.items())))
    assert base == canonical_hash({name: tensor.detach().clone() for name, tensor in tensors.items()}, meta)
    x = torch.arange(4.0)
    variants = [
        ({"x": x}, {}),
        ({"y": x}, {}),
        ({"x": x.view(2, 2)}, {}),
        ({"x": x.double()}, {}),
        ({"x": x.view(torch.int32)}, {}),
        ({"x": x * -1}, {}),
        ({"x": x, "y": x[:0]}, {}),
        ({"x": x}, {"a": 1}),
        ({"x": x}, {"a": 1.0}),
        ({"x": x}, {"a": "1"}),
        ({"x": x[:2], "y": x[2:]}, {}),
    ]
    hashes = {canonical_hash(*variant) for variant in variants}
    assert len(hashes) == len(variants)
    assert canonical_hash({"x": torch.tensor([0.0])}, {}) != canonical_hash({"x": torch.tensor([-0.0])}, {})
    assert canonical_hash({}, {}) == hashlib.sha256(b"{}").hexdigest()
