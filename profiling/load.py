"""Requests that come by chance to a model served by transformers' `generate`, and what each of them felt.

A request comes when it was due, not when it could be handed over: a delay of the thread that brings it counts as well.
On a CUDA device a generation begins when the device comes to its first kernel, after the units that were queued before.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from ogpstream.learner import GenerateEngine, StreamLearner
from ogpstream.learner.generate_engine import InferenceThread
from ogpstream.learner.pacer import Stopwatch
from ogpstream.memory.served import Served

clock = time.perf_counter


@dataclass(frozen=True)
class Request:
    """Token ids of a prompt, due `arrival` seconds after its block begins."""

    arrival: float
    prompt: Sequence[int]


@dataclass(frozen=True)
class Reply:
    """What became of one request.

    Attributes:
        wait_ms: from the arrival to the beginning of the generation, other generations not counted: what the learner
            and the threads took.
        ttft_ms: from the arrival to the first new token, other generations included.
        generation_ms: from the beginning of the generation to its last token.
        version: that it was generated with, and `served` itself where it was to be kept.
    """

    request: Request
    wait_ms: float
    ttft_ms: float
    generation_ms: float
    tokens: Sequence[int]
    version: int
    served: Served | None


@dataclass(frozen=True)
class _Span:
    """One generation, in seconds of `clock`."""

    begun: float
    first: float
    ended: float
    tokens: Sequence[int]
    version: int
    served: Served | None


class _FirstToken(BaseStreamer):
    """When the first new token was there; `generate` hands the prompt to a streamer before."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch
        self._puts = 0
        self.at = 0.0
        self.moment: Any = None

    def put(self, value: Any) -> None:
        self._puts += 1
        if self._puts == 2:
            self.at, self.moment = clock(), self._watch.now()

    def end(self) -> None:
        """Nothing is buffered."""


class Server:
    """A learner's model behind the engine of a generate thread, one greedy generation after the other.

    Args:
        thread: that generates.
        new_tokens: of each reply; an end token does not end it.
    """

    def __init__(self, learner: StreamLearner, thread: InferenceThread, new_tokens: int) -> None:
        self.engine = GenerateEngine(thread)
        self.learner = learner
        self._thread = thread
        self._new_tokens = new_tokens
        self._watch = Stopwatch(learner.model.device, clock)

    def rate(self, prompts: Sequence[Sequence[int]]) -> float:
        """Requests per second that are served one right after the other; the first one warms up."""
        spans = self._send([Request(0.0, prompt) for prompt in prompts], clock(), frozenset())
        return (len(spans) - 1) / (spans[-1].ended - spans[0].ended)

    def block(self, requests: Sequence[Request], keep: frozenset[int] = frozenset()) -> list[Reply]:
        """Serve requests in the order of their arrivals, the first of which is waited for; ends with the last reply.

        Args:
            keep: numbers of requests whose replies keep the version that they were generated with.

        Raises:
            torch.OutOfMemoryError: a generation had no memory.
        """
        zero = clock()
        spans = self._send(requests, zero, keep)
        due = [zero + request.arrival for request in requests]
        felt = waits(due, [(span.begun, span.ended) for span in spans])
        return [Reply(request, 1e3 * wait, 1e3 * (span.first - at), 1e3 * (span.ended - span.begun), span.tokens,
                      span.version, span.served)
                for request, at, wait, span in zip(requests, due, felt, spans, strict=True)]

    def again(self, prompt: Sequence[int], served: Served | None) -> list[int]:
        """The reply to a prompt by a given version, in the thread of all others; None is the bare model."""

        def generate() -> list[int]:
            with self.learner.attachment.binding.using(served):
                return self._generate(prompt, None)

        with self.engine.request():
            tokens: list[int] = self._thread.submit(generate).result()
        return tokens

    def _send(self, requests: Sequence[Request], zero: float, keep: frozenset[int]) -> list[_Span]:
        futures = []
        for number, request in enumerate(requests):
            time.sleep(max(0.0, zero + request.arrival - clock()))
            counted = ExitStack()
            counted.enter_context(self.engine.request())
            future = self._thread.submit(self._work(request.prompt, number in keep))
            # in the thread that generates, before it takes what is next
            future.add_done_callback(partial(_leave, counted))
            futures.append(future)
        return [future.result() for future in futures]

    def _work(self, prompt: Sequence[int], keep: bool) -> Callable[[], _Span]:
        def answer() -> _Span:
            first = _FirstToken(self._watch)
            moment = self._watch.now()
            with self.learner.pinned() as version:
                served = self.learner.attachment.binding.current() if keep else None
                tokens = self._generate(prompt, first)
            ended = clock()
            # the device was idle when the first token was there, so its moment is that of the clock
            return _Span(first.at - self._watch.seconds(moment, first.moment), first.at, ended, tokens, version, served)

        return answer

    def _generate(self, prompt: Sequence[int], streamer: BaseStreamer | None) -> list[int]:
        model: Any = self.learner.model
        ids = torch.tensor([list(prompt)], device=model.device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, streamer=streamer,
                             max_new_tokens=self._new_tokens, min_new_tokens=self._new_tokens)
        tokens: list[int] = out[0, ids.shape[1]:].tolist()
        return tokens


def _leave(counted: ExitStack, _: Future[Any]) -> None:
    counted.close()


def arrivals(rate: float, count: int, numbers: random.Random) -> list[float]:
    """Seconds at which `count` requests are due that come independently, `rate` of them a second on average."""
    due, at = [], 0.0
    for _ in range(count):
        at += numbers.expovariate(rate)
        due.append(at)
    return due


def waits(due: Sequence[float], generations: Sequence[tuple[float, float]]) -> list[float]:
    """Seconds between each arrival and the beginning of its generation in which no generation ran.

    Args:
        generations: beginning and end of that of each request, one after the other in the order of arrivals.
    """
    found = []
    for number, at in enumerate(due):
        begun = generations[number][0]
        served = sum(max(0.0, end - max(start, at)) for start, end in generations[:number])
        found.append(max(0.0, begun - at - served))
    return found
