"""Settings of a learner: one flat, frozen dataclass; every field says its unit and why it has its value."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ogpstream.learner.errors import ConfigError

Optimizer = Literal["adam", "sgd"]
Guard = Literal["fold", "gradient", "none"]
BasisScope = Literal["layer", "shared"]
LearningState = Literal["lean", "resident"]
ServedTo = Literal["scope", "all"]
Routing = Literal["named", "prompt"]
RingKeep = Literal["recent", "reservoir", "balanced"]


@dataclass(frozen=True)
class LearnerConfig:
    """How a `StreamLearner` adapts, protects, replays and saves.

    `LearnerConfig.literal()` is the written specification's own setting (dA projected before plain SGD at 1e-4,
    one basis for all layers); it is kept for comparison, since it does not prevent forgetting.

    Raises:
        ConfigError: a value is out of range or does not fit the others.
    """

    # adapter
    rank: int = 8  # r, columns of A
    alpha: float = 16.0  # scaling = alpha / rank
    target_modules: str | tuple[str, ...] | None = "all-linear"  # as in PEFT; None is PEFT's choice for the model
    # experts on a GPU at once, the least recently used leaves; where prompts are not routed, so many compute together
    max_active: int = 2
    # who learns a sample of the expert "default": "named" is that one; "prompt", where prompts are looked at (served_to
    # "scope"), the one that would answer it, and after a drift a new one. Then the likeliest alone answers a prompt. On
    # five domains of intents accuracy is .757 at the end, with one expert .722 (rates .002); joint has .778
    routing: Routing = "prompt"
    experts: int = 8  # that routing comes to at most
    served_to: ServedTo = "scope"  # prompts like the learned ones; others get the base model. "all" serves all prompts

    # optimizer
    optimizer: Optimizer = "adam"
    lr: float = 1.5e-3  # of A, per update; constant after the warmup, since a stream has no end
    # rate of B over that of A: LoRA+ (Hayou et al. 2024, arXiv:2402.12354), by PEFT's name. Streams of 60 samples a
    # task end at .651, with 2e-3 for both at .592; long ones where they did (.750 and .747, all on held-back samples)
    loraplus_lr_ratio: float = 2.0
    betas: tuple[float, float] = (0.9, 0.99)  # 0.99: a second moment of 100 updates follows a stream, 0.999 lags it
    eps: float = 1e-8  # relative to the rms of sqrt(v): some models have gradients of 1e-7
    weight_decay: float = 0.0  # decoupled (AdamW), of A and B
    warmup: int = 0  # updates of an expert over which lr rises linearly
    total_updates: int | None = None  # given: cosine decay to 0 at this update of an expert

    # protection
    guard: Guard = "fold"  # "gradient" projects dA only (the specification's form), "none" is plain LoRA
    basis_scope: BasisScope = "layer"  # one P per distinct linear input, or one per input width
    basis_columns: int = 256  # m, at most; the basis also stays below `basis_share` of the width
    basis_share: float = 0.75  # of D_in that P may take: the rest is the room to learn
    novelty: float = 0.3  # share of a sample's dA outside P, and of a candidate direction, above which P grows
    learned_below: float = 0.5  # nats per token under which an updated sample counts as learned
    learned_share: float = 0.95  # of its tokens that must get over half of the probability for that, too
    settled_below: float = 0.1  # nats per token under which a sample no longer moves the adapter
    directions_per_sample: int = 1  # candidates per linear input and learned sample
    held_rank: int | None = 32  # r_c, rank the held part is cut to; None keeps all of it and grows without bound
    average: float = 0.98  # of the running mean of A and B that a restart folds; 0 folds the last ones
    restart_after: int = 50  # updates of an expert from which on a consolidation restarts its factors; 0 never
    restart_loss: float = 0.2  # share of what an expert computes that the cut may cost a restart; else it waits
    restart_directions: int = 2  # of those it read most, per linear input, that join P then
    use_window: int = 1000  # updates over which the use of a direction is counted

    # warm start of P
    warm_start: bool = True  # protect what the base model itself uses, before the first update; with the fold only
    warm_energy: float = 0.9  # share of the base's input energy that is protected
    warm_share: float = 0.5  # of m, at most, for these directions
    warm_samples: int = 64  # of the model's own, where no calibration text is given
    warm_tokens: int = 96  # tokens each
    base_anchor: float = 5e-3  # pull on what plastic factors add to the base's inputs (of the warm start); 0 is off

    # replay and rehearsal
    ring_samples: int = 4096  # slots of the replay ring
    ring_keep: RingKeep = "balanced"  # which samples stay when it is full: the same room for every completion
    replay_every: int = 16  # new samples per replayed one; 0 never replays
    rehearsals: int = 2  # old samples that join the update of a new one in `learn` and `learn_batch`
    second_look: bool = True  # one of them is the sample before, so that each can soon count as learned
    # further updates of a new sample in `learn`, `learn_batch` and an idle loop, until it counts as learned: with 8 of
    # them 90 % of corrections stick at once, without 22 %; but over a long stream 3 forget more (accuracy .76 for .79,
    # with rates of .002)
    repeats: int = 0
    rehearsal_batch: int = 2  # old samples in one update of `consolidate`
    # old samples, by chance, of which those with the highest loss are in it: at most 1024 tokens are looked at, and one
    # of 24 samples in the ring
    rehearsal_candidates: int = 8

    # samples
    max_tokens: int = 1024  # T, also bounded by the model's positions; prompts are cut from the left
    append_eos: bool = False  # end token after a plain-text completion
    shared_tokens: int = 256  # padded tokens up to which the samples of one update share a forward; 0 never
    loss_chunk: int = 128  # supervised rows whose logits exist at once

    # memory
    activation_budget_mib: int = 256  # on the model's device, for one sample: what is kept, and prompts, adapt to it

    # lean: 2 MB of masters, moments and gradients at a time at width 2048; resident: all of them, 35 MiB there
    learning_state: LearningState = "lean"  # on a GPU; on a CPU they are in its memory anyway

    # durability
    snapshot_every: int = 100  # updates between snapshots of the state folder
    seed: int = 0

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name, hint in hints.items():
            if isinstance(value := getattr(self, name), list):
                value = tuple(value)
                object.__setattr__(self, name, value)
            # what a state with these settings is loaded with, too
            if not _fits(value, hint):
                raise ConfigError(f"{name} is {value!r}: it must be of type {self.__annotations__[name]}")
        for name in ("optimizer", "guard", "basis_scope", "served_to", "routing", "ring_keep", "learning_state"):
            allowed = get_args(hints[name])
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: use one of {', '.join(allowed)}")
        positive = ("rank", "alpha", "max_active", "experts", "lr", "loraplus_lr_ratio", "basis_columns", "use_window",
                    "warm_samples", "warm_tokens", "ring_samples", "max_tokens", "loss_chunk", "snapshot_every",
                    "learned_below", "rehearsal_batch", "activation_budget_mib")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be greater than 0")
        for name in ("weight_decay", "warmup", "replay_every", "rehearsals", "repeats", "rehearsal_candidates",
                     "directions_per_sample",
                     "settled_below", "base_anchor", "restart_after", "restart_directions", "shared_tokens", "eps",
                     "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must not be negative")
        for name in ("basis_share", "novelty", "warm_energy", "warm_share", "learned_share", "restart_loss"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must lie between 0 and 1")
        for name in ("lr", "loraplus_lr_ratio", "alpha", "weight_decay", "base_anchor", "settled_below",
                     "learned_below", "eps"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be a finite number")
        if not 0.0 <= self.average < 1.0:
            raise ConfigError(f"average is {self.average}: it must lie in [0, 1)")
        if not self.novelty < 1.0:
            raise ConfigError(f"novelty is {self.novelty}: no direction lies outside P by more than all of it")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(f"betas are {self.betas}: they must lie in [0, 1)")
        if self.basis_columns > 512:
            raise ConfigError(f"basis_columns is {self.basis_columns}: a basis has at most 512 directions")
        if self.seed >= 2**63:
            raise ConfigError(f"seed is {self.seed}: it must be below 2^63")
        if self.use_window % 10:
            raise ConfigError(f"use_window is {self.use_window}: it must be a multiple of 10")
        if self.held_rank is not None and self.held_rank < 1:
            raise ConfigError(f"held_rank is {self.held_rank}: it must be at least 1, or null to keep all")
        if self.total_updates is not None and self.total_updates <= self.warmup:
            raise ConfigError(f"total_updates is {self.total_updates}: it must exceed warmup ({self.warmup})")
        if self.max_tokens < 2:
            raise ConfigError(f"max_tokens is {self.max_tokens}: one context and one supervised token are the least")

    @property
    def scaling(self) -> float:
        """alpha / rank, the factor of A B in the forward."""
        return self.alpha / self.rank

    @property
    def routes(self) -> bool:
        """Whether one expert alone answers a prompt, and learns what is like it."""
        return self.routing == "prompt" and self.served_to == "scope"

    @property
    def most_active(self) -> int | None:
        """Experts that are served at once; None is all that there are, where each answers prompts of its own."""
        return None if self.routes else self.max_active

    @property
    def side_by_side(self) -> int:
        """Experts that one forward may compute with, beside adapters that were trained elsewhere."""
        return 1 if self.routes else self.max_active

    @classmethod
    def literal(cls, **changes: Any) -> LearnerConfig:
        """The specification as written: dA projected, SGD at 1e-4, one shared basis, replay 1 in 16, no rehearsal."""
        spec: dict[str, Any] = dict(guard="gradient", optimizer="sgd", lr=1e-4, loraplus_lr_ratio=1.0,
                                    basis_scope="shared", served_to="all", warm_start=False, novelty=0.5,
                                    settled_below=0.0, rehearsals=0, rehearsal_candidates=0)
        return cls(**{**spec, **changes})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LearnerConfig:
        """Settings from JSON values; an unknown key is an error that names it."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"unknown setting {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` reads them back to an equal configuration."""
        return json.loads(json.dumps(asdict(self)))

    def learning_rate(self, update: int) -> float:
        """Rate of A in the given update of an expert (0 is its first): linear warmup, then constant or cosine to 0."""
        if update < self.warmup:
            return self.lr * (update + 1) / (self.warmup + 1)
        if self.total_updates is None:
            return self.lr
        done = min(1.0, (update - self.warmup) / (self.total_updates - self.warmup))
        return self.lr * 0.5 * (1.0 + math.cos(math.pi * done))


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type of a field; a whole number is a float, too."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if origin is tuple:
        kinds = get_args(hint)
        if not isinstance(value, tuple):
            return False
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        return len(kinds) == len(value) and all(map(_fits, value, kinds))
    if origin is Literal or hint is NoneType:
        return hint is not NoneType or value is None  # the constructor names the values that are allowed
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is hint
