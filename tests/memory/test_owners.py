"""Shares of experts: of what comes, of the ring and of draws."""

import json

import numpy as np
import pytest

from ogpstream.memory.owners import Owners


def _owners(names: str, samples: int = 16) -> Owners:
    owners = Owners(samples)
    for name in names:
        owners.sent(name)
    return owners


def test_samples_are_counted_and_can_be_handed_over() -> None:
    owners = _owners("aabab")
    assert (owners.names, owners.offered) == (["a", "b"], [3, 2])
    owners.hand_over(0, owners.number("c"))
    assert (owners.names, owners.offered) == (["a", "b", "c"], [2, 2, 1])


def test_chances_are_shares_of_the_newest_over_what_is_held() -> None:
    owners = _owners("a" * 100 + "b" * 16)
    chances = owners.chances(np.array([0, 0, 0, 1]))
    # exp(-1) of the weight is left to what came before 16 samples
    assert chances[:3].sum() / chances.sum() == pytest.approx((15 / 16) ** 16, abs=0.01)
    assert (owners.chances(np.array([1, 1])) == 1).all()


def test_the_most_crowded_is_above_its_room_and_is_in_the_ring() -> None:
    owners = _owners("a" * 50 + "b" * 200 + "c")
    # the quarter is shared by the two that are there; c is not yet
    assert owners.most_crowded(np.array([0] * 8 + [1] * 8), 1) == 0
    assert owners.most_crowded(np.array([0] * 2 + [1] * 14), 1) == 1
    # its first sample comes where somebody else makes room
    assert owners.most_crowded(np.array([0] * 2 + [1] * 14), 2) == 1


def test_it_comes_back_from_json() -> None:
    owners = _owners("abcabcccb")
    again = Owners.from_dict(json.loads(json.dumps(owners.to_dict())), 16)
    assert again.to_dict() == owners.to_dict()
    with pytest.raises(ValueError, match="3 experts, 2 and 3 counts"):
        Owners.from_dict({**owners.to_dict(), "offered": [1, 2]}, 16)
