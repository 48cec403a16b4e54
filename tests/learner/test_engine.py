"""Requests from a second thread while updates run: each one is of one version, and waits for one unit."""

import copy
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import transformers as tf
from torch import Tensor

from ogpstream.learner import GenerateEngine, IdleLoop, LearnerConfig, LoopEngine, Sample, StreamLearner
from ogpstream.memory.served import Served

TinyModel = Callable[..., tf.PreTrainedModel]

QUICK: dict[str, Any] = dict(
    rank=2, lr=0.05, served_to="all", target_modules=("q_proj", "v_proj", "down_proj"), basis_columns=16,
    warm_start=False, learned_below=100.0, learned_share=0.0, settled_below=0.0, ring_samples=8, replay_every=4,
)
TIMEOUT = 120.0


def _ids(seed: int, length: int = 9) -> list[int]:
    ids: list[int] = torch.randint(4, 101, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


def _sample(seed: int) -> Sample:
    ids = _ids(seed)
    return Sample(prompt_ids=tuple(ids[:3]), completion_ids=tuple(ids[3:]))


@pytest.fixture(autouse=True)
def busy_scheduler() -> Iterator[None]:
    """Threads change every 20 us: by the usual 5 ms, longer than a unit here, none would come in the midst of one."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(2e-5)
    yield
    sys.setswitchinterval(usual)


@pytest.fixture
def learner(tiny_model: TinyModel) -> Iterator[StreamLearner]:
    model = tiny_model("llama", num_hidden_layers=1, hidden_size=16, intermediate_size=24, num_attention_heads=2)
    learner = StreamLearner(model, None, LearnerConfig(**QUICK))
    yield learner
    learner.queue.reserved_for = None
    learner.close()


class Reply(NamedTuple):
    """A greedy generation, with the logits of its last token: these tell two versions apart that agree on all ids."""

    version: int
    seed: int
    ids: list[int]
    logits: Tensor


@torch.no_grad()
def _generate(model: tf.PreTrainedModel, seed: int, tokens: int = 4) -> tuple[list[int], Tensor]:
    ids, cache, out = torch.tensor([_ids(seed)]), None, []
    for _ in range(tokens):
        step = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache, ids = step.past_key_values, step.logits[:, -1:].argmax(-1)
        out.append(int(ids))
    return out, step.logits[0, -1]


class Counting(LoopEngine):
    """Counts what each request waits for, keeps every version, and can let a client come half the time."""

    def __init__(self, learner: StreamLearner) -> None:
        super().__init__(self._keep)
        self.learner = learner
        self.served: dict[int, Served | None] = {}
        self._keep(learner.version)
        self.units = self.ended = 0
        self.waits: list[int] = []
        self.learning = self.serving = 0.0
        self.over = False

    def _keep(self, version: int) -> None:
        self.served[version] = self.learner.attachment.binding.served

    @contextmanager
    def request(self) -> Iterator[None]:
        with ExitStack() as stack:
            with self._turn:
                before = self.ended
                stack.enter_context(super().request())
                self.waits.append(self.ended - before)
            started = time.perf_counter()
            yield
            self.serving += time.perf_counter() - started

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with super().exclusive():
            started = time.perf_counter()
            with self._turn:
                self.units += 1
                self._turn.notify_all()
            yield
            self.learning += time.perf_counter() - started
            self.ended += 1

    def rest(self) -> None:
        """Until a unit has begun and units had as much time as requests."""
        with self._turn:
            before = self.units
            assert self._turn.wait_for(
                lambda: self.over or self.units > before and self.learning >= self.serving, TIMEOUT)

    def end(self) -> None:
        with self._turn:
            self.over = True
            self._turn.notify_all()


class Unlocked(Counting):
    """A server without a lock between generations: requests run beside the units."""

    def request(self) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        with self._turn:
            self.units += 1
            self._turn.notify_all()
        yield


def _serve(engine: Counting, pinned: bool, replies: list[Reply], errors: list[Exception]) -> None:
    learner = engine.learner
    try:
        while not engine.over:
            seed = len(replies)
            with engine.request(), learner.pinned() if pinned else _unpinned(learner) as version:
                replies.append(Reply(version, seed, *_generate(learner.model, seed)))
            engine.rest()
    except Exception as error:
        errors.append(error)


@contextmanager
def _unpinned(learner: StreamLearner) -> Iterator[int]:
    yield learner.version


def _check(replies: list[Reply], engine: Counting) -> None:
    learner = engine.learner
    for reply in replies:
        with learner.attachment.binding.using(engine.served[reply.version]):
            ids, logits = _generate(learner.model, reply.seed)
        assert reply.ids == ids
        assert torch.equal(reply.logits, logits)


# the lock alone must do, and so must the pin alone
@pytest.mark.parametrize("engine_class", [Counting, Unlocked])
def test_requests_beside_200_updates_are_of_the_version_they_name(
    learner: StreamLearner, engine_class: type[Counting]
) -> None:
    engine = engine_class(learner)
    replies: list[Reply] = []
    errors: list[Exception] = []
    client = threading.Thread(target=_serve, args=(engine, engine_class is Unlocked, replies, errors))
    loop = IdleLoop(learner, engine, hold=1e9, patience=1e9, poll=0.0005)
    futures = [loop.submit(_sample(seed)) for seed in range(160)]
    client.start()
    with loop:
        for future in futures:
            assert future.result(TIMEOUT).status == "learned"
    engine.end()
    client.join(TIMEOUT)
    assert not client.is_alive() and errors == []
    # every fourth sample brings a replayed one
    assert learner.state.counters.updates >= 200 and learner.version > 200
    assert len({reply.version for reply in replies}) > 10
    _check(replies, engine)
    if engine_class is Counting:
        assert max(engine.waits) == 1 and loop.status().longest_wait == 1
        assert loop.status().waits > 10
        assert 0.2 < engine.serving / (engine.serving + engine.learning) < 0.8


def test_the_pin_keeps_a_generation_whole_where_no_lock_does(learner: StreamLearner) -> None:
    binding = learner.attachment.binding

    def generate(pinned: bool) -> tuple[int, Tensor]:
        with learner.pinned() if pinned else _unpinned(learner) as version:
            step = learner.model(input_ids=torch.tensor([_ids(0)]), use_cache=True)
            for _ in range(5):
                learner.learn_one(_sample(learner.version))
            last = learner.model(input_ids=torch.tensor([[7]]), past_key_values=step.past_key_values, use_cache=True)
        return version, last.logits

    with torch.no_grad():
        for pinned in (True, False):
            old = binding.served
            version, logits = generate(pinned)
            new = binding.served
            assert old is not None and version == old.version
            expected = []
            for served in (old, new):
                with binding.using(served):
                    step = learner.model(input_ids=torch.tensor([_ids(0)]), use_cache=True)
                    expected.append(learner.model(input_ids=torch.tensor([[7]]), past_key_values=step.past_key_values,
                                                  use_cache=True).logits)
            assert torch.equal(logits, expected[0]) == pinned
            assert not torch.equal(logits, expected[1])


# a plain loop


def test_a_request_waits_for_one_unit_however_wrong_the_hint_is(learner: StreamLearner) -> None:
    class Wrong(Counting):
        def is_idle(self) -> bool:
            return True

    engine = Wrong(learner)
    replies: list[Reply] = []
    errors: list[Exception] = []
    client = threading.Thread(target=_serve, args=(engine, False, replies, errors))
    with IdleLoop(learner, engine) as loop:
        client.start()
        # until the client has come between them, however the threads are scheduled
        end = time.monotonic() + TIMEOUT
        for seed in itertools.count():
            if seed >= 20 and (len(replies) > 3 and any(engine.waits) or time.monotonic() > end):
                break
            loop.submit(_sample(seed)).result(TIMEOUT)
    engine.end()
    client.join(TIMEOUT)
    assert errors == [] and len(replies) > 3
    assert max(engine.waits) == 1
    _check(replies, engine)


def test_requests_one_after_the_other_let_an_impatient_correction_in(learner: StreamLearner) -> None:
    engine = Counting(learner)
    started = threading.Event()

    def serve() -> None:
        while not engine.over:
            with engine.request():
                started.set()
                _generate(learner.model, 0)

    client = threading.Thread(target=serve)
    client.start()
    assert started.wait(TIMEOUT)
    with IdleLoop(learner, engine, patience=0.0, consolidate=False) as loop:
        assert loop.submit(_sample(0)).result(TIMEOUT).status == "learned"
    engine.end()
    client.join(TIMEOUT)
    assert not client.is_alive() and max(engine.waits) <= 1


class Prefixes:
    """What a server keeps of a prompt that many requests share: keys and values of its first ids."""

    def __init__(self, model: tf.PreTrainedModel) -> None:
        self._model = model
        self._cache: Any = None

    def clear(self, version: int) -> None:
        self._cache = None

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Tensor:
        if self._cache is None:
            self._cache = self._model(input_ids=torch.tensor([ids[:-1]]), use_cache=True).past_key_values
        cache = copy.deepcopy(self._cache)
        step = self._model(input_ids=torch.tensor([ids[-1:]]), past_key_values=cache, use_cache=True)
        logits: Tensor = step.logits[0, -1]
        return logits


@pytest.mark.parametrize("cleared", [True, False])
def test_a_prefix_cache_is_cleared_before_a_request_sees_the_next_version(
    learner: StreamLearner, cleared: bool
) -> None:
    prefixes = Prefixes(learner.model)
    engine = LoopEngine(prefixes.clear if cleared else None)
    before = prefixes.logits(_ids(0))
    old = learner.attachment.binding.served
    loop = IdleLoop(learner, engine)
    for seed in range(5):
        loop.submit(_sample(seed))
    while loop.tick():
        pass
    with engine.request():
        after = prefixes.logits(_ids(0))
    loop.close()
    with learner.attachment.binding.using(old):
        assert torch.equal(Prefixes(learner.model).logits(_ids(0)), before)
    fresh = Prefixes(learner.model).logits(_ids(0))
    assert float((fresh - before).abs().max()) > 1e-3
    # without the fix it is of neither version
    assert torch.equal(after, fresh) == cleared
    assert not torch.equal(after, before)


# transformers' generate thread


def test_the_generate_thread_is_parked_between_generations(learner: StreamLearner) -> None:
    thread = pytest.importorskip("transformers.cli.serving.utils").InferenceThread()
    engine = GenerateEngine(thread)
    served = {learner.version: learner.attachment.binding.served}
    replies: list[Reply] = []

    def generate(seed: int) -> Reply:
        version = learner.version
        served[version] = learner.attachment.binding.served
        return Reply(version, seed, *_generate(learner.model, seed))

    with IdleLoop(learner, engine, poll=0.0005) as loop:
        futures = [loop.submit(_sample(seed)) for seed in range(40)]
        while not all(future.done() for future in futures):
            with engine.request():
                assert not engine.is_idle()
                replies.append(thread.submit(generate, len(replies)).result(TIMEOUT))
            # one that nobody counted
            replies.append(thread.submit(generate, len(replies)).result(TIMEOUT))
            futures[min(len(replies) // 2, 39)].result(TIMEOUT)
    assert engine.is_idle() and loop.status().waits > 0
    assert len({reply.version for reply in replies}) > 10
    for reply in replies:
        with learner.attachment.binding.using(served[reply.version]):
            ids, logits = _generate(learner.model, reply.seed)
        assert reply.ids == ids and torch.equal(reply.logits, logits)
