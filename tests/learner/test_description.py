"""Descriptions against their formula."""

import pytest
import torch
from torch import Tensor, nn

from ogpstream.learner.description import LAST, Describer

WIDTH, VOCABULARY = 12, 90


def _embedding() -> nn.Embedding:
    table = nn.Embedding(VOCABULARY, WIDTH)
    table.weight.data = torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0)) + 2.0
    return table


def _ids(length: int, seed: int) -> list[int]:
    ids: list[int] = torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


def _expected(ids: list[int]) -> Tensor:
    """In float64, by the symmetric root of the covariance."""
    E = _embedding().weight.detach().double()
    chosen = E[torch.linspace(0, VOCABULARY - 1, 2 * WIDTH).long()]
    mean = chosen.mean(0)
    C = (chosen - mean).T @ (chosen - mean) / len(chosen)
    values, vectors = torch.linalg.eigh(C + 0.1 * C.diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64))
    root = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    parts = [(E[part].mean(0) - mean) @ root for part in (ids, ids[-LAST:])]
    return torch.cat([part / part.norm() for part in parts]) / 2**0.5


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 40])
def test_cosines_are_those_of_whitened_means(length: int) -> None:
    describe = Describer(_embedding())
    texts = [_ids(length, seed) for seed in range(4)]
    found = torch.cat([describe(text, [length]) for text in texts])
    wanted = torch.stack([_expected(text) for text in texts])
    torch.testing.assert_close((found @ found.T).double(), wanted @ wanted.T, atol=1e-5, rtol=0)


def test_a_place_is_described_as_the_text_up_to_it() -> None:
    describe, text = Describer(_embedding()), _ids(24, 0)
    found = describe(text, [1, 3, 7, 24])
    wanted = torch.cat([describe(text[:end], [end]) for end in (1, 3, 7, 24)])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_where_nothing_varies_nothing_is_described() -> None:
    table = _embedding()
    table.weight.data[:] = 1.0
    assert not Describer(table)([1, 2, 3], [3]).any()


def test_half_precision_embeddings() -> None:
    table, ids = _embedding(), _ids(10, 1)
    exact = Describer(table)(ids, [10])
    table.weight.data = table.weight.data.bfloat16()
    assert float(exact @ Describer(table)(ids, [10]).T) > 0.999
