"""Learn from single corrections while serving, and keep what was learned."""

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
