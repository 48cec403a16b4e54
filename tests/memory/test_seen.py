"""The window of known ids, against a plain list."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ogpstream.memory.seen import SeenIds

# characters of all kinds, half of a surrogate pair among them, as JSON allows
identifiers = st.lists(st.text(st.characters(codec=None), min_size=1, max_size=3) | st.just("\ud800"), max_size=60)


@given(arrivals=identifiers, window=st.integers(2, 12), stop=st.integers(0, 60))
def test_the_latest_are_known_and_the_window_holds(arrivals: list[str], window: int, stop: int) -> None:
    seen = SeenIds(window)
    new: list[str] = []
    for number, id_ in enumerate(arrivals):
        if number == stop:
            restored = SeenIds(window)
            restored.load_state_dict(seen.state_dict())
            seen = restored
        if id_ not in seen:
            new.append(id_)
        seen.add(id_)
        assert id_ in seen
        assert all(one in seen for one in new[-(window // 2) :])
        assert len(seen) <= window
        assert len(seen) == min(len(new), len(seen))
    forgotten = set(new) - set(new[-window:])
    assert not any(one in seen for one in forgotten)


def test_a_saved_window_is_the_same_bit_for_bit() -> None:
    seen, other = SeenIds(8), SeenIds(8)
    for number in range(11):
        seen.add(str(number))
    other.load_state_dict({name: tensor.clone() for name, tensor in seen.state_dict().items()})
    for number in range(8, 15):
        seen.add(str(number))
        other.add(str(number))
    first, second = seen.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) and first[name].dtype == torch.int64 for name in first)


def test_nothing_is_known_at_first() -> None:
    assert len(SeenIds()) == 0 and "a" not in SeenIds()
    assert all(len(tensor) == 0 for tensor in SeenIds().state_dict().values())


def test_a_window_too_small_to_turn_over_is_refused() -> None:
    with pytest.raises(ValueError, match="window is 1"):
        SeenIds(1)
