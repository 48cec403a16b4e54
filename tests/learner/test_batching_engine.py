"""Continuous batching of transformers on a CPU: its paged prefix cache beside a learner."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf

from ogpstream.learner import BatchingEngine, EngineBusy, IdleLoop, LearnerConfig, Sample, StreamLearner
from ogpstream.learner.errors import ConfigError

TinyModel = Callable[..., tf.PreTrainedModel]

# a page of keys and values, in tokens, and a prompt of four of them
PAGE = 8
PROMPT = 4 * PAGE
NEW = 6
TIMEOUT = 60.0
QUICK: dict[str, Any] = dict(
    rank=2, lr=0.2, target_modules=("q_proj", "k_proj", "v_proj", "down_proj"), warm_start=False, ring_samples=8,
    served_to="all",
)


def _ids(seed: int, length: int) -> list[int]:
    ids: list[int] = torch.randint(4, 101, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


def _sample(seed: int) -> Sample:
    ids = _ids(100 + seed, 9)
    return Sample(prompt_ids=tuple(ids[:3]), completion_ids=tuple(ids[3:]))


class Server:
    """A model in continuous batching, and the same requests answered by its own `generate`."""

    def __init__(self, model: tf.PreTrainedModel) -> None:
        self.model = model
        self.config = tf.GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=100, pad_token_id=0)
        paged = tf.ContinuousBatchingConfig(page_size=PAGE, num_blocks=64, max_batch_tokens=256,
                                            auto_switch_to_flash=False)
        self.manager = model.init_continuous_batching(
            generation_config=self.config, continuous_batching_config=paged)

    def ask(self, *prompts: list[int]) -> list[list[int]]:
        """Answers to requests that come at once."""
        asked = [self.manager.add_request(ids, eos_token_id=-1) for ids in prompts]
        answers: dict[str, list[int]] = {}
        while len(answers) < len(asked):
            result = self.manager.get_result(timeout=TIMEOUT)
            assert result is not None and result.error is None
            if result.is_finished():
                answers[result.request_id] = result.generated_tokens
        return [answers[request] for request in asked]

    @torch.no_grad()
    def expected(self, ids: list[int]) -> list[int]:
        """Without any cache."""
        tokens = list(ids)
        for _ in range(NEW):
            tokens.append(int(self.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
        return tokens[len(ids):]


@pytest.fixture
def learner(tiny_model: TinyModel) -> Iterator[StreamLearner]:
    # float64: no near tie is decided by how attention is summed up
    model = tiny_model("llama", num_hidden_layers=1, dtype=torch.float64)
    learner = StreamLearner(model, None, LearnerConfig(**QUICK))
    yield learner
    learner.queue.reserved_for = None
    learner.close()


@pytest.fixture
def server(learner: StreamLearner) -> Iterator[Server]:
    server = Server(learner.model)
    server.manager.start()
    yield server
    server.manager.stop(block=True, timeout=TIMEOUT)


@pytest.mark.parametrize("cleared", [True, False])
def test_blocks_of_an_older_version_are_not_used(
    learner: StreamLearner, server: Server, monkeypatch: pytest.MonkeyPatch, cleared: bool
) -> None:
    prompt = _ids(0, PROMPT + 3)
    if not cleared:
        monkeypatch.setattr(BatchingEngine, "adapter_changed", lambda *_: None)
    old = learner.attachment.binding.served
    (before,), (again,) = server.ask(prompt), server.ask(prompt)
    assert before == again == server.expected(prompt)
    with IdleLoop(learner, BatchingEngine(server.manager), consolidate=False) as loop:
        for seed in range(4):
            assert loop.submit(_sample(seed)).result(TIMEOUT).status == "learned"
        (after,) = server.ask(prompt)
    fresh = server.expected(prompt)
    with learner.attachment.binding.using(old):
        assert server.expected(prompt) == before
    assert before != fresh
    # with the fix taken out, the answer is of neither version
    assert (after == fresh) == cleared
    assert after != before


def test_answers_beside_updates_are_of_one_version(learner: StreamLearner, server: Server) -> None:
    served = {learner.version: learner.attachment.binding.served}

    class Keeping(BatchingEngine):
        def adapter_changed(self, version: int) -> None:
            super().adapter_changed(version)
            served[version] = learner.attachment.binding.served

    asked: list[tuple[int, int, list[int], list[int]]] = []
    shared = _ids(0, PROMPT)
    with IdleLoop(learner, Keeping(server.manager), consolidate=False) as loop:
        futures = deque([loop.submit(_sample(0))])
        for seed in range(1, 30):
            # one ahead: requests come while its update is under way
            futures.append(loop.submit(_sample(seed)))
            futures.popleft().result(TIMEOUT)
            prompts = [shared + _ids(len(asked) + number, 3) for number in range(3)]
            first = learner.version
            answers = server.ask(*prompts)
            asked += [(first, learner.version, *pair) for pair in zip(prompts, answers, strict=True)]
    assert loop.status().failures == 0 and loop.status().longest_wait <= 1
    assert len({first for first, *_ in asked}) > 10
    for first, last, prompt, answer in asked:
        matching = []
        for version in range(first, last + 1):
            with learner.attachment.binding.using(served[version]):
                matching.append(server.expected(prompt) == answer)
        assert any(matching)


def test_many_versions_do_not_use_up_the_cache(learner: StreamLearner, server: Server) -> None:
    pages = 64
    with IdleLoop(learner, BatchingEngine(server.manager), consolidate=False) as loop:
        for seed in range(pages // 2):
            assert loop.submit(_sample(seed)).result(TIMEOUT).status == "learned"
            prompt = _ids(seed, PROMPT + 3)
            assert server.ask(prompt) == [server.expected(prompt)]


def test_no_unit_runs_where_a_row_is_half_way(server: Server) -> None:
    engine = BatchingEngine(server.manager)
    begun = threading.Event()

    def first_batch(*_: object) -> None:
        hook.remove()
        begun.set()
        # the pause that is asked for now comes behind this batch, whose row has further tokens to decode
        end = time.monotonic() + TIMEOUT
        while not server.manager.background_thread_status.is_pause_requested() and time.monotonic() < end:
            time.sleep(1e-3)

    assert engine.is_idle()
    with engine.exclusive():
        hook = server.model.register_forward_pre_hook(first_batch)
        server.manager.add_request(_ids(0, PROMPT), eos_token_id=-1)
        assert not engine.is_idle()
    assert begun.wait(TIMEOUT) and not engine.is_idle()
    with pytest.raises(EngineBusy), engine.exclusive():
        pass
    assert server.manager.get_result(timeout=TIMEOUT) is not None
    with engine.exclusive():
        assert engine.is_idle()


def test_a_manager_that_does_not_run_is_busy(learner: StreamLearner) -> None:
    engine = BatchingEngine(Server(learner.model).manager)
    with pytest.raises(EngineBusy, match="start it"), engine.exclusive():
        pass
    engine.adapter_changed(2)


@pytest.mark.parametrize("graphs", [True, (False, True)])
def test_cuda_graphs_are_refused_when_they_are_asked_for_or_chosen(server: Server, graphs: Any) -> None:
    engine, settings = BatchingEngine(server.manager), server.manager.continuous_batching_config
    # its loop has read them by now, and goes on without
    server.ask(_ids(0, 4))
    settings.use_cuda_graph = graphs
    with pytest.raises(ConfigError, match="use_cuda_graph=False"), engine.exclusive():
        pass
    with pytest.raises(ConfigError, match="use_cuda_graph=False"):
        BatchingEngine(server.manager)
    settings.use_cuda_graph = (False, False)
    with engine.exclusive():
        pass


def test_before_transformers_5_18_it_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"cannot be paused: install transformers >= 5\.18") as refused:
        BatchingEngine(SimpleNamespace())
    assert "\n" not in str(refused.value)
