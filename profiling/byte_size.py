"""Sizes in bytes as people write them: "2.32MB" is 2,320,000 and "256MiB" 268,435,456."""

from __future__ import annotations

import re

_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def parse_bytes(text: str | int) -> int:
    """Bytes of a number and a unit, or of a whole number of bytes.

    Raises:
        ValueError: it is no size; the message says how one is written.
    """
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return text
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", text) if isinstance(text, str) else None
    if found is None or found[2] not in _UNITS:
        raise ValueError(f"{text!r} is no size: write a number and one of {', '.join(_UNITS)}, such as '2.32MB'")
    return round(float(found[1]) * _UNITS[found[2]])
