"""Routing by prompt: a new expert after a drift, samples that go where their prompts are answered, frozen experts."""

import contextlib
import functools
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel

from ogpstream.learner import Sample, StreamLearner
from ogpstream.learner import state as state_module
from ogpstream.learner.binding import GradientSink
from ogpstream.learner.errors import ConfigError, StateError
from ogpstream.memory.adapters import AdapterStore

TinyModel = Callable[..., tf.PreTrainedModel]
MakeLearner = Callable[..., StreamLearner]

ROUTED: dict[str, Any] = dict(routing="prompt", served_to="scope", experts=3, ring_samples=64, rehearsals=1,
                              target_modules="all-linear")


def _prompt(domain: int, seed: int) -> tuple[int, ...]:
    """Nine of the twelve words of a domain and an end that all share."""
    words = random.Random(f"{domain}/{seed}").sample(range(10 + 20 * domain, 22 + 20 * domain), 9)
    return (*words, 5, 6)


def _sample(domain: int, seed: int, **fields: Any) -> Sample:
    return Sample(prompt_ids=_prompt(domain, seed), completion_ids=(75 + 5 * domain, 76 + 5 * domain),
                  id=f"{domain}-{seed}", **fields)


def _stream(*domains: int, count: int = 60) -> Iterator[Sample]:
    return (_sample(domain, 1000 * place + seed) for place, domain in enumerate(domains) for seed in range(count))


def _abandon(learner: StreamLearner) -> None:
    """Leave the folder as it is, without a last snapshot."""
    learner.queue.applier.folder.close()
    learner.queue.close()
    learner.attachment.detach()


def _killed_and_loaded(learner: StreamLearner, tiny_model: TinyModel, state_dir: Path) -> StreamLearner:
    _abandon(learner)
    return StreamLearner.load_state(state_dir, tiny_model("llama", num_hidden_layers=1))


def _answered(learner: StreamLearner, domain: int, name: str) -> float:
    prompts = [_prompt(domain, seed) for seed in range(9000, 9050)]
    return sum(learner.answering(list(prompt)) == (name,) for prompt in prompts) / 50


def test_after_a_drift_a_new_expert_learns_and_each_answers_its_own(make: MakeLearner) -> None:
    learner = make(**ROUTED)
    learner.learn_batch(_stream(0))
    before = learner.state.store.expert("default").steps
    assert learner.experts == ("default",) and before
    learner.learn_batch(_stream(1))
    assert learner.experts == ("default", "default-2")
    # the few until it was noticed, and what these rehearsed; no sample of the second domain afterwards
    assert learner.state.store.expert("default").steps - before <= 16
    assert learner.state.store.expert("default-2").steps > 50
    assert _answered(learner, 0, "default") > 0.9 and _answered(learner, 1, "default-2") > 0.9
    # those until then were handed over
    experts = {learner.state.ring.get(slot).expert for slot in learner.state.ring.slots
               if int(learner.state.ring.get(slot).ids[0]) >= 30}
    assert experts == {"default-2"}


def test_what_comes_again_goes_to_who_knows_it(make: MakeLearner) -> None:
    learner = make(**ROUTED)
    learner.learn_batch(_stream(0, 1, 0, 1))
    assert learner.experts == ("default", "default-2")
    steps = [learner.state.store.expert(name).steps for name in learner.experts]
    assert min(steps) > 100


def test_without_a_place_the_old_one_goes_on(make: MakeLearner) -> None:
    learner = make(**{**ROUTED, "experts": 1})
    learner.learn_batch(_stream(0, 1))
    assert learner.experts == ("default",)


def test_what_is_mixed_from_the_start_is_one_experts(make: MakeLearner) -> None:
    learner = make(**ROUTED)
    samples = list(_stream(0, 1))
    random.Random(0).shuffle(samples)
    learner.learn_batch(samples)
    assert learner.experts == ("default",)


def test_an_expert_computes_and_learns_alone(make: MakeLearner) -> None:
    learner = make(**ROUTED)
    learner.learn_batch(_stream(0, 1))
    store, model = learner.state.store, learner.model
    ids = torch.tensor([list(_prompt(0, 9001))])
    assert learner.answering(ids[0].tolist()) == ("default",)
    with torch.no_grad():
        routed = model(input_ids=ids).logits
        learner.activate({"default": 1.0})
        alone = model(input_ids=ids).logits
        assert torch.allclose(routed, alone, rtol=0, atol=1e-3)
        learner.activate({"default-2": 1.0})
        assert not torch.allclose(model(input_ids=ids).logits, alone, rtol=0, atol=1e-2)
    learner.activate({"default": 1.0, "default-2": 1.0})
    before = [store.expert("default").delta(index) for index in range(2)]
    report = learner.learn_one(_sample(1, 5000))
    assert learner.state.routes.newest == "default-2" and report.loss is not None
    after = [store.expert("default").delta(index) for index in range(2)]
    assert all(map(torch.equal, before, after))
    with torch.no_grad(), learner.attachment.binding.using(store.served.only(["default-2"])):
        full = torch.tensor([[*_prompt(1, 5001), 80, 81]])
        labels = full.clone()
        labels[:, :11] = -100
        loss = float(model(input_ids=full, labels=labels).loss)
    sample = Sample(prompt_ids=_prompt(1, 5001), completion_ids=(80, 81))
    assert learner.learn_one(sample).loss == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize("stop", [61, 64, 67, 90])
def test_a_killed_run_ends_as_the_other_one(make: MakeLearner, tiny_model: TinyModel, tmp_path: Path, stop: int
                                            ) -> None:
    samples = list(_stream(0, 1, count=60))
    whole = make(**ROUTED)
    whole.learn_batch(samples)
    killed = make(state_dir=tmp_path / "state", **ROUTED)
    killed.learn_batch(samples[:stop])
    again = _killed_and_loaded(killed, tiny_model, tmp_path / "state")
    again.learn_batch(samples[stop:])
    assert again.experts == ("default", "default-2")
    assert again.state_sha256() == whole.state_sha256()
    again.close()


@pytest.mark.parametrize("unit", (1, 4, 9))
def test_an_aborted_step_ends_as_the_other_one(make: MakeLearner, unit: int) -> None:
    """Around the sample before which the new expert is made."""
    samples = list(_stream(0, 1, count=60))

    def learned(abort: bool) -> str:
        learner = make(**ROUTED)
        learner.learn_batch(samples[:61])
        for sample in samples[61:80]:
            if abort:
                step = learner.step(sample)
                for _ in range(unit):
                    next(step, None)
                step.close()
            learner.learn_one(sample)
        assert learner.experts == ("default", "default-2")
        return learner.state_sha256()

    assert learned(abort=True) == learned(abort=False)


def test_without_memory_for_a_new_expert_the_old_one_goes_on_and_recovery_too(
    make: MakeLearner, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real, failed = AdapterStore.building, []

    def building(self: AdapterStore, active: dict[str, float], *args: Any, **more: Any) -> Any:
        # for the third expert, when the second is folded against an older P
        if len(active) > 2 and not failed:
            failed.append(active)
            raise torch.OutOfMemoryError("no room")
        return real(self, active, *args, **more)

    learner = make(state_dir=tmp_path / "state", **ROUTED)
    learner.add_expert("law")
    learner.learn_batch(_sample(2, seed, expert="law") for seed in range(10))
    samples = list(_stream(0, 1))
    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        patch.setattr(AdapterStore, "building", building)
        learner.learn_batch(samples)
    assert failed and "out of memory for a new expert" in caplog.text
    # by the next samples it knew enough of what was new
    assert learner.experts == ("default", "law")
    sha = learner.state_sha256()
    again = _killed_and_loaded(learner, tiny_model, tmp_path / "state")
    assert again.state_sha256() == sha
    again.close()


def test_a_frozen_expert_stays_and_says_so(make: MakeLearner, tiny_model: TinyModel, tmp_path: Path) -> None:
    learner = make(state_dir=tmp_path / "state", **ROUTED)
    learner.learn_batch(_stream(0, 1))
    learner.freeze("default")
    store = learner.state.store
    before = [store.expert("default").delta(index) for index in range(2)]
    report = learner.learn_one(_sample(0, 7000))
    assert report.status == "rejected" and "'default'" in str(report.reason) and "unfreeze" in str(report.reason)
    learner.learn_batch(_sample(1, seed) for seed in range(7100, 7120))
    learner.consolidate(40)
    assert all(map(torch.equal, before, (store.expert("default").delta(index) for index in range(2))))
    assert learner.status()["frozen"] == ["default"]
    learner.save_state()
    sha = learner.state_sha256()
    again = _killed_and_loaded(learner, tiny_model, tmp_path / "state")
    assert again.state_sha256() == sha and again.status()["frozen"] == ["default"]
    again.unfreeze("default")
    again.save_state()
    # the same sample is welcome now, and those that it knows as it knew its own are its own again
    assert [again.learn_one(_sample(0, seed)).status for seed in range(7000, 7004)] == ["learned"] * 4
    assert not torch.equal(again.state.store.expert("default").delta(0), before[0])
    sha = again.state_sha256()
    again.close()
    # from the snapshot before that sample, in which the expert was not folded yet
    once_more = StreamLearner.load_state(tmp_path / "state", tiny_model("llama", num_hidden_layers=1))
    assert once_more.state_sha256() == sha
    once_more.close()


def test_with_all_frozen_a_new_one_begins_with_what_is_new(
    make: MakeLearner, caplog: pytest.LogCaptureFixture
) -> None:
    learner = make(**ROUTED)
    learner.learn_batch(_stream(0, count=40))
    learner.freeze("default")
    # what it answers is rejected
    assert [learner.learn_one(_sample(0, seed)).status for seed in range(500, 504)] == ["rejected"] * 4
    assert learner.experts == ("default",)
    assert learner.learn_one(_sample(1, 0)).status == "learned"
    assert learner.experts == ("default", "default-2")
    assert caplog.messages[-1] == "all others are frozen: the expert 'default-2' begins"
    experts = Counter(learner.state.ring.get(slot).expert for slot in learner.state.ring.slots)
    assert experts == {"default": 40, "default-2": 1}


def test_a_rollback_leaves_the_frozen_ones_frozen(make: MakeLearner, tmp_path: Path) -> None:
    learner = make(state_dir=tmp_path / "state", **ROUTED)
    learner.learn_batch(_stream(0, count=5))
    learner.save_state()
    good = learner.version
    learner.learn_batch(_stream(1, count=3))
    learner.freeze("default")
    learner.rollback(good)
    assert learner.status()["frozen"] == ["default"]


@pytest.mark.parametrize("routed", [False, True])
def test_with_nobody_to_rehearse_the_stream_goes_on(
    make: MakeLearner, tiny_model: TinyModel, tmp_path: Path, routed: bool
) -> None:
    """Every 16th sample brings an old one with it, and all of these are of a frozen expert."""
    learner = make(state_dir=tmp_path / "state", **(ROUTED if routed else {}))
    learner.add_expert("law")
    for seed in range(15):
        learner.learn_one(_sample(0, seed))
    learner.freeze("default")
    assert learner.learn_one(_sample(1, 0, expert="law")).status == "learned"
    assert learner.learn_one(_sample(1, 1, expert="law")).status == "learned"
    sha = learner.state_sha256()
    again = _killed_and_loaded(learner, tiny_model, tmp_path / "state")
    assert again.state_sha256() == sha
    again.close()


def test_a_correction_goes_to_who_learned_the_prompt(make: MakeLearner) -> None:
    learner = make(**ROUTED)
    learner.learn_batch(_stream(0, 1))
    ring, routes = learner.state.ring, learner.state.routes
    slot = next(slot for slot in map(ring.get, ring.slots) if slot.expert == "default")
    prompt = tuple(slot.ids[: slot.prompt_length].tolist())
    assert routes.newest == "default-2" and learner.answering(list(prompt)) == ("default",)
    steps = learner.state.store.expert("default").steps
    report = learner.learn_one(Sample(prompt_ids=prompt, completion_ids=(90, 91)))
    assert report.status == "learned" and report.loss is not None and report.loss > 2
    assert learner.state.store.expert("default").steps == steps + 1
    asked = [ring.get(other) for other in ring.asking(prompt)]
    assert [(one.expert, one.ids[one.prompt_length :].tolist()) for one in asked] == [("default", [90, 91])]
    # it is no sign of another domain
    assert learner.state.routes == routes


def test_an_adapter_from_elsewhere_takes_part_in_an_update(make: MakeLearner, tmp_path: Path) -> None:
    other = make()
    for seed in range(8):
        other.learn_one(_sample(1, seed))
    other.export_peft(tmp_path / "adapter")
    learner = make(**{**ROUTED, "target_modules": ("q_proj", "down_proj")})
    learner.import_peft(tmp_path / "adapter", "ext")
    learner.activate({"default": 1.0, "ext": 1.0})
    ids = torch.tensor([[*_prompt(1, 5001), 80, 81]])
    labels = ids.clone()
    labels[:, :11] = -100
    with torch.no_grad():
        served = float(learner.model(input_ids=ids, labels=labels).loss)
    report = learner.learn_one(Sample(prompt_ids=_prompt(1, 5001), completion_ids=(80, 81)))
    assert report.loss == pytest.approx(served, abs=1e-4)
    # one that is away comes back before a new one begins
    learner.activate({"ext": 1.0})
    learner.learn_one(_sample(0, 0))
    assert learner.experts == ("default", "ext") and learner.state.store.expert("default").steps == 2


def test_a_name_that_routing_gives_is_not_taken(make: MakeLearner) -> None:
    with pytest.raises(ConfigError, match="a name that routing gives"):
        make(**ROUTED).add_expert("default-2")
    make().add_expert("default-2")


def test_a_fold_that_comes_late_is_served(make: MakeLearner, tiny_model: TinyModel, tmp_path: Path) -> None:
    """Though nothing else comes of the update: all of its samples are settled."""
    config = {**ROUTED, "settled_below": 2.5, "basis_columns": 32}
    learner = make(state_dir=tmp_path / "state", **config)
    learner.add_expert("other")
    learner.activate({"default": 1.0, "other": 1.0})
    learner.learn_batch(_stream(0, count=20))
    store = learner.state.store
    late = 0
    for turn in range(6):
        # what is new to P joins by the other one
        learner.learn_batch([_sample(2, 20 * turn + seed, expert="other") for seed in range(3)])
        late += not learner.state.protection.has_folded(store.expert("default"))
        learner.consolidate(4)
        for index, pack in enumerate(store.served.packs):
            for name in store.active:
                assert torch.equal(pack.A[:, pack.trained[name]], store.expert(name).a(index))
        learner.learn_one(_sample(turn % 2, 6000 + turn))
    assert late > 0


def test_a_named_expert_is_not_asked(make: MakeLearner) -> None:
    learner = make(**ROUTED)
    learner.add_expert("law")
    learner.learn_one(_sample(0, 0, expert="law"))
    assert learner.state.store.expert("law").steps == 1 and learner.state.store.expert("default").steps == 0


def test_a_frozen_expert_by_name_learns_nothing_either(make: MakeLearner) -> None:
    learner = make()
    learner.learn_batch(_stream(0, count=10))
    learner.freeze("default")
    before, gradients = learner.state.store.expert("default").delta(0), learner.state.counters.gradients
    assert learner.learn_one(_sample(0, 100)).status == "rejected"
    # nothing at hand is anybody else's
    learner.consolidate(5)
    assert torch.equal(learner.state.store.expert("default").delta(0), before)
    assert learner.state.counters.gradients == gradients
    learner.unfreeze("default")
    assert learner.learn_one(_sample(0, 101)).status == "learned"


def test_all_experts_are_exported_as_peft_lays_them_out(make: MakeLearner, tiny_model: TinyModel, tmp_path: Path
                                                        ) -> None:
    learner = make(**ROUTED)
    learner.learn_batch(_stream(0, 1))
    folders = learner.export_experts(tmp_path / "out")
    assert folders == (tmp_path / "out", tmp_path / "out" / "default-2")
    for name, folder in zip(learner.experts, folders, strict=True):
        tuned = PeftModel.from_pretrained(tiny_model("llama", num_hidden_layers=1), folder)
        ids = torch.tensor([list(_prompt(0, 1))])
        with torch.no_grad(), learner.attachment.binding.using(learner.state.store.served, frozenset([name])):
            torch.testing.assert_close(tuned(input_ids=ids).logits, learner.model(input_ids=ids).logits,
                                       atol=1e-5, rtol=1e-5)
    with pytest.raises(StateError, match="holds an adapter already"):
        learner.export_experts(tmp_path / "out")
    learner.export_experts(tmp_path / "out", replace=True)


def test_several_experts_cannot_be_served_to_all(make: MakeLearner, tiny_model: TinyModel, tmp_path: Path) -> None:
    """One may, and what the journal holds is applied with prompts looked at before."""
    for count, folder in ((20, "one"), (60, "two")):
        learner = make(state_dir=tmp_path / folder, **ROUTED)
        learner.learn_batch(_stream(0, 1, count=count))
        sha = learner.state_sha256()
        _abandon(learner)
        load = functools.partial(StreamLearner.load_state, tmp_path / folder, tiny_model("llama", num_hidden_layers=1))
        if len(learner.experts) > 1:
            with pytest.raises(ConfigError, match="default, default-2 have learned prompts of their own"):
                load(served_to="all")
            assert load().state_sha256() == sha
            continue
        again = load(served_to="all")
        assert again.state_sha256() == sha and again.answering([90, 91]) == ("default",)
        again.close()


def test_who_is_served_is_kept_with_what_is_learned_then(make: MakeLearner, tiny_model: TinyModel, tmp_path: Path
                                                         ) -> None:
    """A kill behind the change is recovered under it, and back there are experts again."""
    learner = make(state_dir=tmp_path / "state", **ROUTED)
    learner.learn_batch(_stream(0))
    learner.close()
    load = functools.partial(StreamLearner.load_state, tmp_path / "state", tiny_model("llama", num_hidden_layers=1))
    everywhere = load(served_to="all")
    everywhere.learn_batch(_stream(1, count=40))
    assert everywhere.experts == ("default",)
    sha = everywhere.state_sha256()
    _abandon(everywhere)
    again = load()
    assert again.config.served_to == "all" and again.state_sha256() == sha
    again.close()
    routed = load(served_to="scope")
    routed.learn_batch(_stream(0, 2))
    assert routed.config.routes and len(routed.experts) > 1
    routed.close()


def test_named_experts_beyond_the_number_take_nobody_s_place(make: MakeLearner) -> None:
    learner = make(**{**ROUTED, "experts": 2})
    learner.learn_batch(_stream(0, 1))
    for seed, name in enumerate(("law", "med")):
        learner.add_expert(name)
        learner.learn_one(_sample(2, seed, expert=name))
    assert set(learner.state.store.active) == {"default", "default-2", "law", "med"}
    assert _answered(learner, 0, "default") > 0.9


def test_memory_that_runs_out_while_an_expert_is_made_leaves_nothing_of_it(
    make: MakeLearner, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third description of the samples that it is to take over fails."""
    learner, calls = make(state_dir=tmp_path / "state", **ROUTED), []
    learner.learn_batch(_stream(0))
    router = learner._applier.router
    real = router._described

    def described(numbers: list[int]) -> Any:
        calls.append(numbers)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("injected")
        return real(numbers)

    monkeypatch.setattr(router, "_described", described)
    for sample in _stream(1):
        learner.learn_one(sample)
        if calls:
            break
    assert calls and learner.experts == ("default",) and tuple(learner.state.store.active) == ("default",)
    sha = learner.state_sha256()
    again = _killed_and_loaded(learner, tiny_model, tmp_path / "state")
    assert again.state_sha256() == sha
    again.close()


@pytest.mark.parametrize("pinned", [False, True])
def test_a_batch_of_more_experts_than_there_is_room_for_brings_each_once(
    make: MakeLearner, monkeypatch: pytest.MonkeyPatch, pinned: bool
) -> None:
    monkeypatch.setattr(state_module, "_apart", lambda model, config: config.max_active)
    learner, packed = make(**{**ROUTED, "experts": 4}), []
    learner.learn_batch(_stream(0, 1, 2))
    real = AdapterStore._packed

    def watched(self: AdapterStore, active: dict[str, float], *rest: Any) -> Any:
        packed.append(tuple(active))
        return real(self, active, *rest)

    monkeypatch.setattr(AdapterStore, "_packed", watched)
    ids = torch.tensor([list(_prompt(domain, 9001)) for domain in range(3)])
    assert len({learner.answering(row) for row in ids.tolist()}) == 3
    with learner.pinned() if pinned else contextlib.nullcontext():
        learner.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, min_new_tokens=12,
                               do_sample=False)
    # once where the prompts are read, and once where the first token goes on
    assert len(packed) <= 6


def test_gradients_beside_packs_of_others_are_those_of_autograd(make: MakeLearner) -> None:
    """Of an update beside adapters that answer everything: the packs of each are of its own."""
    learner = make(**ROUTED)
    learner.learn_batch(_stream(0, 1))
    served, site = learner.state.store.served, learner.attachment.sites[0].module
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, site.in_features, generator=generator, requires_grad=True)
    grad = torch.randn(5, site.out_features, generator=generator)
    y = x @ site.base_layer.weight.T
    for one in served.each:
        y = y + (x @ one.packs[0].A * one.packs[0].scale) @ one.packs[0].B
    (wanted,) = torch.autograd.grad(y, x, grad)
    binding = learner.attachment.binding
    with binding.using(served):
        torch.testing.assert_close(torch.autograd.grad(site(x), x, grad)[0], wanted)
        for name in served.experts:
            expert = learner.state.store.expert(name)
            A, B = (part(0).clone().requires_grad_() for part in (expert.a, expert.b))
            dA, dB = torch.autograd.grad(expert.scaling * (x.detach() @ A) @ B, (A, B), grad)
            binding.sinks = (sink := GradientSink(expert.layout, name),)
            torch.testing.assert_close(torch.autograd.grad(site(x), x, grad)[0], wanted)
            binding.sinks = ()
            torch.testing.assert_close(expert.layout.a(sink.slab, 0), dA)
            torch.testing.assert_close(expert.layout.b(sink.slab, 0), dB)


def test_what_is_known_is_what_is_served(make: MakeLearner, tiny_model: TinyModel, tmp_path: Path) -> None:
    """A sample that another expert answers by now is that one's, and rehearsed there."""
    learner = make(**ROUTED)
    learner.learn_batch(_stream(0, 1))
    ring = learner.state.ring
    places = [slot for slot in ring.slots if int(ring.get(slot).ids[0]) >= 30]
    astray = [place for place in places if learner.answering(ring.get(place).ids[:11].tolist()) == ("default-2",)][:3]
    assert len(astray) == 3 and {ring.get(place).expert for place in astray} == {"default-2"}
    for place in astray:
        ring.hand_over(place, "default")
    before, prompts = learner.status()["expert_samples"], [list(_prompt(1, seed)) for seed in range(9000, 9050)]
    learner.refresh()
    # the scope that it is looked up in is of a version, which has a number
    assert learner.state.store.served.scope is learner.state.store.scope
    answering = list(map(learner.answering, prompts))
    learner.save_state(tmp_path / "copy")
    again = StreamLearner.load_state(tmp_path / "copy", tiny_model("llama", num_hidden_layers=1))
    assert list(map(again.answering, prompts)) == answering and again.version == learner.version
    again.close()
    assert {ring.get(place).expert for place in astray} == {"default-2"}
    assert learner.status()["expert_samples"] == [before[0] - 3, before[1] + 3] and sum(before) == 120


@pytest.mark.parametrize(("learned_below", "versions"), [(100.0, 1), (1e-6, 2)], ids=["only moved", "updated"])
def test_samples_move_with_the_commit_of_a_look(make: MakeLearner, learned_below: float, versions: int) -> None:
    """A look that is aborted before has moved none, or a second one would see another scope than recovery does."""
    learner = make(**ROUTED, learned_below=learned_below)
    learner.learn_batch(_stream(0, 1))
    ring, store = learner.state.ring, learner.state.store
    place = next(place for place in range(len(ring.slots) // 8)
                 if sum(int(ring.get(slot).ids[0]) >= 30 for slot in ring.slots[8 * place : 8 * place + 8]) > 4)
    for slot in ring.slots[8 * place : 8 * place + 8]:
        ring.hand_over(slot, "default")
    learner.queue.acknowledge([{"kind": "refresh", "place": place}])
    owners, scope, version, units = learner.status()["expert_samples"], store.scope, learner.version, []
    for _ in range(3):
        work = learner.queue.drain()
        for unit in work:
            if learner.state.position.done:
                break
            units.append(unit)
            assert store.scope is scope and learner.status()["expert_samples"] == owners
            if len(units) in (1, 3):
                break
        work.close()
    learner.drain()
    assert "look" in units and learner.status()["expert_samples"][1] > owners[1]
    assert store.served.scope is store.scope is not scope
    # of the update, where something is forgotten, and of the moves
    assert learner.version == version + versions


def test_another_answer_takes_the_place_of_what_any_expert_learned(make: MakeLearner) -> None:
    learner = make(**ROUTED)
    learner.learn_batch(_stream(0))
    learner.add_expert("law")
    learner.learn_one(Sample(prompt_ids=_prompt(0, 7), completion_ids=(90, 91), expert="law"))
    held = [learner.state.ring.get(slot) for slot in learner.state.ring.asking(list(_prompt(0, 7)))]
    assert [(slot.expert, slot.ids[-2:].tolist()) for slot in held] == [("law", [90, 91])]
    # where each answers prompts of its own, both may be right
    learner = make(routing="named")
    learner.learn_one(_sample(0, 7))
    learner.add_expert("law")
    learner.learn_one(Sample(prompt_ids=_prompt(0, 7), completion_ids=(90, 91), expert="law"))
    assert len(learner.state.ring.asking(list(_prompt(0, 7)))) == 2


def test_wrong_use_is_told(make: MakeLearner) -> None:
    learner = make()
    with pytest.raises(ConfigError, match="no expert 'law'"):
        learner.freeze("law")
    with pytest.raises(ConfigError, match="routing is 'guess'"):
        make(routing="guess")
