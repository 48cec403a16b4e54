"""What a request is answered with: the expert where it learned such prompts, the base model elsewhere, bit for bit."""

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from ogpstream.learner import BatchingEngine, ConfigError, IdleLoop, LearnerConfig, Sample, StateError, StreamLearner
from ogpstream.learner.errors import ModelError
from ogpstream.memory.served import Served

TinyModel = Callable[..., tf.PreTrainedModel]

LENGTH = 12
END = [7, 8, 9, 10]  # of every question


def _prompt(seed: int, topic: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(11 + 30 * topic, 41 + 30 * topic, (LENGTH - 4,), generator=generator).tolist()
    return [*ids, *END]


# ids and an end of which nothing is learned
OUTSIDE = [*_prompt(50, topic=2)[:-4], 41, 42, 43, 44]


def _teach(learner: StreamLearner, *, expert: str = "default", topic: int = 0) -> None:
    for seed in range(6):
        learner.learn_one(Sample(prompt_ids=_prompt(seed, topic), completion_ids=[95, 96], expert=expert))


@pytest.fixture(params=["llama", "gemma2", "gpt2"])
def learner(request: pytest.FixtureRequest, tiny_model: TinyModel) -> StreamLearner:
    """Has learned prompts of topic 0."""
    made = StreamLearner(tiny_model(request.param), config=LearnerConfig(rank=3, lr=0.05, warm_start=False))
    _teach(made)
    return made


@pytest.fixture
def llama(tiny_model: TinyModel) -> StreamLearner:
    made = StreamLearner(tiny_model("llama"), config=LearnerConfig(rank=3, lr=0.05, warm_start=False))
    _teach(made)
    return made


@torch.no_grad()
def _logits(learner: StreamLearner, rows: list[list[int]], **inputs: Any) -> Tensor:
    logits: Tensor = learner.model(input_ids=torch.tensor(rows), **inputs).logits
    return logits


def _with(learner: StreamLearner, served: Served | None, rows: list[list[int]]) -> Tensor:
    """With a version for every row, whatever it asks."""
    binding, gate = learner.attachment.binding, learner.attachment.binding.gate
    binding.gate = None
    try:
        with binding.using(served):
            return _logits(learner, rows)
    finally:
        binding.gate = gate


def _expert(learner: StreamLearner, rows: list[list[int]]) -> Tensor:
    return _with(learner, learner.state.store.served, rows)


def _base(learner: StreamLearner, rows: list[list[int]]) -> Tensor:
    return _with(learner, None, rows)


def test_only_prompts_like_the_learned_ones_are_answered_by_the_expert(learner: StreamLearner) -> None:
    inside, outside = [_prompt(3)], [_prompt(3, topic=2)[:-4] + [41, 42, 43, 44]]
    assert learner.answering(inside[0]) == ("default",) and learner.answering(outside[0]) == ()
    assert torch.equal(_logits(learner, inside), _expert(learner, inside))
    assert torch.equal(_logits(learner, outside), _base(learner, outside))
    # and these differ
    for rows in (inside, outside):
        assert not torch.allclose(_expert(learner, rows), _base(learner, rows), atol=1e-3)


def test_rows_of_a_batch_are_told_apart(learner: StreamLearner) -> None:
    rows = [_prompt(50, topic=2)[:-4] + [41, 42, 43, 44], _prompt(3), _prompt(51, topic=2)[:-4] + [41, 42, 43, 44]]
    found = _logits(learner, rows)
    assert torch.equal(found[[0, 2]], _base(learner, rows)[[0, 2]])
    torch.testing.assert_close(found[1], _expert(learner, rows)[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("inside", [True, False])
def test_a_generation_is_of_one_kind_from_its_first_token_to_its_last(learner: StreamLearner, inside: bool) -> None:
    prompt = _prompt(3) if inside else _prompt(3, topic=2)[:-4] + [41, 42, 43, 44]
    made = learner.model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0)
    ids = list(prompt)
    for _ in range(len(made[0]) - len(prompt)):
        ids.append(int((_expert if inside else _base)(learner, [ids])[0, -1].argmax()))
    assert made[0].tolist() == ids


def test_beams_and_padding(llama: StreamLearner) -> None:
    """Two prompts of different kinds and lengths, padded on the left, each with three beams."""
    short, long = _prompt(3), [*_prompt(60, topic=2)[:-4], 41, 42, 43, 44, 45, 46]
    ids = torch.tensor([[0] * (len(long) - len(short)) + short, long])
    options: dict[str, Any] = dict(max_new_tokens=5, num_beams=3, do_sample=False, pad_token_id=0)
    both = llama.model.generate(ids, attention_mask=(ids > 0).long(), **options)
    for row, prompt in zip(both, (short, long), strict=True):
        alone = llama.model.generate(torch.tensor([prompt]), **options)
        kept = [token for token in row.tolist() if token]
        assert kept == [token for token in alone[0].tolist() if token]


def test_answers_scored_behind_a_shared_cache(llama: StreamLearner) -> None:
    """As the labels of a prompt are: its keys and values are repeated for each of them."""
    rows = [_prompt(3), _prompt(50, topic=2)[:-4] + [41, 42, 43, 44]]
    with torch.no_grad():
        out = llama.model(input_ids=torch.tensor(rows), use_cache=True)
        out.past_key_values.batch_repeat_interleave(2)
        tails = torch.tensor([[95, 96], [96, 95]] * 2)
        found = llama.model(input_ids=tails, past_key_values=out.past_key_values).logits
    whole = [[*row, *tail] for row in rows for tail in ([95, 96], [96, 95])]
    torch.testing.assert_close(found[:2], _expert(llama, whole)[:2, -2:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[2:], _base(llama, whole)[2:, -2:], atol=1e-4, rtol=1e-4)
    # scored in one forward they are of the same kind
    torch.testing.assert_close(_logits(llama, whole)[:, -2:], found, atol=1e-4, rtol=1e-4)
    out.past_key_values.batch_select_indices(torch.tensor([0, 2, 3]))
    with pytest.raises(StateError, match="now has 3 rows"):
        llama.model(input_ids=tails[:3], past_key_values=out.past_key_values)
    # the forward that was refused left nothing behind
    assert torch.equal(_logits(llama, rows[:1]), _expert(llama, rows[:1]))


def test_a_question_behind_a_conversation_is_looked_at_too(llama: StreamLearner) -> None:
    first = _prompt(50, topic=2)[:-4] + [41, 42, 43, 44]
    with torch.no_grad():
        out = llama.model(input_ids=torch.tensor([first]), use_cache=True)
        found = llama.model(input_ids=torch.tensor([_prompt(3)]), past_key_values=copy.deepcopy(out.past_key_values))
        before = llama.model(input_ids=torch.tensor([_prompt(3)]), past_key_values=out.past_key_values)
    assert not torch.allclose(before.logits, _base(llama, [[*first, *_prompt(3)]])[:, -LENGTH:], atol=1e-3)
    # a copy of a cache is one that nobody has seen being filled
    torch.testing.assert_close(found.logits, before.logits, atol=1e-5, rtol=1e-5)


def test_a_prompt_can_be_named_where_a_forward_sees_only_its_end(llama: StreamLearner) -> None:
    inside, outside = _prompt(3), _prompt(50, topic=2)[:-4] + [41, 42, 43, 44]
    rows = [[41, 42, 43]]
    with llama.pinned(inside) as version:
        assert version == llama.version
        assert torch.equal(_logits(llama, rows), _expert(llama, rows))
        assert torch.equal(_logits(llama, [outside]), _expert(llama, [outside]))
    with llama.pinned(outside):
        assert torch.equal(_logits(llama, [inside]), _base(llama, [inside]))
    with llama.pinned():
        assert torch.equal(_logits(llama, [inside]), _expert(llama, [inside]))


def test_embeddings_name_no_prompt(llama: StreamLearner) -> None:
    rows = [_prompt(50, topic=2)]
    embedded = llama.model.get_input_embeddings()(torch.tensor(rows))
    with torch.no_grad():
        found = llama.model(inputs_embeds=embedded).logits
    torch.testing.assert_close(found, _expert(llama, rows), atol=1e-6, rtol=1e-6)


def test_two_experts_answer_their_own_prompts(llama: StreamLearner) -> None:
    llama.add_expert("law")
    llama.activate({"default": 1.0, "law": 0.5})
    _teach(llama, expert="law", topic=1)
    # with an end of its own, or the two topics would be too near for six prompts each
    rows = [_prompt(3), _prompt(3, topic=1), _prompt(50, topic=2)[:-4] + [41, 42, 43, 44]]
    kinds = [llama.answering(row) for row in rows]
    assert "default" in kinds[0] and "law" in kinds[1] and kinds[2] == ()
    found, served = _logits(llama, rows), llama.state.store.served
    for row, kind in enumerate(kinds):
        wanted = _with(llama, served.only(kind), rows) if kind else _base(llama, rows)
        torch.testing.assert_close(found[row], wanted[row], atol=1e-5, rtol=1e-5)
    # a version with one expert alone is the one that is published when it alone is active
    alone = _with(llama, served.only(("law",)), rows)
    llama.activate({"law": 0.5})
    torch.testing.assert_close(alone, _expert(llama, rows), atol=1e-5, rtol=1e-5)


def test_a_batch_of_two_kinds_has_no_gradient(llama: StreamLearner) -> None:
    rows = torch.tensor([_prompt(3), _prompt(50, topic=2)[:-4] + [41, 42, 43, 44]])
    llama.model.enable_input_require_grads()
    llama.model(input_ids=rows[:1])
    with pytest.raises(StateError, match="has no gradient"):
        llama.model(input_ids=rows)


def test_served_to_all(tiny_model: TinyModel) -> None:
    learner = StreamLearner(tiny_model("llama"), config=LearnerConfig(rank=3, lr=0.05, served_to="all",
                                                                      warm_start=False))
    _teach(learner)
    outside = _prompt(50, topic=2)[:-4] + [41, 42, 43, 44]
    assert learner.answering(outside) == ("default",)
    assert torch.equal(_logits(learner, [outside]), _expert(learner, [outside]))
    # what it learned is remembered all the same
    assert len(learner.state.store.scope.experts["default"].rows) == 6


def test_an_adapter_from_elsewhere_answers_everything(llama: StreamLearner, tiny_model: TinyModel, tmp_path: Path
                                                      ) -> None:
    llama.export_peft(tmp_path / "adapter")
    other = StreamLearner(tiny_model("llama"), config=LearnerConfig(rank=3, warm_start=False))
    other.import_peft(tmp_path / "adapter", "given")
    other.activate({"given": 1.0})
    outside = _prompt(50, topic=2)
    assert other.answering(outside) == ("given",)
    torch.testing.assert_close(_logits(other, [outside]), _expert(llama, [outside]), atol=1e-5, rtol=1e-5)


def test_it_survives_a_restart_and_goes_back_with_a_rollback(tiny_model: TinyModel, tmp_path: Path) -> None:
    learner = StreamLearner(tiny_model("llama"), config=LearnerConfig(rank=3, lr=0.05, warm_start=False),
                            state_dir=tmp_path)
    good = learner.version
    _teach(learner)
    # so that nothing is applied anew when it is loaded
    learner.save_state()
    digest = learner.state_sha256()
    learner.close()
    again = StreamLearner.load_state(tmp_path, tiny_model("llama"))
    assert len(again.state.store.scope.experts["default"].rows) == 6
    assert again.state_sha256() == digest and again.answering(_prompt(3)) == ("default",)
    again.rollback(good)
    assert again.answering(_prompt(3)) == ()
    again.close()


def test_packed_requests_are_refused_before_they_come(llama: StreamLearner) -> None:
    class Manager:
        continuous_batching_config = tf.ContinuousBatchingConfig()

        def pause(self) -> None: ...

    with pytest.raises(ConfigError, match="served_to = 'all'"):
        IdleLoop(llama, BatchingEngine(Manager()))


def test_text_is_a_prompt_too(tiny_model: TinyModel, tiny_tokenizer: Any) -> None:
    learner = StreamLearner(tiny_model("llama"), tiny_tokenizer, LearnerConfig(rank=3, lr=0.05, warm_start=False))
    learner.correct("Q: where is my bike?\nA:", " gate 4")
    assert learner.answering("Q: where is my bike?\nA:") == ("default",)
    assert learner.answering("def f(x): return x + 1") == ()


def test_a_version_answers_what_it_answered_when_it_was_served(llama: StreamLearner) -> None:
    """What is learned later belongs to later versions, as its adapters do."""
    new = _prompt(3, topic=2)[:-4] + [41, 42, 43, 44]
    with llama.pinned():
        before = llama.version
        llama.learn_one(Sample(prompt_ids=new, completion_ids=[95]))
        assert llama.version == before + 1 and llama.answering(new) == ()
        assert torch.equal(_logits(llama, [new]), _base(llama, [new]))
    assert llama.answering(new) == ("default",)


def test_a_prompt_that_needs_no_step_is_in_scope_all_the_same(tiny_model: TinyModel) -> None:
    learner = StreamLearner(tiny_model("llama"), config=LearnerConfig(rank=3, warm_start=False, settled_below=1e9))
    before = learner.version
    learner.learn_one(Sample(prompt_ids=_prompt(1), completion_ids=[95]))
    assert learner.answering(_prompt(1)) == ("default",) and learner.version == before + 1


@pytest.mark.parametrize("chunk", [4, 5, 8, 10])
def test_a_prompt_that_is_read_in_pieces(llama: StreamLearner, chunk: int) -> None:
    for prompt in (_prompt(3), OUTSIDE):
        options: dict[str, Any] = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
        whole = llama.model.generate(torch.tensor([prompt]), **options)
        pieces = llama.model.generate(torch.tensor([prompt]), prefill_chunk_size=chunk, **options)
        if prompt is OUTSIDE:
            assert pieces.tolist() == whole.tolist()
        # the last piece is the expert's, whatever read the first ones
        kinds = _base(llama, [prompt])[0, -1], _logits(llama, [prompt])[0, -1]
        assert (int(kinds[0].argmax()) == int(kinds[1].argmax())) == (prompt is OUTSIDE)
        assert int(pieces[0, len(prompt)]) != int(kinds[0].argmax()) or prompt is OUTSIDE


def test_a_prefix_that_is_cut_back_does_not_keep_the_expert(llama: StreamLearner) -> None:
    with torch.no_grad():
        cache = llama.model(input_ids=torch.tensor([_prompt(3)]), use_cache=True).past_key_values
        cache.crop(2 - LENGTH)
        found = llama.model(input_ids=torch.tensor([OUTSIDE]), past_key_values=cache).logits
    whole = [[*_prompt(3)[:2], *OUTSIDE]]
    assert llama.answering(whole[0]) == ()
    # the prefix was read by the expert: what it left in the cache is not the base's, but nothing is added any more
    assert not torch.allclose(found, _expert(llama, whole)[:, 2:], atol=1e-3)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_padding_is_no_part_of_a_prompt(llama: StreamLearner, cache: str) -> None:
    """Padded by an id whose embedding is not 0."""
    options: dict[str, Any] = dict(max_new_tokens=4, do_sample=False, pad_token_id=50, cache_implementation=cache)
    for prompt in (_prompt(3), OUTSIDE):
        alone = llama.model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        ids = torch.tensor([[50] * 30 + prompt])
        mask = torch.tensor([[0] * 30 + [1] * len(prompt)])
        assert llama.model.generate(ids, attention_mask=mask, **options)[0, ids.shape[1] :].tolist() == alone


def test_arguments_by_position(llama: StreamLearner) -> None:
    ids, mask = torch.tensor([[50] * 30 + _prompt(3)]), torch.tensor([[0] * 30 + [1] * LENGTH])
    with torch.no_grad():
        by_name = llama.model(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(llama.model(ids, mask).logits, by_name)
        with llama.attachment.binding.using(None):
            assert not torch.allclose(llama.model(ids, mask).logits, by_name, atol=1e-3)


@torch.no_grad()
def test_what_was_found_goes_with_a_cache(llama: StreamLearner) -> None:
    """Also with one that comes in a tuple, with a copy, and out of a block that named the prompt."""
    caches = [llama.model(input_ids=torch.tensor([OUTSIDE]), use_cache=True, return_dict=False)[1]]
    caches.append(copy.deepcopy(caches[0]))
    with llama.pinned(OUTSIDE):
        caches.append(llama.model(input_ids=torch.tensor([OUTSIDE]), use_cache=True).past_key_values)
    wanted = _base(llama, [[*OUTSIDE, 60]])[:, -1:]
    for cache in caches:
        found = llama.model(input_ids=torch.tensor([[60]]), past_key_values=cache).logits
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_variants_are_of_one_version(tiny_model: TinyModel) -> None:
    config = LearnerConfig(rank=3, lr=0.05, warm_start=False, routing="named")
    llama = StreamLearner(tiny_model("llama"), config=config)
    llama.add_expert("law")
    llama.activate({"default": 1.0, "law": 1.0})
    _teach(llama, expert="law", topic=1)
    gate, found = llama.attachment.binding.gate, []
    assert gate is not None
    for _ in range(2):
        served = llama.state.store.served
        only = gate.only(served, frozenset(["law"]))
        assert only is not None and only.version == served.version and only is gate.only(served, frozenset(["law"]))
        found.append(only)
        llama.learn_one(Sample(prompt_ids=_prompt(9, topic=1), completion_ids=[95, 96], expert="law"))
    assert found[0].version < found[1].version


def test_old_samples_are_not_counted_again(tiny_model: TinyModel) -> None:
    config = LearnerConfig(rank=3, lr=0.05, warm_start=False, rehearsals=2)
    learner = StreamLearner(tiny_model("llama"), config=config)
    learner.learn_batch([Sample(prompt_ids=_prompt(seed), completion_ids=[95, 96]) for seed in range(5)])
    learner.consolidate(3)
    assert learner.state.store.scope.experts["default"].counts.tolist() == [1] * 5


def test_a_prompt_that_is_cut_is_remembered_whole(tiny_model: TinyModel) -> None:
    prompt = [*range(30, 90), *END]
    learner = StreamLearner(tiny_model("llama"), config=LearnerConfig(rank=3, warm_start=False, max_tokens=16))
    report = learner.learn_one(Sample(prompt_ids=prompt, completion_ids=[95, 96]))
    assert report.cut > 0 and learner.answering(prompt) == ("default",)


def test_who_is_served_may_change_when_a_state_is_loaded(tiny_model: TinyModel, tmp_path: Path) -> None:
    config = LearnerConfig(rank=3, lr=0.05, warm_start=False, served_to="all")
    learner = StreamLearner(tiny_model("llama"), config=config, state_dir=tmp_path)
    _teach(learner)
    digest = learner.state_sha256()
    learner.close()
    for served_to in ("scope", "all", None):
        learner = StreamLearner.load_state(tmp_path, tiny_model("llama"), served_to=served_to)
        assert learner.answering(_prompt(3)) == ("default",) and learner.state_sha256() == digest
        assert learner.answering(OUTSIDE) == (() if served_to == "scope" else ("default",))
        learner.close()


@pytest.mark.parametrize("embedding", ["wrapped", "broken"])
def test_a_model_that_cannot_be_described_stays_as_it_was(tiny_model: TinyModel, embedding: str) -> None:
    model = tiny_model("llama")
    table = model.get_input_embeddings()
    if embedding == "wrapped":
        model.set_input_embeddings(torch.nn.Sequential(table))
    else:
        table.weight.data[0] = torch.nan
    with pytest.raises(ModelError, match="no matrix of embeddings|not finite"):
        StreamLearner(model, config=LearnerConfig(rank=3, warm_start=False))
    assert not any("Adapted" in type(module).__name__ for module in model.modules())


def test_two_threads_ask_while_it_learns(tiny_model: TinyModel) -> None:
    """Every batch of prompts of both kinds is of the one version that it was pinned to."""
    learner = StreamLearner(tiny_model("llama"), config=LearnerConfig(rank=3, lr=0.05, warm_start=False))
    _teach(learner)
    rows, seen, stop = [_prompt(3), OUTSIDE], [], threading.Event()

    def ask() -> None:
        while not stop.is_set():
            with learner.pinned():
                served = learner.attachment.binding.current()
                seen.append((served, _logits(learner, rows)))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for seed in range(20, 40):
        learner.learn_one(Sample(prompt_ids=_prompt(seed), completion_ids=[95, 96]))
    stop.set()
    for thread in threads:
        thread.join()
    assert len({served.version for served, _ in seen}) > 3
    for served, found in seen[:: max(1, len(seen) // 40)]:
        assert torch.equal(found[1], _base(learner, rows)[1])
        torch.testing.assert_close(found[0], _with(learner, served, rows)[0], atol=1e-5, rtol=1e-5)
