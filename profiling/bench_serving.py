"""`ogpstream bench serving`: what requests feel of learning, with and without it in turns on the same requests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ogpstream.learner import LearnerConfig, OgpStreamError
from ogpstream.profiling.bench_report import Picture, Row, device_named, fail, prepare, table, write

if TYPE_CHECKING:
    import torch

# random samples are never known, so each one counts as learned in its second update: P grows and held parts are cut,
# which are the longest units that there are
GROWING = LearnerConfig(repeats=1, learned_below=1e9, learned_share=0.0, served_to="all")


def bench_serving(
    device: Annotated[str, typer.Option(help="cuda or cpu; by default the GPU where there is one")] = "",
    model: Annotated[str | None, typer.Option(help="folder or hub id, which learns the demo's corrections; by default "
                                              "random weights, 1.1B on a GPU, and random samples")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="L of random weights; by default 4, on a GPU 22")] = None,
    width: Annotated[int | None, typer.Option(min=64, help="d; by default 256, and 2048")] = None,
    vocabulary: Annotated[int | None, typer.Option(min=100, help="by default 8000, and 32000")] = None,
    tokens: Annotated[int, typer.Option(min=2, max=1024, help="T of a random sample, a quarter supervised")] = 128,
    prompt: Annotated[int, typer.Option(min=1, max=1024, help="ids of a random prompt")] = 64,
    new: Annotated[int, typer.Option(min=1, max=512, help="tokens of a reply")] = 8,
    requests: Annotated[int, typer.Option(min=1, help="of each phase")] = 200,
    updates: Annotated[int, typer.Option(min=0, help="phase on goes on until so many samples are learned")] = 0,
    cap_mib: Annotated[int | None, typer.Option(min=1, help="MiB of a GPU's memory that the process has")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="folder for serving.csv and serving.png")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line of stdout")] = False,
) -> None:
    """Time to first token with and without learning, waits for units, and whether replies are of their versions."""
    # here, because they take seconds, and --help needs none of them
    import torch
    from transformers.utils import logging as transformers_logging

    from ogpstream.learner import StreamLearner
    from ogpstream.learner.pretrained import load_pretrained
    from ogpstream.profiling.load import Server
    from ogpstream.profiling.serving_inputs import demo_prompts, demo_samples, random_ids, random_model, random_samples
    from ogpstream.profiling.serving_report import distribution, summary
    from ogpstream.profiling.serving_run import check, run

    on = device_named(device)
    if width is not None and width % 64:
        fail(f"--width is {width}: use a multiple of 64, the width of an attention head", 2)
    if cap_mib is not None:
        _cap(cap_mib, on)
    prepare(out)
    try:
        from transformers.cli.serving.utils import InferenceThread
    except ImportError as error:
        fail(f"the generate thread of transformers needs what its server needs ({error}): pip install "
             "'transformers[serving]'", 1)
    console = Console(stderr=True)

    def tell(served: int, learned: int) -> None:
        console.print(f"{served} requests of phase on, {learned} samples learned", highlight=False)

    transformers_logging.set_verbosity_error()
    try:
        if model is None:
            base, tokenizer, config = random_model(on, layers, width, vocabulary, seed), None, GROWING
            samples = random_samples(base.config.vocab_size, tokens, seed + 1)
            prompts: Iterator[list[int]] = random_ids(base.config.vocab_size, prompt, seed + 2)
        else:
            (base, tokenizer), config = load_pretrained(model, device=on.type), LearnerConfig()
            samples, prompts = demo_samples(seed), demo_prompts(tokenizer)
        # journal and snapshots as beside a real server, whose requests feel them too
        with TemporaryDirectory() as state:
            learner = StreamLearner(base, tokenizer, config, state_dir=state)
            learner.warm_up()
            server = Server(learner, InferenceThread(), new)
            done = run(server, prompts, samples, requests=requests, updates=updates, seed=seed, on_block=tell)
            checked = check(server, done.kept)
            learner.close()
    except torch.OutOfMemoryError as error:
        fail(f"no memory for the model or a request: {str(error).splitlines()[0]}; raise --cap-mib, or use a smaller "
             "model", 1)
    except OgpStreamError as error:
        fail(str(error), error.exit_status)
    values = {**summary(done, checked), "parameters": sum(p.numel() for p in base.parameters()), "cap_mib": cap_mib,
              **_memory(on), "device": on.type if on.type == "cpu" else torch.cuda.get_device_name(on),
              "threads": torch.get_num_threads(), "rows": done.rows}
    typer.echo("\n".join(table([{"phase": name, **{key: values[f"{key}_{name}"] for key in (
        "ttft_p50", "ttft_p99", "tokens_per_s")}} for name in ("off", "on")], [
            "phase", "ttft_p50", "ttft_p99", "tokens_per_s"])), err=as_json)  # fmt: skip
    typer.echo(f"waits of phase on: median {values['wait_ms_p50']:.2f} ms, 99 of 100 {values['wait_ms_p99']:.2f}, "
               f"longest {values['max_wait_ms']:.2f}; {values['updates']} updates, {values['versions']} versions "
               f"served, {len(checked) - values['wrong']} of {len(checked)} replies made again alike", err=as_json)
    write(values, "serving", [Picture("", "percent", ("off", "on"), 1.0, "time to first token, ms",
                                      distribution(done.rows))], out, as_json=as_json)
    if values["wrong"]:
        versions = ", ".join(str(row["version"]) for row in checked if not row["equal"])
        fail(f"{values['wrong']} of {len(checked)} replies are not of the version that they name: {versions}", 1)
    if done.status.failures:
        fail(f"the learner failed, and the run ended there: {done.status.last_error}", 1)


def _cap(mib: int, device: torch.device) -> None:
    import torch

    if device.type == "cpu":
        fail("--cap-mib bounds the memory of a GPU: leave it out on a CPU", 2)
    total = torch.cuda.get_device_properties(device).total_memory / 2**20
    if mib > total:
        fail(f"--cap-mib is {mib}: the GPU has {total:.0f} MiB", 2)
    torch.cuda.set_per_process_memory_fraction(mib / total)


def _memory(device: torch.device) -> Row:
    """Peaks of the allocator, without the CUDA context: what it took from the GPU, and what of it was in use."""
    import torch

    if device.type == "cpu":
        return {"peak_mib": None, "peak_allocated_mib": None}
    return {"peak_mib": torch.cuda.max_memory_reserved(device) / 2**20,
            "peak_allocated_mib": torch.cuda.max_memory_allocated(device) / 2**20}
