"""What options of the command line say: settings, calibration texts and experts, checked before anything is made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ogpstream.learner.config import LearnerConfig
from ogpstream.learner.errors import ConfigError


def read_settings(file: Path | None, changes: Sequence[str]) -> dict[str, Any]:
    """The settings that were named, by --config and over it by --set. Raises ConfigError."""
    given: dict[str, Any] = {}
    if file is not None:
        try:
            given = json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise ConfigError(f"{file} is not JSON: {error}; write one object of settings") from error
        if not isinstance(given, dict):
            raise ConfigError(f"{file} does not hold a JSON object; write one object of settings")
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise ConfigError(f"--set {change!r} is no setting: write NAME=VALUE")
        try:
            given[name] = json.loads(text)
        except ValueError:
            given[name] = text
    LearnerConfig.from_dict(given)
    return given


def check_same(state: Path, given: dict[str, Any], saved: dict[str, Any]) -> None:
    """Raises ConfigError where a setting that was named is not the one that a state has.

    Args:
        saved: settings of the state; one that it lacks has its default, as where the state is loaded.
    """
    asked, has = (LearnerConfig.from_dict(settings).to_dict() for settings in (given, saved))
    for name in given:
        if asked[name] != has[name]:
            raise ConfigError(f"the state in {state} has {name} = {json.dumps(has[name])}, not "
                              f"{json.dumps(asked[name])}: leave the setting out, or choose another --state")


def read_texts(file: Path, settings: LearnerConfig) -> list[str]:
    """The lines of --calibration. Raises ConfigError."""
    if not settings.warm_start or settings.guard != "fold":
        raise ConfigError("calibration texts serve the warm start, which needs warm_start = true and guard = fold: "
                          "set these, or drop the texts")
    try:
        texts = [line for line in file.read_text("utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise ConfigError(f"{file} is not UTF-8: {error}; save it as UTF-8 text, one a line") from error
    if not texts:
        raise ConfigError(f"{file} holds no text: write one text a line, or leave --calibration out")
    return texts


def read_experts(
    words: Sequence[str], known: Mapping[str, int], *, routes: bool, widest: int | None = None
) -> dict[str, int | None]:
    """Rank by name of the experts of --add-expert that a state lacks; None is the rank of the settings.

    Args:
        known: rank by name of those that the state has.
        routes: names that begin as those of routing are refused.
        widest: the highest rank that the model allows; None where it is not known yet.

    Raises:
        ConfigError: one is not NAME or NAME:RANK, the state has it with another rank, or it cannot be made.
    """
    from ogpstream.learner.samples import EXPERT_NAME, check_new_expert

    experts: dict[str, int | None] = {}
    for word in words:
        name, colon, text = word.partition(":")
        rank = int(text) if text.isdecimal() else None
        if not EXPERT_NAME.fullmatch(name) or colon and not rank:
            raise ConfigError(f"--add-expert {word!r} is no expert: write NAME or NAME:RANK, the name of letters, "
                              "digits, '_' and '-'")
        if name in known:
            if rank not in (None, known[name]):
                raise ConfigError(f"the expert {name} has rank {known[name]}, not {rank}: leave the rank out, or "
                                  "choose another name")
            continue
        try:
            check_new_expert(name, rank, routes=routes, widest=widest)
        except ConfigError as error:
            raise ConfigError(f"--add-expert {word}: {error}") from None
        experts[name] = rank
    return experts
