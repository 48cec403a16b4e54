"""What the learner tells about one piece of work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ogpstream.learner.activations import ActivationPlan

Status = Literal["learned", "rejected", "quarantined", "skipped"]


@dataclass(frozen=True)
class Pace:
    """How one update was fitted to its time budget.

    Attributes:
        limited: something was left out.
        tokens: T, ids of the longest sample in it, as it was cut.
        layers: that were trained, from the top; of `depth`.
        predicted_ms, actual_ms: of its units, pauses not counted.
        budget_ms: under `predicted_ms` where not even the least update fits.
    """

    limited: bool
    tokens: int
    layers: int
    depth: int
    predicted_ms: float
    actual_ms: float
    budget_ms: float


@dataclass(frozen=True)
class Update:
    """One optimizer step on one or more samples.

    Attributes:
        losses: nats per supervised token of each sample, before the step.
        gradient_norms: |(dA, dB)| of each sample.
        learned: for each sample, whether it counted as learned and offered its directions to P.
        refusal: why nothing was committed, or None.
        admitted: directions that joined P, over all bases.
        replaced: directions they took the place of.
        pruned: directions that left because a basis was saturated.
        activations: how the sample that needed most kept its activations, and the predicted peak; None where no
            gradient was taken.
        pace: where there is a time budget.
    """

    losses: tuple[float, ...]
    gradient_norms: tuple[float, ...]
    learned: tuple[bool, ...]
    refusal: str | None = None
    admitted: int = 0
    replaced: int = 0
    pruned: int = 0
    activations: ActivationPlan | None = None
    pace: Pace | None = None


@dataclass(frozen=True)
class SampleReport:
    """What became of one new sample.

    Attributes:
        status: "learned" (an update was made), "rejected" (a guard refused it), "quarantined" (kept, not trained on)
            or "skipped" (its id was brought before).
        loss: nats per supervised token before the update.
        tokens: ids of prompt and completion.
        cut: ids taken from the left of the prompt to fit the model, the memory budget, the memory and the time budget.
            What was cut for the last one alone stays in the ring, for a rehearsal that has the time.
        milliseconds: wall time of all that this sample caused, replay and rehearsal included.
        version: of the adapters served afterwards.
        activations: how activations were kept in the update that needed most of them, and the predicted peak.
        out_of_memory: times that the device had no memory left and the work was done again in a smaller mode.
        reason: of a rejection or quarantine.
        pace: of the update that it was new in, where there is a time budget.
        updates: of this sample alone or with others, while it was new; a kill in between is not counted.
        sticks: whether it counted as learned in the last of them; None for one update, before which it cannot.
    """

    id: str | None
    status: Status
    version: int
    loss: float | None = None
    tokens: int = 0
    cut: int = 0
    milliseconds: float = 0.0
    admitted: int = 0
    replaced: int = 0
    reason: str | None = None
    activations: ActivationPlan | None = None
    out_of_memory: int = 0
    pace: Pace | None = None
    updates: int = 0
    sticks: bool | None = None


@dataclass(frozen=True)
class RehearsalReport:
    """What a consolidation, a refresh or the end of a file did.

    Attributes:
        looked: samples of the ring that a refresh looked at, each counted once.
        known: of these, when it looked last.
    """

    updates: int
    version: int
    mean_loss: float | None = None
    admitted: int = 0
    looked: int = 0
    known: int = 0


@dataclass(frozen=True)
class LoopStatus:
    """What an idle loop has done so far.

    Attributes:
        updates: records of samples and rehearsals that were applied.
        units: that were run, those of aborted updates included.
        pending: records that are acknowledged and not applied.
        half_way: an update has begun and not ended.
        paused: by `pause`.
        waits: times that the loop stood back for a request after a unit.
        longest_wait: most units that were in the way of a request: 1 on a CPU, at most 2 on a CUDA device.
        longest_unit: seconds in the engine's lock.
        aborted: updates that were dropped half-way; their records are applied later.
        failures: errors of units and of the engine.
        last_error: of these, or None.
    """

    updates: int = 0
    units: int = 0
    pending: int = 0
    half_way: bool = False
    paused: bool = False
    waits: int = 0
    longest_wait: int = 0
    longest_unit: float = 0.0
    aborted: int = 0
    failures: int = 0
    last_error: str | None = None
