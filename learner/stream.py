"""A file of samples as a stream: lines in, groups that are acknowledged together, one result at the end.

The memory it takes does not grow with the file, and killing it and running it again gives the same journal and state.
"""

from __future__ import annotations

import logging
import math
import os
import resource
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from ogpstream.learner.learner import StreamLearner
from ogpstream.learner.report import Pace, RehearsalReport, SampleReport
from ogpstream.learner.samples import Refused, Sample, read_samples

# losses at either end of the stream that `loss_first` and `loss_last` are means of
ENDS = 50
# refused lines that the result repeats, where all of them are logged; and cut ones that are logged as warnings
TOLD = 20

_BIN = math.log(1.01)
_log = logging.getLogger(__name__)


@dataclass
class StreamResult:
    """What one run over a file did; the fields of `ogpstream learn --json`.

    Attributes:
        samples: lines that were samples, or refused as none.
        learned: that an update was made for.
        recovered: learned before the first line, as acknowledged by an earlier run that ended too soon.
        rejected: unusable lines, and samples that a guard refused, now or in an earlier run.
        skipped: whose id was brought before.
        quarantined: kept for review, not trained on.
        cut: samples that lost ids from the left of the prompt to fit.
        update_ms_p50, update_ms_p95: milliseconds of a learned sample, with all that it caused; within 0.5 %.
        loss_first, loss_last: mean of the first and last 50 losses, nats per token, before the update.
        learned_in_all: samples that the state has learned, earlier runs included, less what a rollback undid.
        rss_peak_mb: peak resident memory of the process, MiB.
        version: of the adapters at the end.
        looked, known: with `refresh`, samples of the ring that were looked at, and of these that were known at last.
        choice: where there is a time budget: samples whose update it `limited`, the least tokens and trained layers of
            one (`tokens_min`, `layers_min`, of `depth`), and by `predicted_ms_p50`, `actual_ms_p50` and `actual_ms_p95`
            the time of their units, replayed samples not included.
        problems: the first 20 refusals, "FILE:LINE: what; remedy".
    """

    samples: int = 0
    learned: int = 0
    recovered: int = 0
    rejected: int = 0
    skipped: int = 0
    quarantined: int = 0
    cut: int = 0
    update_ms_p50: float | None = None
    update_ms_p95: float | None = None
    loss_first: float | None = None
    loss_last: float | None = None
    learned_in_all: int = 0
    rss_peak_mb: float = 0.0
    version: int = 0
    state_sha256: str = ""
    looked: int | None = None
    known: int | None = None
    choice: dict[str, float | None] | None = None
    problems: list[str] = field(default_factory=list)


Progress = Callable[[StreamResult, int | None], None]


def learn_file(learner: StreamLearner, path: str | os.PathLike[str], *, group: int = 64,
               refresh: bool = False, on_progress: Progress | None = None) -> StreamResult:
    """Learn every line of a JSONL file once, rehearse what was not rehearsed yet, and save.

    A line that is no usable sample is logged as a warning and counted; the rest of the stream goes on. Once it is
    mended, running the file again learns it; until then each run tells of it again. Of samples that had to be
    cut the first 20 are logged as warnings too, others as information.

    Args:
        group: lines that are acknowledged by one fsync.
        refresh: then rehearse what was forgotten, as `StreamLearner.refresh` does.
        on_progress: called with the result so far and the number of the line after each new sample, and after each
            group; with None for the line before the rehearsal at the end, and after each look of a refresh.

    Raises:
        OSError: the file cannot be read.
        OgpStreamError: the state cannot be written, or the configuration does not fit the tokenizer.
    """
    if group < 1:
        raise ValueError(f"group is {group}: it must be at least 1")
    result, tally = StreamResult(version=learner.version), _Tally()
    tell = on_progress or (lambda _result, _line: None)
    for batch in _groups(read_samples(path), group):
        numbers = iter(batch)

        def note(report: SampleReport, numbers: Iterator[int] = numbers) -> None:
            number = next(numbers)
            _count(result, tally, report, f"{path}:{number}")
            if report.status != "skipped":
                tell(result, number)

        learner.learn_batch(batch.values(), refuse=True, on_report=note)
        tell(result, max(batch))
    tell(result, None)
    learner.consolidate()
    if refresh:
        def looked(report: RehearsalReport) -> None:
            result.looked, result.known = report.looked, report.known
            tell(result, None)

        looked(learner.refresh(on_report=looked))
    learner.save_state()
    result.update_ms_p50, result.update_ms_p95 = tally.times.quantile(0.5), tally.times.quantile(0.95)
    if result.choice is not None:
        names = {"predicted_ms_p50": (tally.predicted, 0.5), "actual_ms_p50": (tally.actual, 0.5),
                 "actual_ms_p95": (tally.actual, 0.95)}
        result.choice |= {name: times.quantile(share) for name, (times, share) in names.items()}
    result.loss_first, result.loss_last = _mean(tally.first), _mean(tally.last)
    result.rss_peak_mb, result.version = _rss_peak_mb(), learner.version
    result.learned_in_all = learner.state.counters.learned
    result.state_sha256 = learner.state_sha256()
    return result


def _groups(items: Iterable[tuple[int, Sample | Refused]], size: int) -> Iterator[dict[int, Sample | Refused]]:
    """Lines by number, at most `size` together; of lines with equal ids each begins another group.

    What becomes of the second one depends on the first one's fate, and must not depend on where a killed run stopped.
    """
    group: dict[int, Sample | Refused] = {}
    ids: set[str | None] = set()
    for number, item in items:
        if len(group) == size or item.id in ids:
            yield group
            group, ids = {}, set()
        group[number] = item
        ids.add(item.id)
    if group:
        yield group


class Histogram:
    """Quantiles of positive numbers without keeping them: counts in bins that are 1 % wide."""

    def __init__(self) -> None:
        self._bins: Counter[int] = Counter()

    def add(self, value: float) -> None:
        self._bins[round(math.log(max(value, 1e-9)) / _BIN)] += 1

    def quantile(self, share: float) -> float | None:
        """The value that `share` of the numbers do not exceed, within 0.5 %; None where there are none."""
        wanted = share * self._bins.total()
        reached = 0
        for number, count in sorted(self._bins.items()):
            reached += count
            if reached >= wanted:
                return math.exp(number * _BIN)
        return None


class _Tally:
    """What of a stream's reports the final figures need: bounded, however long the stream."""

    def __init__(self) -> None:
        self.times, self.predicted, self.actual = Histogram(), Histogram(), Histogram()
        self.first: list[float] = []
        self.last: deque[float] = deque(maxlen=ENDS)

    def learned(self, report: SampleReport) -> None:
        self.times.add(report.milliseconds)
        if report.loss is not None:
            self.last.append(report.loss)
            if len(self.first) < ENDS:
                self.first.append(report.loss)


def _count(result: StreamResult, tally: _Tally, report: SampleReport, where: str) -> None:
    result.samples += 1
    result.version = report.version
    match report.status:
        case "learned":
            result.learned += 1
            tally.learned(report)
            _choice(result, tally, report.pace)
        case "rejected":
            result.rejected += 1
            problem = _problem(report, where)
            _log.warning("%s", problem)
            if len(result.problems) < TOLD:
                result.problems.append(problem)
        case "skipped":
            result.skipped += 1
        case "quarantined":
            result.quarantined += 1
            _log.info("%s: kept, not trained on: %s", where, report.reason)
    if report.cut:
        result.cut += 1
        # not more, or a file whose prompts are all too long would hide all else; a time budget is told as a whole
        paced = report.pace is not None and report.pace.limited
        level = logging.WARNING if result.cut <= TOLD and not paced else logging.INFO
        _log.log(level, "%s: too long: %d ids were cut from the left of the prompt", where, report.cut)


def _choice(result: StreamResult, tally: _Tally, pace: Pace | None) -> None:
    if pace is None:
        return
    tally.predicted.add(pace.predicted_ms)
    tally.actual.add(pace.actual_ms)
    before = result.choice or {"limited": 0, "tokens_min": pace.tokens, "layers_min": pace.layers}
    result.choice = {"limited": (before["limited"] or 0) + pace.limited,
                     "tokens_min": min(before["tokens_min"] or pace.tokens, pace.tokens),
                     "layers_min": min(before["layers_min"] or pace.layers, pace.layers), "depth": pace.depth}


def _problem(report: SampleReport, where: str) -> str:
    reason = str(report.reason)
    if reason.startswith(f"{where}: "):
        return reason
    # a guard saw the sample's loss; what was refused before has none, and names its own remedy
    return f"{where}: {reason}" + ("; it is kept in quarantine.jsonl" if report.loss is not None else "")


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return sum(known) / len(known) if known else None


def _rss_peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
