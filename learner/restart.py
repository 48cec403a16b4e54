"""The restart: an expert's plastic factors are folded whole into its held part, and start anew at right angles to P.

It ends a consolidation, when what was learned is rehearsed and settled. Until then the columns of A turn towards the
inputs of what is learned, and every later move of B would be felt by those inputs too, as far as they lie outside P. A
fresh A reads them no more than any others, and B = 0 moves nothing. As in ReLoRA (Lialin et al. 2023, arXiv:2307.05695)
the product of the old factors stays; here it goes to the held part, and the directions that it read most join P
first, which is what keeps the subspaces of tasks apart in O-LoRA (Wang et al. 2023, arXiv:2310.14152).

What is folded is the running mean of the factors and not the last ones: steps on one to three samples at a rate that
learns them at once leave noise of about 1 / (1 - decay) of them, which the mean has not (Polyak and Juditsky 1992;
Izmailov et al. 2018, arXiv:1803.05407). It comes from the updates alone, so it lies outside P as they do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator

import torch
from torch import Tensor

from ogpstream.memory.experts import Expert
from ogpstream.memory.layout import Layout
from ogpstream.memory.units import exhausted

# numbers that are drawn in one unit: 2 ms
DRAWS = 2**18


def drawing(layout: Layout, *keys: object, dtype: torch.dtype) -> Generator[None, None, Tensor]:
    """Flat slab of an expert that computes nothing yet: A is N(0, 1/D_in), drawn from the keys alone, and B is 0.

    Yields:
        After every few linears.
    """
    slab = torch.empty(layout.numel, dtype=dtype)
    digest = hashlib.sha256("/".join(map(str, keys)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    drawn = 0
    for index, site in enumerate(layout.sites):
        start = torch.randn(site.d_in, layout.rank, generator=generator, dtype=dtype)
        layout.a(slab, index).copy_(start / site.d_in**0.5)
        layout.b(slab, index).zero_()
        drawn += start.numel()
        if drawn >= DRAWS:
            drawn = 0
            yield
    return slab


def fresh_factors(layout: Layout, *keys: object, dtype: torch.dtype) -> Tensor:
    """What `drawing` draws, at once."""
    return exhausted(drawing(layout, *keys, dtype=dtype))


def read_directions(expert: Expert, key: str, at_most: int) -> Tensor:
    """The input directions that an expert's plastic factors read most: leading left singular vectors of A B.

    Of all linears of one input together, through a matrix as wide as their ranks: A_i = Q R_i, so that the left
    singular vectors of [A_1 B_1, A_2 B_2, ...] are Q times those of [R_1 B_1, R_2 B_2, ...].

    Args:
        key: the basis of the input.

    Returns:
        Unit columns `[D_in, <= at_most]`, fewer where the product has a smaller rank.
    """
    layout = expert.layout
    left, right = torch.linalg.qr(layout.a_block(expert.factors, key).double())
    gram = torch.zeros(len(right), len(right), dtype=torch.float64)
    for place, site in enumerate(layout.members(key)):
        own = right[:, place * layout.rank : (place + 1) * layout.rank] @ layout.b(expert.factors, site).double()
        gram += own @ own.T
    values, vectors = torch.linalg.eigh(gram)
    # under 1e-6 of the largest energy, 1e-3 in size, a direction is the rounding of the others
    count = min(at_most, int((values > 1e-6 * values[-1]).sum()) if float(values[-1]) > 0 else 0)
    return left @ vectors[:, len(right) - count :].flip(1)
