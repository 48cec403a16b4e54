"""Errors that a user can act on: one line that names what is wrong and what to do."""


class OgpStreamError(Exception):
    """Base of all errors of this package that a caller is expected to handle.

    `exit_status` is that of a command which it ends: 1 the work failed, 2 what was asked for is wrong.
    """

    exit_status = 1


class ConfigError(OgpStreamError):
    """A setting is out of range, unknown, or does not fit the others; nothing was done."""

    exit_status = 2


class ModelError(OgpStreamError):
    """The model cannot be adapted, walked layer by layer, or does not match a state or an adapter."""


class SampleError(OgpStreamError):
    """A sample cannot be learned from; nothing of it reached the state."""


class StateError(OgpStreamError):
    """A state folder cannot be read, written, or belongs to another base model."""
