"""What `bench serving` serves and learns: a model with random weights, prompts and samples, random or the demo's."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ogpstream.learner import Sample
from ogpstream.profiling import demo_corrections
from ogpstream.profiling.vram import llama_config

# ids that a sample's completion has of all
SUPERVISED = 4


def random_model(device: torch.device, layers: int | None, width: int | None, vocabulary: int | None, seed: int
                 ) -> PreTrainedModel:
    """Llama's architecture with random weights: 7M parameters in float32 on a CPU, TinyLlama-1.1B's on a GPU."""
    small = device.type == "cpu"
    width = width or (256 if small else 2048)
    heads = width // 64
    architecture = llama_config(
        layers=layers or (4 if small else 22), width=width, inner=11 * width // 4, heads=heads,
        key_heads=max(1, heads // 8), vocabulary=vocabulary or (8000 if small else 32000),
    )  # fmt: skip
    torch.manual_seed(seed)
    with torch.device(device):
        dtype = torch.float32 if small else torch.bfloat16
        model: PreTrainedModel = AutoModelForCausalLM.from_config(architecture, dtype=dtype)
    return model.eval()


def random_ids(vocabulary: int, count: int, seed: int) -> Iterator[list[int]]:
    """Lists of `count` ids, without end."""
    numbers = random.Random(seed)
    while True:
        yield [numbers.randrange(1, vocabulary) for _ in range(count)]


def random_samples(vocabulary: int, tokens: int, seed: int) -> Iterator[Sample]:
    """Samples of so many ids, a quarter of them supervised, without end."""
    begin = tokens - max(1, tokens // SUPERVISED)
    for ids in random_ids(vocabulary, tokens, seed):
        yield Sample(prompt_ids=tuple(ids[:begin]), completion_ids=tuple(ids[begin:]))


def demo_prompts(tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Ids of the test wordings of the demo's corrections, again and again."""
    while True:
        for one in demo_corrections.corrections():
            if one.split == "test":
                yield tokenizer(one.prompt)["input_ids"]


def demo_samples(seed: int) -> Iterator[Sample]:
    """The demo's corrections, again and again in another order; an id would have them learned once."""
    while True:
        yield from (Sample(one.prompt, one.completion) for one in demo_corrections.stream(seed))
        seed += 1
