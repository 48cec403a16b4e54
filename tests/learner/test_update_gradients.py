"""Gradients of an update against autograd's on a bare copy of the model, and updates that are dropped half-way."""

import copy
import re
from collections.abc import Callable, Collection, Generator
from typing import Any, TypeVar

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from ogpstream.learner import LearnerConfig, Sample, StreamLearner
from ogpstream.learner.activations import ActivationPlan
from ogpstream.learner.lesson import Lesson
from ogpstream.learner.protection import Protection
from ogpstream.learner.sites import Attachment, GradientSink, attach
from ogpstream.learner.step import sample_gradients
from ogpstream.learner.update import Updater
from ogpstream.learner.walk import LayerWalk
from ogpstream.memory.adapters import AdapterStore
from ogpstream.memory.experts import Held
from ogpstream.memory.layout import Layout

TinyModel = Callable[..., tf.PreTrainedModel]
T = TypeVar("T")

EXACT = 1e-9
PROMPT = 4
KEEP = ActivationPlan("keep", 1, 0)
PLANS = [KEEP, *(ActivationPlan("every", k, 0) for k in (1, 2, 3)), ActivationPlan("offload", 1, 0)]


def _ids(seed: int, length: int = 11) -> list[int]:
    ids: list[int] = torch.randint(4, 101, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


def _exhaust(work: Generator[str, None, T]) -> tuple[list[str], T]:
    units = []
    while True:
        try:
            units.append(next(work))
        except StopIteration as end:
            result: T = end.value
            return units, result


def _serve(attachment: Attachment) -> AdapterStore:
    """Ranks 3 and 2, gates 0.25 and 0.75, and held parts of ranks 2 and 1."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return 0.1 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    store = AdapterStore(attachment.shapes, dtype=torch.float64)
    for name, rank, scaling, gate in (("default", 3, 0.5, 0.25), ("other", 2, 2.0, 0.75)):
        expert = store.create(name, rank, scaling, normal(store.layout(rank).numel))
        expert.held = [Held(normal(s.d_in, rank - 1), normal(rank - 1, s.d_out)) for s in attachment.shapes]
        store.activate(name, gate)
    attachment.binding.served = store.publish()
    return store


class _Plus(nn.Module):
    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta


def _autograd(
    bare: tf.PreTrainedModel, attachment: Attachment, store: AdapterStore, name: str, ids: list[int], prompt: int
) -> tuple[float, Tensor]:
    """Loss of a plain model with weights W + sum_e gate_e W_e, and its gradient for the slab of one expert."""
    model = copy.deepcopy(bare)
    leaf = store.expert(name).factors.clone().requires_grad_()
    for index, site in enumerate(attachment.sites):
        delta = torch.zeros(site.shape.d_in, site.shape.d_out, dtype=torch.float64)
        for other, gate in store.active.items():
            expert = store.expert(other)
            slab = leaf if other == name else expert.factors
            a, b, held = expert.layout.a(slab, index), expert.layout.b(slab, index), expert.held[index]
            delta = delta + gate * (expert.scaling * a @ b + held.U @ held.V)
        linear = model.get_submodule(site.name)
        turned = delta if type(linear) is Conv1D else delta.T
        parametrize.register_parametrization(linear, "weight", _Plus(turned), unsafe=True)
    tokens = torch.tensor([ids])
    labels = tokens.clone()
    labels[:, :prompt] = -100
    output = model(input_ids=tokens, labels=labels)
    loss = nn.functional.cross_entropy(output.logits[0, prompt - 1 : -1], tokens[0, prompt:])
    # transformers' own loss is made from float32 logits
    assert abs(output.loss.item() - loss.item()) <= 1e-5
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.item(), gradient


def _units(plan: ActivationPlan, layers: int, chunks: int) -> list[str]:
    """Those of one gradient; of a segment of k layers, all but the last are computed a third time for their inputs."""
    backward: list[str] = []
    for stop in range(layers, 0, -1):
        inside = (stop - 1) % plan.every
        first = stop == layers or stop % plan.every == 0
        again = 0 if plan.policy == "keep" else 1 + (inside if first else 0)
        backward += [*["recompute"] * again, "backward"]
    return ["plan", *["forward"] * layers, *["loss"] * chunks, *backward]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma", "gpt2"])
def test_gradients_and_loss_of_a_sample(tiny_model: TinyModel, family: str) -> None:
    """Under every policy, with segments that divide five layers and segments that do not."""
    model = tiny_model(family, dtype=torch.float64, num_hidden_layers=5)
    bare = copy.deepcopy(model)
    attachment = attach(model, rank=3, target_modules="all-linear")
    store, walk, ids = _serve(attachment), LayerWalk(model), _ids(1)
    for name, chunk in (("default", 128), ("other", 3)):
        expected, gradient = _autograd(bare, attachment, store, name, ids, PROMPT)
        # the leaf of a wrong expert, or a zero gradient, would agree with nothing
        assert float(gradient.abs().max()) > 1e-3
        slabs = []
        for plan in PLANS:
            sink = GradientSink(store.expert(name).layout, name, dtype=torch.float64)
            work = sample_gradients(walk, attachment.binding, [sink], [(ids, PROMPT)], chunk=chunk, activations=plan)
            units, ((loss, _),) = _exhaust(work)
            assert abs(loss - expected) <= EXACT
            assert float((sink.slab - gradient).abs().max()) <= EXACT * float(gradient.abs().max())
            assert units == _units(plan, 5, -(-(len(ids) - PROMPT) // chunk))
            slabs.append(sink.slab)
        assert all(torch.equal(slab, slabs[0]) for slab in slabs)
    assert attachment.binding.sinks == ()


def _of_sites(layout: Layout, sites: Collection[int]) -> Tensor:
    """Mask of the elements of a slab that belong to these sites."""
    mask = torch.zeros(layout.numel, dtype=torch.bool)
    for site in sites:
        layout.a(mask, site).fill_(True)
        layout.b(mask, site).fill_(True)
    return mask


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma", "gemma2", "gpt2"])
def test_gradients_of_the_top_layers_alone(tiny_model: TinyModel, family: str) -> None:
    """Autograd's for the linears of these layers, under every policy; nothing for those below, whose forward runs."""
    model = tiny_model(family, dtype=torch.float64, num_hidden_layers=5)
    bare = copy.deepcopy(model)
    attachment = attach(model, rank=3, target_modules="all-linear")
    store, ids = _serve(attachment), _ids(1)
    config = LearnerConfig(guard="none")
    updater = Updater(attachment, store, Protection(attachment.shapes, config), config)
    layout = store.expert("other").layout
    _, gradient = _autograd(bare, attachment, store, "other", ids, PROMPT)
    depth = {name: int(re.findall(r"\.(\d+)\.", name)[0]) for name in (site.name for site in attachment.sites)}
    for layers in (1, 2, 4):
        sites = updater.sites_of(layers)
        assert sites == {site.index for site in attachment.sites if depth[site.name] >= 5 - layers}
        expected = torch.where(_of_sites(layout, sites), gradient, 0.0)
        slabs = []
        for plan in PLANS:
            sink = GradientSink(layout, "other", dtype=torch.float64)
            units, _ = _exhaust(sample_gradients(updater.walk, attachment.binding, [sink], [(ids, PROMPT)], chunk=128,
                                                 activations=plan, layers=layers))
            assert float((sink.slab - expected).abs().max()) <= EXACT * float(gradient.abs().max())
            whole = _units(plan, layers, 1)
            assert units == [whole[0], *["forward"] * (5 - layers), *whole[1:]]
            slabs.append(sink.slab)
        assert all(torch.equal(slab, slabs[0]) for slab in slabs)
    assert attachment.binding.sinks == ()


def test_a_layer_that_is_called_twice_is_trained_by_its_call_above(tiny_model: TinyModel) -> None:
    model = tiny_model("llama", dtype=torch.float64, num_hidden_layers=3)
    model.model.layers[2] = model.model.layers[0]
    attachment = attach(model, rank=3, target_modules="all-linear")
    config = LearnerConfig(guard="none")
    updater = Updater(attachment, _serve(attachment), Protection(attachment.shapes, config), config)
    named = {layers: {site.name.split(".")[2] for site in attachment.sites if site.index in updater.sites_of(layers)}
             for layers in (1, 2, 3)}
    assert updater.depth == 3
    assert named == {1: {"0"}, 2: {"0", "1"}, 3: {"0", "1"}}


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma", "gpt2"])
def test_samples_that_share_a_forward_have_their_own_gradients(tiny_model: TinyModel, family: str) -> None:
    attachment = attach(tiny_model(family, dtype=torch.float64), rank=3, target_modules="all-linear")
    assert attachment.batches
    store, walk = _serve(attachment), LayerWalk(attachment.model)
    samples = [(_ids(1, 11), PROMPT), (_ids(2, 6), 5), (_ids(3, 9), 1)]
    layout = store.expert("default").layout

    def run(part: list[tuple[list[int], int]]) -> tuple[list[str], list[tuple[float, Tensor]]]:
        sinks = [GradientSink(layout, "default", dtype=torch.float64) for _ in part]
        units, readings = _exhaust(sample_gradients(walk, attachment.binding, sinks, part, chunk=4, activations=KEEP))
        return units, [(reading.loss, sink.slab) for reading, sink in zip(readings, sinks, strict=True)]

    units, together = run(samples)
    assert units.count("forward") == units.count("backward") == 2
    for sample, (loss, slab) in zip(samples, together, strict=True):
        _, ((alone, expected),) = run([sample])
        assert abs(loss - alone) <= EXACT
        assert float((slab - expected).abs().max()) <= EXACT * float(expected.abs().max())


def test_lessons_share_a_forward_as_long_as_they_are_short(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = StreamLearner(tiny_model("llama"), config=LearnerConfig(rank=3, warm_start=False, shared_tokens=24))
    lessons = [Lesson(_ids(seed, length), PROMPT, again=False) for seed, length in enumerate((8, 8, 8, 9, 11, 30, 5))]
    lengths = [[len(one.ids) for one in group] for group in learner._updater.groups(lessons)]
    assert lengths == [[8, 8, 8], [9, 11], [30], [5]]
    # the linears of routed experts see tokens of all samples mixed
    monkeypatch.setattr(learner.attachment, "batches", False)
    assert [len(group) for group in learner._updater.groups(lessons)] == [1] * 7
    learner.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_policies_give_the_same_bits(tiny_model: TinyModel, dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype, num_hidden_layers=5)
    attachment = attach(model, rank=3, target_modules="all-linear")
    store, walk, ids = AdapterStore(attachment.shapes, serve_dtype=dtype), LayerWalk(model), _ids(1, 90)
    slab = torch.randn(store.layout(3).numel, generator=torch.Generator().manual_seed(2))
    expert = store.create("default", 3, 0.5, slab)
    store.activate("default")
    attachment.binding.served = store.publish()
    found = []
    for plan in PLANS:
        sink = GradientSink(expert.layout, "default")
        work = sample_gradients(walk, attachment.binding, [sink], [(ids, PROMPT)], chunk=16, activations=plan)
        found.append((_exhaust(work)[1], sink.slab))
    assert float(found[0][1].abs().max()) > 0
    assert all(reading == found[0][0] and torch.equal(slab, found[0][1]) for reading, slab in found)


@pytest.mark.parametrize(("length", "prompt"), [(2, 1), (9, 8), (9, 1)])
def test_chunks_of_the_loss_make_no_difference(tiny_model: TinyModel, length: int, prompt: int) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    attachment = attach(model, rank=3)
    store, walk, ids = _serve(attachment), LayerWalk(model), _ids(3, length)
    results = []
    for chunk in (1, 2, 7, 128):
        sink = GradientSink(store.expert("default").layout, "default", dtype=torch.float64)
        work = sample_gradients(walk, attachment.binding, [sink], [(ids, prompt)], chunk=chunk, activations=KEEP)
        _, ((loss, _),) = _exhaust(work)
        results.append((loss, sink.slab))
    for loss, slab in results[1:]:
        assert abs(loss - results[0][0]) <= EXACT
        assert torch.allclose(slab, results[0][1], rtol=0, atol=EXACT)


@pytest.mark.parametrize("ratio", [1.0, 3.0])
def test_an_update_is_one_step_on_the_sum_of_the_gradients(tiny_model: TinyModel, ratio: float) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    bare = copy.deepcopy(model)
    attachment = attach(model, rank=3, target_modules="all-linear")
    store = _serve(attachment)
    config = LearnerConfig.literal(guard="none", lr=0.5, loraplus_lr_ratio=ratio)
    updater = Updater(attachment, store, Protection(attachment.shapes, config), config)
    lessons = [Lesson(_ids(seed, 6 + seed), PROMPT, again=False) for seed in (1, 2)]
    expected = [_autograd(bare, attachment, store, "other", list(one.ids), PROMPT) for one in lessons]
    other, default = store.expert("other").factors, store.expert("default").factors
    served = attachment.binding.served
    _, report = _exhaust(updater.run("other", lessons))
    assert report.losses == pytest.approx([loss for loss, _ in expected], abs=EXACT)
    assert report.gradient_norms == pytest.approx([float(g.norm()) for _, g in expected], rel=EXACT)
    step = 0.5 * (expected[0][1] + expected[1][1])
    step[store.expert("other").layout.a_numel :] *= ratio
    assert torch.allclose(store.expert("other").factors, other - step, rtol=0, atol=EXACT)
    assert store.expert("default").factors is default
    now = attachment.binding.served
    assert now is not None and served is not None and now.version == served.version + 1


def _learner(tiny_model: TinyModel, **changes: Any) -> StreamLearner:
    values: dict[str, Any] = dict(rank=3, lr=0.02, basis_columns=8, learned_below=6.0, learned_share=0.0,
                                  warm_samples=2, warm_tokens=8)
    learner = StreamLearner(tiny_model("llama"), config=LearnerConfig(**{**values, **changes}))
    learner.add_expert("other")
    for seed in range(3):
        learner.learn_one(_sample(seed))
    learner.consolidate()
    return learner


def _sample(seed: int, expert: str = "default") -> Sample:
    ids = _ids(seed)
    return Sample(prompt_ids=tuple(ids[:PROMPT]), completion_ids=tuple(ids[PROMPT:]), id=str(seed), expert=expert)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("guard", ["fold", "gradient"])
def test_an_update_dropped_at_any_unit_changes_nothing(tiny_model: TinyModel, guard: str, optimizer: str) -> None:
    whole, learner = (_learner(tiny_model, guard=guard, optimizer=optimizer) for _ in range(2))
    before = learner.state_sha256()
    assert before == whole.state_sha256()
    assert learner.state.protection.columns > 0
    units, _ = _exhaust(whole.step(_sample(9)))
    # the specification's form lets P grow by what a first look says
    own = {"average"} if guard == "fold" else {"growth"}
    assert {"plan", "forward", "loss", "backward", "norm", "gradient", "optimizer", "anchor", "projection",
            "publish", *own} == set(units)
    version = learner.version
    for stop in range(1, len(units) + 1):
        # the first call acknowledges the sample, the others find it pending
        work: Generator[str, None, Any] = learner.step(_sample(9)) if stop == 1 else learner.queue.drain()
        assert [next(work) for _ in range(stop)] == units[:stop]
        work.close()
        assert learner.state_sha256() == before, f"dropped after unit {stop}, {units[stop - 1]!r}"
        assert (learner.pending, learner.version) == (1, version)
    learner.drain()
    assert learner.pending == 0
    assert learner.state_sha256() == whole.state_sha256() != before
    # and so does the work after it
    assert learner.learn_one(_sample(10)).loss == whole.learn_one(_sample(10)).loss
    assert learner.state_sha256() == whole.state_sha256()


def test_a_sample_dropped_between_its_updates_goes_on_after_the_first(tiny_model: TinyModel) -> None:
    """With a replayed sample, and with an expert that has to be activated first."""
    whole, learner = (_learner(tiny_model, replay_every=1) for _ in range(2))
    sample = _sample(9, expert="other")
    units, _ = _exhaust(whole.step(sample))
    assert units.count("optimizer") == 2
    # the units of the first update, before the second one plans its forward
    first = units.index("plan", units.index("plan") + 1)
    before = learner.state_sha256()
    states = []
    for stop in range(1, len(units) - first + 1):
        work: Generator[str, None, Any] = learner.step(sample) if stop == 1 else learner.queue.drain()
        for _ in range(first + stop if stop == 1 else stop):
            next(work)
        work.close()
        states.append(learner.state_sha256())
        assert learner.pending == 1
    assert len(set(states)) == 1 and states[0] != before
    learner.drain()
    assert learner.state_sha256() == whole.state_sha256() != states[0]


def test_the_next_sample_finishes_a_dropped_one_first(tiny_model: TinyModel) -> None:
    whole, learner = (_learner(tiny_model) for _ in range(2))
    work = learner.step(_sample(9))
    for _ in range(4):
        next(work)
    work.close()
    learner.learn_one(_sample(10))
    whole.learn_one(_sample(9))
    whole.learn_one(_sample(10))
    assert learner.state_sha256() == whole.state_sha256()


def test_what_counts_as_certain_is_what_greedy_decoding_gives(tiny_model: TinyModel) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    attachment = attach(model, rank=3)
    store, walk, ids = _serve(attachment), LayerWalk(model), _ids(3, 12)
    with torch.no_grad():
        chances = model(input_ids=torch.tensor([list(ids)])).logits[0, PROMPT - 1 : -1].softmax(-1)
    share = float((chances.gather(1, torch.tensor(list(ids[PROMPT:]))[:, None]) > 0.5).double().mean())
    sink = GradientSink(store.expert("default").layout, "default", dtype=torch.float64)
    _, (reading,) = _exhaust(
        sample_gradients(walk, attachment.binding, [sink], [(ids, PROMPT)], chunk=5, activations=KEEP)
    )
    assert reading.certain == pytest.approx(share)
    # the model's own greedy continuation, sharpened, is certain
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.mul_(1e3)
        greedy = list(ids[:PROMPT])
        for _ in range(4):
            greedy.append(int(model(input_ids=torch.tensor([greedy])).logits[0, -1].argmax()))
    _, (reading,) = _exhaust(
        sample_gradients(walk, attachment.binding, [sink], [(greedy, PROMPT)], chunk=5, activations=KEEP)
    )
    assert reading.certain == 1.0
