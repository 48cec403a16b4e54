"""Replay ring against a plain list, the chances of its draws, and its state bit for bit."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ogpstream.memory.replay import ReplayRing, SlotFlag

TOKENS, VOCAB = 6, 70_000


@dataclass
class Kept:
    slot: int
    ids: list[int]
    prompt_length: int
    expert: str
    uid: int
    flags: SlotFlag = SlotFlag(0)


class RingMachine(RuleBasedStateMachine):
    """Every operation on the ring and on a list of what must be in it, the oldest first."""

    keep = "recent"

    def __init__(self) -> None:
        super().__init__()
        self.ring = ReplayRing(5, TOKENS, vocab_size=VOCAB, keep=self.keep, seed=3)  # type: ignore[arg-type]
        self.kept: list[Kept] = []
        self.offered = 0

    @rule(ids=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=TOKENS), data=st.data())
    def add(self, ids: list[int], data: st.DataObject) -> None:
        prompt_length = data.draw(st.integers(0, len(ids) - 1))
        expert = data.draw(st.sampled_from(["default", "legal"]))
        oldest = self.kept[0].slot if self.kept else None
        full = len(self.kept) == 5
        slot = self.ring.add(ids, prompt_length, expert=expert, uid=2**62 + self.offered)
        self.offered += 1
        if full and self.keep == "recent":
            assert slot == oldest
        if not full:
            assert slot is not None and slot not in {kept.slot for kept in self.kept}
        if slot is None:
            return
        self.kept = [kept for kept in self.kept if kept.slot != slot]
        self.kept.append(Kept(slot, ids, prompt_length, expert, 2**62 + self.offered - 1))

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        kept = data.draw(st.sampled_from(self.kept))
        self.ring.evict(kept.slot)
        self.kept.remove(kept)
        assert not self.ring.storage.numpy()[kept.slot].any(), "the tokens are wiped"
        assert self.ring.find(kept.uid) is None
        with pytest.raises(ValueError, match="empty"):
            self.ring.get(kept.slot)

    @precondition(lambda self: self.kept)
    @rule(data=st.data(), flags=st.sampled_from(list(SlotFlag)))
    def mark(self, data: st.DataObject, flags: SlotFlag) -> None:
        kept = data.draw(st.sampled_from(self.kept))
        self.ring.mark(kept.slot, flags)
        kept.flags |= flags

    @rule()
    def reload(self) -> None:
        self.ring = reloaded(self.ring)

    @invariant()
    def agree(self) -> None:
        assert self.ring.slots == [kept.slot for kept in self.kept]
        assert len(self.ring) == len(self.kept)
        assert self.ring.seen == self.offered
        for kept in self.kept:
            slot = self.ring.get(kept.slot)
            assert slot.ids.dtype == torch.int64
            found = {**vars(slot), "ids": slot.ids.tolist()}
            assert found == vars(kept)
            assert self.ring.find(kept.uid) == kept.slot
        rehearsed = SlotFlag.REHEARSED
        assert self.ring.pending() == [kept.slot for kept in self.kept if not kept.flags & rehearsed]
        assert sorted(self.ring.draw(9, counter=self.offered)) == sorted(kept.slot for kept in self.kept)


class ReservoirMachine(RingMachine):
    keep = "reservoir"


class BalancedMachine(RingMachine):
    keep = "balanced"


TestRecent = RingMachine.TestCase
TestReservoir = ReservoirMachine.TestCase
TestBalanced = BalancedMachine.TestCase
TestRecent.settings = TestReservoir.settings = TestBalanced.settings = settings(max_examples=25, stateful_step_count=25)


def reloaded(ring: ReplayRing, **settings: Any) -> ReplayRing:
    tensors, meta = ring.state_dict()
    settings = {
        "vocab_size": ring.vocab_size,
        "keep": ring.keep,
        "seed": ring.seed,
        **settings,
    }
    other = ReplayRing(ring.capacity, ring.slot_tokens, **settings)
    other.load_state_dict(
        safetensors.torch.load(safetensors.torch.save(tensors)), json.loads(json.dumps(meta))
    )
    return other


def assert_same_state(one: ReplayRing, other: ReplayRing) -> None:
    (tensors, meta), (others, other_meta) = one.state_dict(), other.state_dict()
    assert meta == other_meta
    for key in tensors:
        # bytes, because a priority that was never measured is a NaN
        assert tensors[key].numpy().tobytes() == others[key].numpy().tobytes(), key
    assert np.array_equal(one.storage.numpy(), other.storage.numpy())


def filled(count: int, **settings: Any) -> ReplayRing:
    ring = ReplayRing(
        settings.pop("capacity", 8), TOKENS, vocab_size=settings.pop("vocab_size", 100), **settings
    )
    for uid in range(count):
        ring.add([uid % 100, 1, 2], 1, expert="default", uid=uid)
    return ring


@pytest.mark.parametrize(("vocab_size", "size"), [(65_536, 2), (65_537, 4), (2**32, 4)])
def test_the_largest_id_of_each_vocabulary_survives(vocab_size: int, size: int) -> None:
    ring = ReplayRing(3, 4, vocab_size=vocab_size)
    slot = ring.add([0, vocab_size - 1], 1, expert="default", uid=2**63 - 1)
    assert slot is not None
    assert reloaded(ring).get(slot).ids.tolist() == [0, vocab_size - 1]
    assert reloaded(ring).get(slot).uid == 2**63 - 1
    assert ring.storage.shape == (3, 4) and ring.storage.nbytes == 3 * 4 * size
    assert ring.storage.is_contiguous()
    with pytest.raises(ValueError, match="outside the vocabulary"):
        ring.add([vocab_size], 0, expert="default", uid=0)


def test_ids_come_as_lists_arrays_and_tensors() -> None:
    ring = ReplayRing(4, TOKENS, vocab_size=100)
    for uid, ids in enumerate(([1, 2], np.array([1, 2], dtype=np.int32), torch.tensor([1, 2]), (1, 2))):
        slot = ring.add(ids, 1, expert="default", uid=uid)  # type: ignore[arg-type]
        assert slot is not None and ring.get(slot).ids.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("ids", "prompt_length", "uid", "message"),
    [
        ([1] * 7, 1, 5, "does not fit"),
        (torch.zeros(0, dtype=torch.int64), 0, 5, "without tokens"),
        ([], 0, 5, "without tokens"),
        ([1.0, 2.0], 1, 5, "integers"),
        ([[1, 2]], 1, 5, "one dimension"),
        ([1, 100], 1, 5, "vocabulary"),
        ([-1, 1], 1, 5, "vocabulary"),
        ([1, 2], 2, 5, "prompt_length"),
        ([1, 2], -1, 5, "prompt_length"),
        ([1, 2], 1, 0, "uid 0"),
        ([1, 2], 1, 2**63, "uid"),
    ],
)
def test_a_sample_that_does_not_fit_changes_nothing(
    ids: Any, prompt_length: int, uid: int, message: str
) -> None:
    ring, same = filled(8), filled(8)
    with pytest.raises(ValueError, match=message):
        ring.add(ids, prompt_length, expert="new", uid=uid)
    assert_same_state(ring, same)


def test_a_get_is_a_copy() -> None:
    ring = filled(1)
    ring.get(0).ids.fill_(9)
    assert ring.get(0).ids.tolist() == [0, 1, 2]


def test_evicted_slots_are_used_before_the_oldest_is_overwritten() -> None:
    ring = filled(8)
    ring.evict(5)
    ring.evict(2)
    assert [ring.add([1], 0, expert="default", uid=uid) for uid in (10, 11, 12)] == [2, 5, 0]
    assert [ring.get(slot).uid for slot in ring.slots] == [1, 3, 4, 6, 7, 10, 11, 12]


def test_the_reservoir_holds_every_sample_with_the_same_chance() -> None:
    held: Counter[int] = Counter()
    for seed in range(300):
        ring = filled(40, capacity=8, keep="reservoir", seed=seed)
        held.update(ring.get(slot).uid for slot in ring.slots)
    # 60 expected of each, standard deviation below 7: five of them
    assert all(25 <= held[uid] <= 95 for uid in range(40)), held
    # the earliest and the latest quarter: 600 each, standard deviation below 22
    assert abs(sum(held[uid] for uid in range(10)) - 600) < 110
    assert abs(sum(held[uid] for uid in range(30, 40)) - 600) < 110


def offer(ring: ReplayRing, completions: Sequence[int], *, first: int = 0) -> Counter[int]:
    """Samples of different prompts with these completions, one after the other; what the ring then holds of each."""
    for uid, completion in enumerate(completions, first):
        ring.add([1 + uid % 50, completion], 1, expert="default", uid=uid)
    return Counter(int(ring.get(slot).ids[1]) for slot in ring.slots)


def test_balanced_every_completion_keeps_its_share() -> None:
    # 30 completions, domain after domain, in 32 slots: a reservoir loses a third of them, (1 - 1/30)^32
    stream = [domain * 6 + at % 6 for domain in range(5) for at in range(120)]
    held = offer(ReplayRing(32, TOKENS, vocab_size=VOCAB, keep="balanced"), stream)
    assert set(held) == set(range(30)) and max(held.values()) <= 2
    assert len(offer(ReplayRing(32, TOKENS, vocab_size=VOCAB, keep="reservoir"), stream)) < 26


def test_balanced_a_rare_completion_keeps_all_its_samples_beside_a_frequent_one() -> None:
    stream = [7 if at % 100 == 50 else 8 for at in range(500)]
    assert offer(ReplayRing(16, TOKENS, vocab_size=VOCAB, keep="balanced"), stream) == {7: 5, 8: 11}


@pytest.mark.parametrize("several", [False, True])
def test_balanced_it_is_a_reservoir_inside_a_completion_and_where_none_comes_twice(several: bool) -> None:
    held: Counter[int] = Counter()
    for seed in range(300):
        ring = ReplayRing(8, TOKENS, vocab_size=VOCAB, keep="balanced", seed=seed)
        offer(ring, [3] * 40 if several else range(100, 140))
        held.update(ring.get(slot).uid for slot in ring.slots)
    # as for the reservoir above
    assert all(25 <= held[uid] <= 95 for uid in range(40)), held
    assert abs(sum(held[uid] for uid in range(10)) - 600) < 110
    assert abs(sum(held[uid] for uid in range(30, 40)) - 600) < 110


def experts(ring: ReplayRing) -> Counter[str]:
    return Counter(ring.get(slot).expert for slot in ring.slots)


@pytest.mark.parametrize("different", [2, 1000])
def test_balanced_each_expert_has_room_by_its_share_of_the_newest_samples(different: int) -> None:
    ring, uid = ReplayRing(64, TOKENS, vocab_size=VOCAB, keep="balanced"), 0
    for name, count in (("a", 300), ("b", 300), ("c", 300)):
        for _ in range(count):
            ring.add([1, uid % different], 1, expert=name, uid=uid)
            uid += 1
    # a quarter is everybody's; of the other 48 slots those of before keep exp(-300 / 64) and its square
    assert experts(ring)["c"] >= 52 and min(experts(ring).values()) >= 4
    # one that gets a third of what comes has a third of the three quarters beside its part of the quarter
    for at in range(600):
        ring.add([1, uid % different], 1, expert="b" if at % 3 == 0 else "c", uid=uid)
        uid += 1
    held = experts(ring)
    assert held["b"] == pytest.approx(16 / 3 + 16, abs=3) and held["c"] == pytest.approx(16 / 3 + 32, abs=3)
    assert held["a"] == pytest.approx(16 / 3, abs=2) and len(ring) == 64


def test_balanced_completions_share_the_room_of_their_own_expert() -> None:
    ring = ReplayRing(32, TOKENS, vocab_size=VOCAB, keep="balanced")
    for uid in range(400):
        # of "a" one completion in ten, and it is one that "b" has too
        expert = "ab"[uid % 2]
        ring.add([1, 5 if expert == "b" or uid % 20 == 0 else 6], 1, expert=expert, uid=uid)
    slots = [ring.get(slot) for slot in ring.slots]
    own = Counter(int(slot.ids[1]) for slot in slots if slot.expert == "a")
    assert len(slots) - own.total() == pytest.approx(16, abs=1) and own[5] == own[6] == own.total() / 2


def test_draws_give_each_expert_its_share_of_the_newest_samples() -> None:
    ring = ReplayRing(64, TOKENS, vocab_size=VOCAB, keep="balanced")
    for uid in range(300):
        ring.add([1, uid % 7], 1, expert="old" if uid < 200 else "new", uid=uid)
    drawn = Counter(ring.get(slot).expert for counter in range(1000) for slot in ring.draw(1, counter=counter))
    assert drawn["old"] / 1000 == pytest.approx((63 / 64) ** 100, abs=0.04)
    # and inside one all the same chance
    own = Counter(slot for counter in range(1000) for slot in ring.draw(1, counter=counter, expert="new"))
    assert max(own.values()) < 3 * min(own.values())


def test_an_expert_that_only_took_samples_over_is_drawn_too() -> None:
    ring = ReplayRing(8, TOKENS, vocab_size=VOCAB, keep="balanced")
    for uid in range(8):
        ring.add([1, uid], 1, expert="a", uid=uid)
    for slot in ring.slots[:4]:
        ring.hand_over(slot, "b")
    drawn = Counter(ring.get(slot).expert for counter in range(400) for slot in ring.draw(1, counter=counter))
    assert drawn["b"] > 100 and len(ring.draw(8, counter=0)) == 8


def test_balanced_a_saved_ring_goes_on_exactly_in_a_used_one() -> None:
    ring = ReplayRing(8, TOKENS, vocab_size=VOCAB, keep="balanced", seed=1)
    offer(ring, [at % 5 for at in range(60)])
    for uid in range(1000, 1060):
        ring.add([1, uid % 4], 1, expert="other", uid=uid)
    other = ReplayRing(8, TOKENS, vocab_size=VOCAB, keep="balanced", seed=1)
    offer(other, [at % 3 for at in range(20)])
    ring.evict(ring.slots[2])
    other.load_state_dict(*ring.state_dict())
    stream = [at * at % 7 for at in range(200)]
    assert offer(ring, stream, first=100) == offer(other, stream, first=100)
    assert_same_state(ring, other)


def test_a_draw_depends_on_ring_seed_and_counter_alone() -> None:
    ring, same, other = filled(8, seed=4), filled(8, seed=4), filled(8, seed=5)
    draws = [ring.draw(3, counter=counter) for counter in range(50)]
    assert [same.draw(3, counter=counter) for counter in reversed(range(50))] == draws[::-1]
    assert [other.draw(3, counter=counter) for counter in range(50)] != draws
    assert [reloaded(ring).draw(3, counter=counter) for counter in range(50)] == draws
    assert len({tuple(drawn) for drawn in draws}) > 20
    assert all(len(set(drawn)) == 3 for drawn in draws)


def test_a_draw_can_leave_slots_out_and_gives_no_more_than_there_is() -> None:
    ring = filled(4)
    assert {ring.draw(counter=counter, exclude=[0, 2])[0] for counter in range(40)} == {1, 3}
    assert sorted(ring.draw(9, counter=0, exclude=[1])) == [0, 2, 3]
    assert ring.draw(counter=0, exclude=[0, 1, 2, 3]) == [] == filled(0).draw(counter=0)


def chances(ring: ReplayRing, draws: int = 3000) -> list[float]:
    drawn = Counter(ring.draw(counter=counter)[0] for counter in range(draws))
    return [drawn[slot] / draws for slot in range(ring.capacity)]


def test_all_samples_of_an_expert_have_the_same_chance() -> None:
    ring = filled(4, capacity=4)
    ring.mark(0, SlotFlag.LEARNED)
    assert chances(ring) == pytest.approx([0.25] * 4, abs=0.03)


def test_an_empty_slot_is_not_marked() -> None:
    with pytest.raises(ValueError, match="empty"):
        filled(2).mark(7, SlotFlag.REHEARSED)


def test_the_state_is_small_and_goes_on_exactly() -> None:
    ring = filled(300, capacity=64, keep="reservoir", seed=7)
    for slot in (3, 60, 17):
        ring.evict(slot)
    ring.mark(5, SlotFlag.LEARNED)
    tensors, _ = ring.state_dict()
    assert tensors["ids"].shape == (61, 3)
    other = reloaded(ring)
    for uid in range(300, 400):
        ids = [uid % 100] * (1 + uid % TOKENS)
        assert ring.add(ids, 0, expert="legal", uid=uid) == other.add(ids, 0, expert="legal", uid=uid)
    assert_same_state(ring, other)


def test_an_empty_ring_is_saved_too() -> None:
    assert len(reloaded(filled(0))) == 0


@pytest.mark.parametrize("damage", ["capacity", "slot_tokens", "vocab_size", "free", "ids", "uid", "expert"])
def test_a_state_that_does_not_fit_changes_nothing(damage: str) -> None:
    tensors, meta = filled(5).state_dict()
    if damage in meta:
        meta[damage] += 1
    elif damage == "free":
        tensors["free"] = tensors["free"][1:]
    elif damage == "ids":
        tensors["ids"] = tensors["ids"][:, 1:]
    else:
        tensors[damage][1] = 0 if damage == "uid" else 1
    ring = filled(2)
    with pytest.raises(ValueError, match="saved ring"):
        ring.load_state_dict(tensors, meta)
    assert [ring.get(slot).uid for slot in ring.slots] == [0, 1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"capacity": 0},
        {"slot_tokens": 0},
        {"vocab_size": 0},
        {"vocab_size": 2**32 + 1},
        {"keep": "newest"},
        {"seed": -1},
    ],
)
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(*wrong.values())):
        ReplayRing(**{"vocab_size": 100, **wrong})


def test_contradicting_samples_are_those_of_another_answer_to_the_same_prompt() -> None:
    ring = ReplayRing(8, 6, vocab_size=100)
    rows = [([1, 2, 3], 2, "a"), ([1, 2, 4], 2, "a"), ([1, 2, 4], 2, "b"), ([1, 2, 4], 1, "a"), ([1, 5, 4], 2, "a"),
            ([1, 2, 4, 5], 2, "a")]
    slots = [ring.add(ids, length, expert=expert, uid=uid) for uid, (ids, length, expert) in enumerate(rows)]
    assert ring.contradicting([1, 2, 3], 2, expert="a") == sorted([slots[1], slots[5]])
    assert ring.contradicting([1, 2, 3], 2, expert="b") == [slots[2]]
    assert ring.contradicting([1, 2, 3], 2, expert="c") == ring.contradicting([9, 9, 3], 2, expert="a") == []
    ring.evict(slots[1])
    assert ring.contradicting([1, 2, 3], 2, expert="a") == [slots[5]]
    assert ReplayRing(4, 6, vocab_size=100).contradicting([1, 2], 1, expert="a") == []


def test_a_sample_can_be_handed_over() -> None:
    ring = ReplayRing(8, 16, vocab_size=100)
    slots = [ring.add([uid, 50], 1, expert="old", uid=uid) for uid in range(6)]
    assert None not in slots
    ring.hand_over(ring.slots[2], "new")
    assert [ring.get(slot).expert for slot in ring.slots] == ["old", "old", "new", "old", "old", "old"]
    for counter in range(20):
        assert ring.draw(6, counter=counter, expert="new") == [ring.slots[2]]
    again = ReplayRing(8, 16, vocab_size=100)
    again.load_state_dict(*ring.state_dict())
    assert again.get(again.slots[2]).expert == "new"
    with pytest.raises(ValueError, match="slot 7 of the replay ring is empty"):
        ring.hand_over(7, "new")


def test_some_experts_can_be_left_out() -> None:
    ring = ReplayRing(16, 16, vocab_size=100)
    for uid in range(12):
        ring.add([uid, 50], 1, expert="abc"[uid % 3], uid=uid)
    for counter in range(20):
        drawn = {ring.get(slot).expert for slot in ring.draw(8, counter=counter, but=["a", "nobody"])}
        assert drawn == {"b", "c"}
    assert ring.draw(3, counter=0, expert="a", but=["a"]) == []
    # and where none of them is there the draws are the same
    assert ring.draw(4, counter=5, but=["nobody"]) == ring.draw(4, counter=5)
