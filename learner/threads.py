"""How long the threads of torch spin before they sleep, which decides what they cost beside other work."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

# of GNU's OpenMP, which waits so many turns of a loop for the next product, 300,000 where nothing says otherwise. On
# two busy cores each then waits for one that does not run: a state and three corrections took 135 s so, 14 s with
# 10,000 and 11 s on one thread; on idle cores 6 s all three, and 9 s without any spinning (base of 1.7M parameters)
SPIN, TURNS = "GOMP_SPINCOUNT", "10000"
# what users set for the same; it would be overruled
POLICY = "OMP_WAIT_POLICY"


def spin_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let torch's threads sleep soon, unless the environment says how they wait; before torch is imported."""
    if POLICY not in environment:
        environment.setdefault(SPIN, TURNS)
