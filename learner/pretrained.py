"""Models and tokenizers by name: a folder of `save_pretrained`, or an id on the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from ogpstream.learner.errors import ConfigError, ModelError

_REMEDY = "give a folder written by save_pretrained, or the id of a decoder on the Hugging Face hub (with a network)"


def load_pretrained(
    name: str | os.PathLike[str], *, dtype: str = "auto", device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A decoder and its tokenizer; quiet on stdout and stderr.

    Args:
        dtype: of the weights; "auto" is the one they were saved in.
        device: by default the GPU where there is one.

    Raises:
        ConfigError: there is no such folder or device, or no model in the folder.
        ModelError: what is there cannot be loaded, weights are missing, or the device has no room.
    """
    name, config = check_pretrained(name)
    place_on = _device(device)
    try:
        wanted = dtype if dtype == "auto" else getattr(torch, dtype)
        model, report = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=wanted, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        # whatever the hub, the files and the model's own code raise; no two versions agree on the types
        raise _unloadable(name, error) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(f"{name} lacks {len(missing)} of its weights, such as {missing[0]}: save it again, whole")
    try:
        return model.to(place_on), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"cannot put the model on {place_on}: {_first_line(error)}; try --device cpu") from error


def check_pretrained(name: str | os.PathLike[str]) -> tuple[str, PretrainedConfig]:
    """The name that a model will be loaded by, and its configuration: a wrong name is found before anything is made.

    Raises:
        ConfigError: there is no such folder, or no model in it.
        ModelError: the configuration cannot be loaded.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    place = Path(name)
    if place.exists():
        # a later command may run elsewhere: the state remembers where the model was
        name = str(place.resolve())
        if not (place / "config.json").is_file():
            raise ConfigError(f"{name} holds no model (no config.json): {_REMEDY}")
    elif len(place.parts) > 2 or place.is_absolute() or str(name).startswith(("./", "../", "~")):
        raise ConfigError(f"there is no folder {name}: {_REMEDY}")
    try:
        return str(name), AutoConfig.from_pretrained(name)
    except Exception as error:
        raise _unloadable(name, error) from error


def _device(name: str | None) -> torch.device:
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        device = torch.device(name or ("cuda" if cuda else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"{name!r} is no device: try --device cpu") from error
    if device.type == "cuda" and (device.index or 0) >= cuda:
        raise ConfigError(f"there is no device {device} here, but {cuda} of CUDA: try --device cpu")
    return device


def _unloadable(name: str | os.PathLike[str], error: Exception) -> ModelError:
    return ModelError(f"cannot load the model {name}: {_first_line(error)}; {_REMEDY}")


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
