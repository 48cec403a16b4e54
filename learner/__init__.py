"""Learn from single corrections while serving, and keep what was learned."""

from ogpstream.learner.config import LearnerConfig
from ogpstream.learner.errors import ConfigError, ModelError, OgpStreamError, SampleError, StateError
from ogpstream.learner.learner import StreamLearner
from ogpstream.learner.report import RehearsalReport, SampleReport
from ogpstream.learner.retention import Retention, RetentionProbe
from ogpstream.learner.samples import Sample

__all__ = [
    "ConfigError", "LearnerConfig", "ModelError", "OgpStreamError", "RehearsalReport", "Retention", "RetentionProbe",
    "Sample", "SampleError", "SampleReport", "StateError", "StreamLearner",
]
