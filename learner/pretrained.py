"""Models and tokenizers by name: a folder of `save_pretrained`, or an id on the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ogpstream.learner.errors import ModelError

_REMEDY = "give a folder written by save_pretrained, or the id of a decoder on the Hugging Face hub (with a network)"


def load_pretrained(
    name: str | os.PathLike[str], *, dtype: str = "auto", device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A decoder and its tokenizer; quiet on stdout and stderr.

    Args:
        dtype: of the weights; "auto" is the one they were saved in.
        device: by default the GPU where there is one.

    Raises:
        ModelError: nothing can be loaded by this name, weights are missing, or the device does not exist.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    place = Path(name)
    if place.exists():
        # a later command may run elsewhere: the state remembers where the model was
        name = str(place.resolve())
        if not (place / "config.json").is_file():
            raise ModelError(f"{name} holds no model (no config.json): {_REMEDY}")
    elif len(place.parts) > 2 or place.is_absolute() or str(name).startswith(("./", "../", "~")):
        raise ModelError(f"there is no folder {name}: {_REMEDY}")
    try:
        wanted = dtype if dtype == "auto" else getattr(torch, dtype)
        model, report = AutoModelForCausalLM.from_pretrained(name, dtype=wanted, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        # whatever the hub, the files and the model's own code raise; no two versions agree on the types
        raise ModelError(f"cannot load the model {name}: {_first_line(error)}; {_REMEDY}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(f"{name} lacks {len(missing)} of its weights, such as {missing[0]}: save it again, whole")
    place_on = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(place_on), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"cannot put the model on {place_on}: {_first_line(error)}; try --device cpu") from error


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
