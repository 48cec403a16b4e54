"""The share of wall time that units may take."""

from __future__ import annotations

from collections.abc import Callable

from ogpstream.learner.errors import ConfigError


class DutyCycle:
    """Credit that grows by `share` seconds in a second, up to `burst`, and pays for units after they are done.

    So in any stretch of t seconds units take at most share * t + burst, and the unit that overdrew it.

    Args:
        share: above 0, at most 1, which never holds anything back.
        clock: seconds, monotonic.
        burst: seconds of learning that an idle stretch can save up.

    Raises:
        ConfigError: a share out of range.
    """

    def __init__(self, share: float, clock: Callable[[], float], burst: float = 0.5) -> None:
        if not 0.0 < share <= 1.0:
            raise ConfigError(f"the duty cycle is {share}: it must be above 0 and at most 1")
        self._share = share
        self._clock = clock
        self._burst = burst
        self._credit = burst
        self._at = clock()

    def wait(self) -> float:
        """Seconds until a unit may run; 0 if one may now."""
        now = self._clock()
        self._credit = min(self._burst, self._credit + self._share * (now - self._at))
        self._at = now
        return max(0.0, -self._credit / self._share)

    def spend(self, seconds: float) -> None:
        """A unit took so long."""
        self._credit -= seconds
