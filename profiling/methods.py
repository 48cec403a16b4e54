"""The methods that are compared: their names, how each is built, and the settings that are tried to tune it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from importlib import import_module
from itertools import product
from typing import TYPE_CHECKING, Any

from ogpstream.learner import ConfigError, LearnerConfig

if TYPE_CHECKING:
    from ogpstream.learner import StreamLearner
    from ogpstream.profiling.baselines.baseline import Baseline
    from ogpstream.profiling.student import LearnerStudent, Student

OURS = ("ogp", "ogp-named", "ogp-uncut", "ogp-shared", "ogp-literal")
# the learner itself as plain LoRA, with and without its ring
PLAIN = ("sequential", "replay1")
_BASELINES = {"replay16": "Replay16", "ewc": "EWC", "si": "SI", "agem": "AGEM", "derpp": "DERpp", "mer": "MER",
              "olora": "OLoRA", "osf": "OSF", "joint": "Joint"}
METHODS = (*OURS, "sequential", "replay16", "replay1", "ewc", "si", "agem", "derpp", "mer", "olora", "osf", "joint")
# of plain LoRA by the learner, untuned and tried; each baseline has its own
PLAIN_RATE, PLAIN_RATES, PLAIN_RATIOS = 1e-3, (2.5e-4, 5e-4, 1e-3, 2e-3), (1.0, 2.0)


def named_methods(names: str) -> list[str]:
    """Methods that are named with commas between them, in the order of `METHODS`.

    Raises:
        ConfigError: one is unknown.
    """
    wanted = set(names.split(","))
    if unknown := sorted(wanted - set(METHODS)):
        raise ConfigError(f"unknown method {', '.join(unknown)}: use {', '.join(METHODS)}")
    return [method for method in METHODS if method in wanted]


def baseline_class(method: str) -> type[Baseline]:
    """The class of a baseline, imported when it is asked for."""
    module = import_module(f"ogpstream.profiling.baselines.{method}")
    found: type[Baseline] = getattr(module, _BASELINES[method])
    return found


def method_config(method: str, config: LearnerConfig, *, lr: float | None = None) -> LearnerConfig:
    """The learner's configuration for a method, with its own learning rate if given."""
    if method == "ogp-named":
        config = replace(config, routing="named")
    elif method == "ogp-uncut":
        config = replace(config, held_rank=None)
    elif method == "ogp-shared":
        config = replace(config, basis_scope="shared")
    elif method == "ogp-literal":
        # what was set for all methods stays, the rest is as the specification has it
        own = LearnerConfig()
        config = LearnerConfig.literal(**{f.name: value for f in fields(config)
                                          if (value := getattr(config, f.name)) != getattr(own, f.name)})
    elif method not in OURS:
        config = replace(config, guard="none", served_to="all", routing="named", warm_start=False, settled_below=0.0,
                         second_look=False, rehearsal_candidates=0)
    if method == "sequential":
        config = replace(config, rehearsals=0, replay_every=0)
    return config if lr is None else replace(config, lr=lr)


def learner_student(learner: StreamLearner, method: str, equal: LearnerConfig) -> LearnerStudent:
    """A learner made with `method_config`; `equal` is the configuration whose evaluations the method gets too."""
    # here, because it takes seconds, and the names alone need none of it
    from ogpstream.profiling.student import LearnerStudent

    return LearnerStudent(learner, alone=equal.rehearsals if method == "sequential" else None)


def student(method: str, model: Any, tokenizer: Any, config: LearnerConfig, *, lr: float | None = None,
            strength: float | None = None, calibration: Sequence[str] | None = None) -> Student:
    """A method on a model, which it adapts in place; "joint" learns no stream and is not made here."""
    from ogpstream.learner import StreamLearner

    own = method_config(method, config, lr=lr)
    if method in _BASELINES:
        return baseline_class(method)(model, tokenizer, own, strength=strength)
    return learner_student(StreamLearner(model, tokenizer, own, calibration=calibration), method, config)


def untuned(method: str) -> tuple[float | None, float | None]:
    """(rate, strength) of a method that was not tuned; None leaves what its configuration says."""
    if method in OURS:
        return None, None
    if method in PLAIN:
        return PLAIN_RATE, None
    kind = baseline_class(method)
    return kind.rate, kind.strength


def grid(method: str) -> list[tuple[float, float, float | None]]:
    """(rate, ratio of B's rate to A's, strength) to be tried when the method is tuned; none for ours, whose settings
    are the defaults."""
    if method in OURS:
        return []
    if method in PLAIN:
        return list(product(PLAIN_RATES, PLAIN_RATIOS, (None,)))
    kind = baseline_class(method)
    return list(product(kind.rates, kind.ratios, kind.strengths or (None,)))
