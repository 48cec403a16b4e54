"""Blocks of requests without and with learning in turns, and a check that replies are of the versions they name."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ogpstream.learner import IdleLoop, Sample
from ogpstream.learner.report import LoopStatus, SampleReport
from ogpstream.memory.served import Served
from ogpstream.profiling.bench_report import Row
from ogpstream.profiling.load import Reply, Request, Server, arrivals

# of the rate that is served one after the other
LOAD = 0.5
# replies that are generated again
CHECKED = 8


@dataclass
class Run:
    """What was measured.

    Attributes:
        rate: requests per second that are served one after the other.
        rows: one of each request.
        reports: of the samples, in the order they were learned.
        status: of the idle loop at the end.
        kept: replies of phase on, with their versions in host RAM.
    """

    rate: float
    rows: list[Row] = field(default_factory=list)
    reports: list[SampleReport] = field(default_factory=list)
    status: LoopStatus = field(default_factory=LoopStatus)
    kept: list[Reply] = field(default_factory=list)


class Feed:
    """Hands samples to an idle loop, one as soon as the one before is done with."""

    def __init__(self, loop: IdleLoop, samples: Iterator[Sample], reports: list[SampleReport]) -> None:
        self._loop, self._samples, self._reports = loop, samples, reports
        self.over = False

    def next(self) -> None:
        self._loop.submit(next(self._samples)).add_done_callback(self._done)

    def _done(self, future: Future[SampleReport]) -> None:
        if self.over:
            return
        # the loop counts an error, and tries that sample again
        if future.exception() is None:
            self._reports.append(future.result())
        self.next()


def run(server: Server, prompts: Iterator[Sequence[int]], samples: Iterator[Sample], *, requests: int, updates: int,
        seed: int = 0, on_block: Callable[[int, int], None] = lambda requests, updates: None) -> Run:
    """Phases in turns, with the same requests, until each has `requests`; then phase on until `updates` are learned.

    It ends early after an error of the learner, which `status` tells.

    Args:
        on_block: told how many requests of phase on were served, and how many samples learned.

    Raises:
        torch.OutOfMemoryError: a generation had no memory.
    """
    numbers = random.Random(seed)
    done = Run(server.rate(list(islice(prompts, 11))))
    loop = IdleLoop(server.learner, server.engine)
    feed = Feed(loop, samples, done.reports)
    loop.pause()
    with loop:
        feed.next()
        try:
            _blocks(server, loop, prompts, done, requests, updates, numbers, on_block)
        finally:
            feed.over = True
        done.status = loop.status()
    return done


def _blocks(server: Server, loop: IdleLoop, prompts: Iterator[Sequence[int]], done: Run, requests: int, updates: int,
            numbers: random.Random, on_block: Callable[[int, int], None]) -> None:
    # ten of each phase
    size, blocks, on = max(1, requests // 10), 0, 0
    while on < requests or _learned(done.reports) < updates:
        count = min(size, requests - on) if on < requests else size
        due = arrivals(LOAD * done.rate, count, numbers)
        block = [Request(at, prompt) for at, prompt in zip(due, islice(prompts, count), strict=True)]
        keep, replies = numbers.randrange(count), list[Reply]()
        # the second of a block finds caches warmed by the same requests, so each phase is the first in turn
        for phase in ("off", "on") if blocks % 2 == 0 else ("on", "off"):
            if phase == "on":
                loop.resume()
                replies = server.block(block, frozenset([keep]))
                loop.pause()
                # after the turn that has begun, so that no unit is left for what comes next
                loop.tick()
                done.rows += _rows("on", blocks, replies)
            elif on < requests:
                done.rows += _rows("off", blocks, server.block(block))
        blocks, on = blocks + 1, on + count
        # each block is as likely as any other to be checked
        at = blocks - 1 if blocks <= CHECKED else numbers.randrange(blocks)
        if at < CHECKED:
            done.kept[at:at + 1] = [_on_host(replies[keep])]
        on_block(on, _learned(done.reports))
        if loop.status().failures:
            break


def check(server: Server, kept: Sequence[Reply]) -> list[Row]:
    """Each reply generated again with the version that it names, after all learning.

    Returns:
        Of each: the version, whether the tokens are `equal`, and whether the newest version `tells_apart`: replies
        otherwise.
    """
    newest, device = server.learner.attachment.binding.served, server.learner.model.device
    found = []
    for reply in kept:
        assert reply.served is not None
        prompt, tokens = reply.request.prompt, list(reply.tokens)
        found.append({"version": reply.version, "equal": server.again(prompt, moved(reply.served, device)) == tokens,
                      "tells_apart": server.again(prompt, newest) != tokens})
    return found


def moved(served: Served, device: torch.device) -> Served:
    """A version on another device, laid out in memory as it was: alignment may choose the kernel that multiplies."""
    storages: dict[int, Tensor] = {}

    def move(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in storages:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            storages[storage._cdata] = whole.to(device)
        place: Any = torch.empty(0, dtype=tensor.dtype, device=device)
        result: Tensor = place.set_(storages[storage._cdata].untyped_storage(), tensor.storage_offset(), tensor.shape,
                                    tensor.stride())
        return result

    packs = tuple(replace(pack, A=move(pack.A), B=move(pack.B), scale=move(pack.scale)) for pack in served.packs)
    return replace(served, packs=packs, made_of=None)


def _on_host(reply: Reply) -> Reply:
    assert reply.served is not None
    return replace(reply, served=moved(reply.served, torch.device("cpu")))


def _learned(reports: Sequence[SampleReport]) -> int:
    return sum(report.status == "learned" for report in reports)


def _rows(phase: str, block: int, replies: Sequence[Reply]) -> list[Row]:
    return [{"phase": phase, "block": block, "arrival": reply.request.arrival, "wait_ms": reply.wait_ms,
             "ttft_ms": reply.ttft_ms, "generation_ms": reply.generation_ms, "tokens": len(reply.tokens),
             "version": reply.version} for reply in replies]
