"""Projection basis against a naive float64 model, and the promises that thousands of changes must keep."""

import json
import math
from dataclasses import dataclass, field

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ogpstream.memory.basis import ProjectionBasis


@dataclass
class Naive:
    """Directions as float64 vectors, uses as a list of (block, slot), everything by brute force."""

    d_in: int
    capacity: int
    block_size: int
    columns: dict[int, Tensor] = field(default_factory=dict)
    fixed: set[int] = field(default_factory=set)
    generation: dict[int, int] = field(default_factory=dict)
    uses: list[tuple[int, int]] = field(default_factory=list)
    updates: int = 0
    admissions: int = 0

    @property
    def block(self) -> int:
        return self.updates // self.block_size

    def count(self, slot: int) -> int:
        return sum(1 for block, used in self.uses if used == slot and block > self.block - 10)

    def residual(self, unit: Tensor) -> Tensor:
        if not self.columns:
            return unit
        q, _ = torch.linalg.qr(torch.stack(list(self.columns.values()), dim=1))
        return unit - q @ (q.T @ unit)

    def drop(self, slot: int) -> None:
        del self.columns[slot], self.generation[slot]
        self.fixed.discard(slot)
        self.uses = [use for use in self.uses if use[1] != slot]

    def admit(self, candidates: Tensor, threshold: float, fixed: bool) -> list[int]:
        taken: list[int] = []
        for candidate in candidates.double().T:
            if not candidate.isfinite().all() or not candidate.any():
                continue
            unit = candidate / candidate.norm()
            if self.residual(unit).norm() <= threshold:
                continue
            free = [slot for slot in range(self.capacity) if slot not in self.columns]
            others = [slot for slot in self.columns if slot not in self.fixed and slot not in taken]
            if not free and not others:
                break
            slot = free[0] if free else min(others, key=lambda s: (self.count(s), self.generation[s]))
            if not free:
                self.drop(slot)
            column = self.residual(unit)
            self.columns[slot] = column / column.norm()
            self.admissions += 1
            self.generation[slot] = self.admissions
            if fixed:
                self.fixed.add(slot)
            self.uses.append((self.block, slot))
            taken.append(slot)
        return taken

    def record(self, used: set[int]) -> None:
        self.uses += [(self.block, slot) for slot in used if slot in self.columns]
        self.updates += 1

    def prune(self, keep: int) -> list[int]:
        others = [slot for slot in self.columns if slot not in self.fixed]
        others.sort(key=lambda slot: (-self.count(slot), slot))
        pruned = sorted(others[max(0, keep - len(self.fixed)) :])
        for slot in pruned:
            self.drop(slot)
        return pruned


def assert_same(basis: ProjectionBasis, naive: Naive) -> None:
    slots = sorted(naive.columns)
    assert basis.live.nonzero().flatten().tolist() == slots
    assert basis.fixed.nonzero().flatten().tolist() == sorted(naive.fixed)
    for slot in range(len(basis.live)):
        assert int(basis.generation[slot]) == naive.generation.get(slot, 0)
        assert int(basis.use_counts()[slot]) == (naive.count(slot) if slot in naive.columns else 0)
        expected = naive.columns.get(slot, torch.zeros(naive.d_in, dtype=torch.float64))
        torch.testing.assert_close(basis.rows()[slot].double(), expected, rtol=0, atol=2e-5)
    assert basis.deviation() <= 1e-6
    basis.check()


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["admit", "admit", "fix", "use", "use", "use", "prune", "release", "grow"]),
        st.integers(0, 2**31),
    ),
    min_size=5,
    max_size=60,
)


@settings(max_examples=60)
@given(operations=OPERATIONS, d_in=st.integers(3, 45), data=st.data())
def test_every_history_agrees_with_the_naive_model(
    operations: list[tuple[str, int]], d_in: int, data: st.DataObject
) -> None:
    capacity = data.draw(st.integers(1, min(d_in, 36)))
    basis, naive = ProjectionBasis(d_in, capacity=capacity, window=20), Naive(d_in, capacity, block_size=2)
    for name, seed in operations:
        generator = torch.Generator().manual_seed(seed)
        version, before = basis.version, basis.generation.clone()
        changed = False
        if name in ("admit", "fix"):
            candidates = torch.randn(d_in, 3, generator=generator, dtype=torch.float64)
            if seed % 3 == 0:
                candidates[:, 1] = 0
            elif seed % 3 == 1 and naive.columns:
                # half of it lies in the span already
                candidates[:, 1] = candidates[:, 1] / candidates[:, 1].norm() + next(
                    iter(naive.columns.values())
                )
            admission = basis.admit(candidates, threshold=0.5, fixed=name == "fix")
            assert list(admission.slots) == naive.admit(candidates, 0.5, name == "fix")
            assert torch.equal(admission.directions, basis.rows()[list(admission.slots)].T)
            assert set(admission.replaced) == {slot for slot in admission.slots if before[slot] > 0}
            changed = len(admission) > 0
        elif name == "use":
            used = torch.rand(len(basis.live), generator=generator) < 0.3
            basis.record_use(used)
            naive.record(set(used.nonzero().flatten().tolist()))
        elif name == "prune":
            pruned = basis.prune()
            assert list(pruned) == naive.prune(basis.capacity // 2)
            changed = bool(pruned)
        elif name == "release":
            slots = [slot for slot in sorted(naive.columns) if seed % (slot + 2) == 0]
            basis.release(slots)
            for slot in slots:
                naive.drop(slot)
            changed = bool(slots)
        elif basis.capacity < min(d_in, 40):
            basis.grow(basis.capacity + 1)
            naive.capacity += 1
        assert basis.version == version + changed
        assert basis.stayed(before).nonzero().flatten().tolist() == [
            slot
            for slot, number in enumerate(before.tolist())
            if number and naive.generation.get(slot) == number
        ]
        assert_same(basis, naive)


def test_orthonormal_after_thousands_of_changes() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = ProjectionBasis(96, capacity=70, window=100)
    admitted = replaced = 0
    common = torch.randn(96, 1, generator=generator)
    for step in range(2500):
        # a large common part is what real inputs have, and where a single Gram-Schmidt loses digits
        candidate = torch.randn(96, 1, generator=generator) + 3 * common
        admission = basis.admit(candidate, threshold=0.01)
        admitted += len(admission)
        replaced += len(admission.replaced)
        basis.record_use(torch.rand(96, generator=generator) < 0.2)
        if step % 500 == 499:
            basis.prune()
        if step % 90 == 0:
            basis.release(basis.live.nonzero().flatten()[:3].tolist())
    assert admitted > 2000 and replaced > 1500
    assert basis.deviation() <= 1e-6
    assert basis.condition() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("tilt", [1e-2, 1e-4, 1e-5])
def test_nearly_dependent_candidates_stay_orthonormal(tilt: float) -> None:
    generator = torch.Generator().manual_seed(1)
    basis = ProjectionBasis(64, capacity=32)
    first = torch.randn(64, dtype=torch.float64, generator=generator)
    first /= first.norm()
    for _ in range(32):
        direction = torch.randn(64, dtype=torch.float64, generator=generator)
        basis.admit((first + tilt * direction / direction.norm())[:, None], threshold=0.0)
    assert basis.columns > 25
    assert basis.deviation() <= 1e-6


def test_what_lies_in_the_span_is_never_taken() -> None:
    basis = ProjectionBasis(40, capacity=40)
    basis.admit(torch.randn(40, 20, generator=torch.Generator().manual_seed(2)))
    inside = basis.rows()[basis.live].double().T @ torch.randn(20, 5, dtype=torch.float64)
    assert (basis.novelty(inside) < 1e-5).all()
    assert len(basis.admit(inside, threshold=0.0)) == 0
    # nothing is novel to a basis of the whole space, whatever the threshold
    basis.admit(torch.eye(40), threshold=0.0)
    assert basis.columns == 40
    assert len(basis.admit(torch.randn(40, 3), threshold=0.0)) == 0


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e-7, 1.0, 1e30, 1e300])
def test_the_scale_of_a_candidate_does_not_matter(scale: float) -> None:
    candidates = torch.randn(24, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    plain, scaled = ProjectionBasis(24, capacity=8), ProjectionBasis(24, capacity=8)
    plain.admit(candidates[:, :2])
    scaled.admit(candidates[:, :2] * scale)
    torch.testing.assert_close(scaled.rows(), plain.rows())
    torch.testing.assert_close(
        scaled.novelty(candidates * scale), plain.novelty(candidates), atol=1e-5, rtol=0
    )


def test_zero_and_non_finite_candidates_are_passed_over() -> None:
    basis = ProjectionBasis(6, capacity=4)
    candidates = torch.eye(6)
    candidates[:, 0] = 0
    candidates[2, 1] = float("nan")
    candidates[3, 2] = float("inf")
    assert basis.novelty(candidates).tolist()[:3] == [0, 0, 0]
    admission = basis.admit(candidates)
    assert admission.slots == (0, 1, 2)
    assert torch.equal(admission.directions, torch.eye(6)[:, 3:])
    assert basis.admit(torch.zeros(6, 0)).slots == ()


def test_at_most_and_novelty_among_the_candidates_themselves() -> None:
    basis = ProjectionBasis(8, capacity=8)
    e = torch.eye(8)
    twins = torch.stack([e[0], e[0] + 0.1 * e[1], e[2], e[3]], dim=1)
    assert len(basis.admit(twins, at_most=0)) == 0
    admission = basis.admit(twins, at_most=2)
    assert torch.equal(admission.directions, e[:, [0, 2]])


def test_share_and_coefficients() -> None:
    basis = ProjectionBasis(10, capacity=4)
    basis.admit(torch.eye(10)[:, :2])
    x = torch.zeros(4, 10)
    x[1, 0], x[1, 5] = 3.0, 4.0
    x[2, 1] = -2.0
    x[3] = x[1] * 1e-25
    torch.testing.assert_close(basis.share(x), torch.tensor([0.0, 0.6, 1.0, 0.6]))
    assert basis.coefficients(x).shape == (4, 32)
    assert basis.coefficients(x)[1, :3].tolist() == [3, 0, 0]
    assert basis.coefficients(x.double()).dtype == torch.float64
    assert basis.share(x[:3].bfloat16()).dtype == torch.float32


def test_no_change_of_a_basis_reaches_a_copy_of_it_or_what_was_read() -> None:
    def all_of(one: ProjectionBasis) -> str:
        tensors, meta = one.state_dict()
        return repr(({name: tensor.tolist() for name, tensor in tensors.items()}, meta))

    basis, e = ProjectionBasis(10, capacity=4, window=10), torch.eye(10)
    basis.admit(e[:, :3])
    used = basis.live.clone()
    changes = (lambda one: one.admit(e[:, 3:8]), lambda one: one.record_use(used), lambda one: one.prune(2),
               lambda one: one.release([0]), lambda one: one.grow(8))
    for change in changes:
        for changed, kept in ((0, 1), (1, 0)):
            both = (basis.copy(), basis.copy())
            both[1].become(both[0].copy())
            before, rows = all_of(both[kept]), both[changed].rows()
            values = rows.clone()
            assert all_of(both[changed]) == before == all_of(basis)
            change(both[changed])
            assert all_of(both[kept]) == before != all_of(both[changed])
            assert torch.equal(rows, values)


def test_chunks_are_contiguous_views_of_live_rows_only() -> None:
    basis = ProjectionBasis(100, capacity=97)
    assert list(basis.chunks()) == []
    basis.admit(torch.eye(100)[:, :97])
    assert [start for start, _ in basis.chunks()] == [0, 32, 64, 96]
    basis.release(range(32, 64))
    chunks = dict(basis.chunks())
    assert list(chunks) == [0, 64, 96]
    for start, view in chunks.items():
        assert view.shape == (32, 100) and view.is_contiguous()
        assert view.data_ptr() == basis.rows()[start].data_ptr()


def test_uses_are_forgotten_after_the_window() -> None:
    basis = ProjectionBasis(4, capacity=2, window=100)
    basis.admit(torch.eye(4)[:, :2])
    used = torch.zeros(32, dtype=torch.bool)
    used[0] = used[7] = True
    nothing = torch.zeros_like(used)
    basis.record_use(used)
    assert basis.use_counts()[:8].tolist() == [2, 1, 0, 0, 0, 0, 0, 0], (
        "the admission counts, an empty slot does not"
    )
    for update in range(2, 100):
        basis.record_use(nothing)
        assert basis.use_counts()[:2].tolist() == [2, 1], update
    basis.record_use(nothing)
    assert basis.use_counts().sum() == 0
    for _ in range(250):
        basis.record_use(used)
        assert basis.use_counts()[0] <= 100
    assert 90 <= int(basis.use_counts()[0]) <= 100


def test_the_least_used_direction_is_replaced_and_fixed_ones_never() -> None:
    e = torch.eye(12)
    basis = ProjectionBasis(12, capacity=4, window=100)
    basis.admit(e[:, :1], fixed=True)
    assert basis.admit(e[:, 1:4]).replaced == ()
    used = torch.zeros(32, dtype=torch.bool)
    used[[1, 3]] = True
    basis.record_use(used)
    before = basis.generation.clone()
    admission = basis.admit(e[:, 4:5])
    assert admission.slots == admission.replaced == (2,)
    assert basis.stayed(before)[:4].tolist() == [True, True, False, True]
    assert basis.replacements_in_window == 1
    # the two of one call do not push each other out; the fixed one stays whatever comes
    assert len(basis.admit(e[:, 5:12])) == 3
    assert torch.equal(basis.rows()[0], e[0])
    basis.prune(keep=0)
    assert basis.live.nonzero().flatten().tolist() == [0]
    full = ProjectionBasis(12, capacity=2)
    full.admit(e[:, :2], fixed=True)
    version = full.version
    assert len(full.admit(e[:, 2:4])) == 0 and full.version == version


def test_saturation_needs_a_full_basis_in_use_that_was_replaced_32_times() -> None:
    e = torch.eye(80)
    basis = ProjectionBasis(80, capacity=10, window=100)
    basis.admit(e[:, :10])
    for count in range(32):
        assert not basis.saturated, count
        assert basis.admit(e[:, 10 + count : 11 + count]).replaced
        basis.record_use(torch.zeros(32, dtype=torch.bool))
    assert basis.saturated and basis.replacements_in_window == 32
    aged = ProjectionBasis(80, capacity=10, window=100)
    aged.load_state_dict(*basis.state_dict())
    for _ in range(70):
        aged.record_use(torch.zeros(32, dtype=torch.bool))
    assert not aged.saturated, "the directions of ninety updates ago are not in use"
    assert len(basis.prune()) == 5
    assert basis.columns == 5 and not basis.saturated and basis.replacements_in_window == 0


def test_prune_keeps_the_fixed_and_the_most_used() -> None:
    basis = ProjectionBasis(16, capacity=8)
    basis.admit(torch.eye(16)[:, :2], fixed=True)
    basis.admit(torch.eye(16)[:, 2:8])
    for slots in ([5, 7], [5, 7], [3, 7]):
        used = torch.zeros(32, dtype=torch.bool)
        used[slots] = True
        basis.record_use(used)
    assert basis.prune(keep=5) == (2, 4, 6)
    assert basis.prune() == (3,)
    assert basis.live.nonzero().flatten().tolist() == [0, 1, 5, 7]
    assert not basis.rows()[~basis.live].any()


def test_grow_keeps_everything() -> None:
    basis = ProjectionBasis(80, capacity=31)
    basis.admit(torch.eye(80)[:, :31])
    rows, generation, version = basis.rows().clone(), basis.generation.clone(), basis.version
    basis.grow(33)
    assert basis.rows().shape == (64, 80) and basis.live.shape == basis.use_counts().shape == (64,)
    assert torch.equal(basis.rows()[:32], rows) and torch.equal(basis.generation[:32], generation)
    assert basis.version == version and basis.stayed(generation).sum() == 31
    assert basis.admit(torch.eye(80)[:, 31:33]).slots == (31, 32)
    assert basis.columns == basis.capacity == 33
    for capacity in (32, 81):
        with pytest.raises(ValueError, match=str(capacity)):
            basis.grow(capacity)


def test_state_survives_files_bit_for_bit_and_goes_on_the_same() -> None:
    generator = torch.Generator().manual_seed(5)
    basis = ProjectionBasis(50, capacity=33, window=50)

    def live_on(target: ProjectionBasis, seed: int) -> None:
        local = torch.Generator().manual_seed(seed)
        for _ in range(40):
            target.admit(torch.randn(50, 2, generator=local), threshold=0.3)
            target.record_use(torch.rand(64, generator=local) < 0.3)
        target.prune(20)

    basis.admit(torch.randn(50, 3, generator=generator), fixed=True)
    live_on(basis, 1)
    tensors, meta = basis.state_dict()
    loaded = ProjectionBasis(50, capacity=4)
    loaded.load_state_dict(
        safetensors.torch.load(safetensors.torch.save(tensors)), json.loads(json.dumps(meta))
    )
    for step in (2, 3):
        one, other = basis.state_dict(), loaded.state_dict()
        assert one[1] == other[1]
        assert all(torch.equal(one[0][key], other[0][key]) for key in one[0])
        assert torch.equal(basis.rows(), loaded.rows())
        live_on(basis, step)
        live_on(loaded, step)


@pytest.mark.parametrize("damage", ["turned", "nan", "slot", "width", "shape"])
def test_damaged_state_is_refused_and_changes_nothing(damage: str) -> None:
    basis = ProjectionBasis(30, capacity=8)
    basis.admit(torch.randn(30, 6, generator=torch.Generator().manual_seed(6)), threshold=0.1)
    target = ProjectionBasis(30, capacity=8)
    target.admit(torch.eye(30)[:, :2])
    rows = target.rows().clone()
    tensors, meta = basis.state_dict()
    if damage == "turned":
        tensors["rows"][0] += 2e-4 * tensors["rows"][1]
    elif damage == "nan":
        tensors["rows"][2, 3] = float("nan")
    elif damage == "slot":
        tensors["fixed"][7] = True
    elif damage == "width":
        meta["d_in"] = 31
    else:
        tensors["rows"] = tensors["rows"][1:]
    with pytest.raises(ValueError):
        target.load_state_dict(tensors, meta)
    assert torch.equal(target.rows(), rows) and target.columns == 2


def test_condition_and_check() -> None:
    basis = ProjectionBasis(5, capacity=3)
    assert basis.condition() == 1 and basis.deviation() == 0
    basis.admit(torch.eye(5)[:, :3])
    assert basis.condition() == 1
    basis.check()
    basis.rows()[1] *= 0.001
    assert basis.condition() == pytest.approx(1e6)
    with pytest.raises(ValueError, match="damaged"):
        basis.check()
    basis.rows()[1] = basis.rows()[0]
    assert basis.condition() > 1e12
    basis.rows()[1, 1] = float("nan")
    assert math.isinf(basis.condition())
    with pytest.raises(ValueError, match="damaged"):
        basis.check()


@pytest.mark.parametrize(("d_in", "capacity"), [(10, 0), (10, 11), (1000, 513), (10, -1)])
def test_capacity_out_of_range(d_in: int, capacity: int) -> None:
    with pytest.raises(ValueError, match="capacity"):
        ProjectionBasis(d_in, capacity=capacity)


def test_wrong_use_is_told() -> None:
    basis = ProjectionBasis(10, capacity=10)
    basis.admit(torch.eye(10)[:, :3])
    with pytest.raises(ValueError, match="window"):
        ProjectionBasis(10, capacity=4, window=15)
    with pytest.raises(ValueError, match="candidates"):
        basis.admit(torch.zeros(9, 1))
    with pytest.raises(ValueError, match="threshold"):
        basis.admit(torch.eye(10), threshold=1.0)
    with pytest.raises(ValueError, match="expected bool"):
        basis.record_use(torch.zeros(10, dtype=torch.bool))
    for slots in ([0, 3], [-1], [99]):
        with pytest.raises(ValueError, match="no direction"):
            basis.release(slots)
    assert basis.columns == 3
