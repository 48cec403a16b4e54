"""Learn from single corrections while serving, and keep what was learned.

Names are imported when they are first used: transformers and peft take seconds, and the command line's --help and
status need neither.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ogpstream.learner.batching_engine import BatchingEngine
    from ogpstream.learner.config import LearnerConfig
    from ogpstream.learner.engine import Engine, EngineBusy, LoopEngine
    from ogpstream.learner.errors import ConfigError, ModelError, OgpStreamError, SampleError, StateError
    from ogpstream.learner.generate_engine import GenerateEngine
    from ogpstream.learner.idle import IdleLoop
    from ogpstream.learner.learner import StreamLearner
    from ogpstream.learner.report import LoopStatus, RehearsalReport, SampleReport
    from ogpstream.learner.retention import Retention, RetentionProbe
    from ogpstream.learner.samples import Sample

__all__ = [
    "BatchingEngine", "ConfigError", "Engine", "EngineBusy", "GenerateEngine", "IdleLoop", "LearnerConfig",
    "LoopEngine", "LoopStatus", "ModelError", "OgpStreamError", "RehearsalReport", "Retention", "RetentionProbe",
    "Sample", "SampleError", "SampleReport", "StateError", "StreamLearner",
]

# where the names of __all__ are, the module of most of them first
_MODULES = ("errors", "config", "samples", "learner", "report", "retention", "engine", "idle", "batching_engine",
            "generate_engine")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in _MODULES:
            found = import_module(f"{__name__}.{module}")
            value = getattr(found, name, None)
            if getattr(value, "__module__", None) == found.__name__:
                globals()[name] = value
                return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
