"""The command line `ogpstream`: learn a file, ask the model, look at a state, go back in it, freeze parts, export it.

Results go to stdout, everything else to stderr; what the exit status says is in EPILOG. Other packages add commands
through the entry point group `ogpstream.commands`, each value called with the typer app. Commands import what they
need when they run: torch and transformers take seconds, and --help needs neither.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, closing
from enum import StrEnum
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ogpstream.learner.config import LearnerConfig
from ogpstream.learner.errors import ConfigError, OgpStreamError, StateError
from ogpstream.learner.options import check_same, read_experts, read_settings, read_texts
from ogpstream.learner.pace import check_budget
from ogpstream.learner.terminal import (
    LearnProgress,
    answers_shown,
    busy,
    learn_summary,
    log_to_stderr,
    status_table,
    tell,
)
from ogpstream.learner.threads import spin_briefly

if TYPE_CHECKING:
    from ogpstream.learner.learner import StreamLearner

GROUP = "ogpstream.commands"
DISTRIBUTION = "ogp-lora-stream"
INTERRUPTED = 130
EPILOG = ("Exit status: 0 fine; 1 the work failed, or --strict and a line was rejected; 2 the command or a setting is "
          "wrong, and nothing was done; 130 interrupted. Errors are one line on stderr.")

app = typer.Typer(
    name="ogpstream",
    help="A language model that learns from corrections while it serves, and protects what it learned before.",
    epilog=EPILOG,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _tell_version(wanted: bool) -> None:
    if wanted:
        print(f"ogpstream {version(DISTRIBUTION)}")
        raise typer.Exit


@app.callback()
def _common(
    _version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_tell_version,
                                           help="Print the version and do nothing else.")] = False,
) -> None:
    pass


# newer typers bring their own copy of click, older ones use the package: its base is found through a class of either
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]


class DType(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


State = Annotated[Path, typer.Option("--state", metavar="DIR", help="Folder of the learner's state.")]
Model = Annotated[str | None, typer.Option(
    "--model", metavar="PATH_OR_ID", help="The model the state was made with; by default where it was then.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]
Threads = Annotated[int | None, typer.Option(
    min=1, help="CPU threads; a state continues bit for bit only with the number it was made with, its default.")]
Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="Experts, as `ogpstream status` has them.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; by default the GPU where there is one.")]


@app.command()
def learn(
    model: Annotated[str, typer.Option(
        metavar="PATH_OR_ID", help="A decoder: a folder of save_pretrained, or an id on the Hugging Face hub.")],
    samples: Annotated[Path, typer.Option(
        metavar="FILE.jsonl", exists=True, dir_okay=False, readable=True,
        help='One sample a line: {"prompt", "completion"} as texts or chat messages, or {"messages"}; '
             'optional "id", "expert", "source", "meta"; "label": false keeps a line without learning it.')],
    state: Annotated[Path, typer.Option(
        metavar="DIR", help="Folder of the learner's state; made if it is missing, continued if it is not.")],
    config: Annotated[Path | None, typer.Option(
        metavar="FILE.json", exists=True, dir_okay=False, readable=True,
        help="Settings of LearnerConfig for a new state, as one JSON object.")] = None,
    setting: Annotated[list[str] | None, typer.Option(
        "--set", metavar="NAME=VALUE", help="One setting, over those of --config; repeat for more.")] = None,
    calibration: Annotated[Path | None, typer.Option(
        metavar="FILE.txt", exists=True, dir_okay=False, readable=True,
        help="Texts, one a line, that the base model should stay good at; by default it writes some itself.")] = None,
    add_expert: Annotated[list[str] | None, typer.Option(
        metavar="NAME[:RANK]", help='Make this expert if the state lacks it, for lines with "expert": NAME; '
                                    "repeat for more.")] = None,
    update_budget_ms: Annotated[float | None, typer.Option(
        metavar="MS", help="Milliseconds for one update: longer ones leave out the left of prompts, then layers. What "
                           "was left out is in the state, what the budget was is not.")] = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Then rehearse what was forgotten, until all is known or "
                                                            "100 rounds did not do it. Stop it as you like.")] = False,
    strict: Annotated[bool, typer.Option(help="Exit with 1 when a line was rejected.")] = False,
    verbose: Annotated[bool, typer.Option(help="Tell of lines kept aside, and of all that were cut.")] = False,
    as_json: AsJson = False,
    threads: Threads = None,
    dtype: Annotated[DType | None, typer.Option(
        help="Type of the base's weights; by default the state's, or auto: as they were saved.")] = None,
    device: Device = None,
) -> int:
    """Learn a file of corrections, one sample at a time.

    Stop it whenever you like and run the same command again: it goes on where it was, and learns nothing twice (an id,
    or an equal line without one, is known for the next 2^20 lines). Rejected lines are told on every run, and learned
    once they are mended.
    """
    log_to_stderr(verbose)
    check_budget(update_budget_ms)
    given = read_settings(config, setting or [])
    meta = _meta(state)
    if meta is not None:
        check_same(state, given, meta["config"])
    settings = LearnerConfig.from_dict(given)
    texts = None if calibration is None or meta is not None else read_texts(calibration, settings)
    known = {"default": settings.rank} if meta is None else {e["name"]: e["rank"] for e in meta["experts"]["experts"]}
    # which experts the journal of a state has besides, as those that routing made, is seen once it is loaded
    read_experts(add_expert or [], known, routes=meta is None and settings.routes)
    from ogpstream.learner.learner import StreamLearner
    from ogpstream.learner.pretrained import load_pretrained
    from ogpstream.learner.stream import learn_file

    with ExitStack() as stack:
        if meta is None:
            _use_threads(threads)
            with busy(f"loading {model}"):
                base, tokenizer = load_pretrained(model, dtype=dtype or DType.auto, device=device)
            with busy("looking at what the model uses, to protect it"):
                learner = StreamLearner(base, tokenizer, settings, state_dir=state, calibration=texts)
        else:
            learner = _resume(state, meta, model=model, threads=threads, dtype=dtype, device=device)
        stack.callback(learner.close)
        # the rest of what a run before had acknowledged, which is done by now
        recovered = learner.state.counters.learned - (0 if meta is None else meta["counters"]["learned"])
        known = {name: learner.state.store.expert(name).rank for name in learner.experts}
        experts = read_experts(add_expert or [], known, routes=learner.config.routes, widest=learner.attachment.widest)
        for name, rank in experts.items():
            learner.add_expert(name, rank=rank)
        learner.update_budget_ms = update_budget_ms
        shown = stack.enter_context(LearnProgress(samples))
        result = learn_file(learner, samples, refresh=refresh, on_progress=shown.update)
        result.recovered = recovered
    _answer(dataclasses.asdict(result), as_json, learn_summary(result, state))
    return int(strict and result.rejected > 0)


@app.command()
def status(state: State, as_json: AsJson = False) -> int:
    """Tell what a state holds; works beside a learner that is at work, and needs no model.

    Everything is as of the newest snapshot; `pending` counts the records acknowledged since, which the next start
    applies.
    """
    log_to_stderr()
    try:
        _check_state(state)
        from ogpstream.learner.status import read_status

        fields, problems = read_status(state)
    except OgpStreamError as error:
        if as_json:
            print(json.dumps({"healthy": False, "problem": str(error)}), flush=True)
        raise
    _answer(fields, as_json, status_table(fields))
    return int(bool(problems))


@app.command()
def ask(
    prompts: Annotated[list[str], typer.Argument(
        metavar="PROMPT...", help="What to ask, as in the samples; in most shells $'Q: ...\\nA:' has a line end.")],
    state: State,
    chat: Annotated[bool, typer.Option("--chat", help="Ask as a user of a chat, by the tokenizer's template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of each answer, at most.")] = 32,
    model: Model = None,
    as_json: AsJson = False,
    threads: Threads = None,
    device: Device = None,
) -> int:
    """Ask the model with what it learned, and beside it the base model; tells which expert answers."""
    log_to_stderr()
    try:
        "".join(prompts).encode()
    except UnicodeEncodeError:
        raise ConfigError("a prompt is not UTF-8: ask in that") from None
    if not all(map(str.strip, prompts)):
        raise ConfigError("a prompt is empty: give what to ask")
    meta = _needed(state)
    from ogpstream.learner.answer import answer

    with closing(_resume(state, meta, model=model, threads=threads, device=device)) as learner:
        said = [answer(learner, [{"role": "user", "content": prompt}] if chat else prompt, max_new_tokens)
                for prompt in prompts]
        fields = {"version": learner.version, "answers": [dataclasses.asdict(one) for one in said]}
    _answer(fields, as_json, answers_shown(said))
    return 0


@app.command()
def rollback(
    state: State,
    to: Annotated[int, typer.Option(
        metavar="VERSION", min=0, help="One of the versions that `ogpstream status` lists.")],
    model: Model = None,
    as_json: AsJson = False,
    threads: Threads = None,
    device: Device = None,
) -> int:
    """Go back to a saved version; what was learned since goes to quarantine.jsonl and stays known by its id."""
    log_to_stderr()
    meta = _needed(state)
    if to not in meta["versions"]:
        raise ConfigError(f"no version {to} in {state}: there are {', '.join(map(str, meta['versions']))}")
    with closing(_resume(state, meta, model=model, threads=threads, device=device)) as learner:
        learner.rollback(to)
        fields = {"rolled_back_to": to, **learner.status()}
    _answer(fields, as_json, f"back at version {to}, published as version {fields['version']}")
    return 0


@app.command()
def freeze(names: Names, state: State, model: Model = None, as_json: AsJson = False, threads: Threads = None,
           device: Device = None) -> int:
    """Let experts be as they are: no update changes them, samples of theirs are rejected; they go on answering."""
    return _freeze(names, state, model, as_json, threads, device, frozen=True)


@app.command()
def unfreeze(names: Names, state: State, model: Model = None, as_json: AsJson = False, threads: Threads = None,
             device: Device = None) -> int:
    """Let frozen experts learn again."""
    return _freeze(names, state, model, as_json, threads, device, frozen=False)


@app.command()
def export(
    state: State,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the adapter, as PEFT reads it.")],
    expert: Annotated[str | None, typer.Option(help="The expert to write, alone; without it all of them: default in "
                                               "DIR, each other one in DIR/NAME, as PEFT has them.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an adapter that is there.")] = False,
    model: Model = None,
    as_json: AsJson = False,
    threads: Threads = None,
    device: Device = None,
) -> int:
    """Write experts as LoRA adapters that PeftModel.from_pretrained loads."""
    log_to_stderr()
    meta = _needed(state)
    if not force and out.is_dir() and any(out.iterdir()):
        way = ", or give --force to replace the adapter there" if (out / "adapter_config.json").exists() else ""
        raise ConfigError(f"{out} is not empty: choose another --out{way}")
    with closing(_resume(state, meta, model=model, threads=threads, device=device)) as learner:
        names = learner.experts if expert is None else (expert,)
        if expert is None:
            learner.export_experts(out, replace=force)
        else:
            learner.export_peft(out, expert, replace=force)
        fields = {"out": str(out), "expert": names[0], "experts": names, "version": learner.version}
    _answer(fields, as_json, f"wrote {', '.join(names)} of version {fields['version']} to {out}")
    return 0


def main(args: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; every error a user can act on is one line on stderr."""
    spin_briefly()
    words = list(sys.argv[1:] if args is None else args) or ["--help"]
    _add_plugins(words[0])
    try:
        with warnings.catch_warnings():
            # of the libraries below, about themselves: nothing that a user of this command can act on
            warnings.simplefilter("ignore")
            code = app(words, prog_name="ogpstream", standalone_mode=False)
    except _ClickException as error:
        shown = cast(Any, error)
        tell(f"{' '.join(shown.format_message().split())} (see ogpstream --help)")
        return int(shown.exit_code)
    except OgpStreamError as error:
        tell(" ".join(str(error).split()))
        return error.exit_status
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except OSError as error:
        tell(f"{error.filename or 'a file'} cannot be used: {error.strerror or error}; check the path and the disk")
        return 1
    if code == INTERRUPTED:
        tell("interrupted: everything acknowledged is safe, and the same command goes on where it was")
    return int(code or 0)


def _add_plugins(first: str) -> None:
    """Add the commands of other packages where the first word may need them."""
    if any(first in (own.name, getattr(own.callback, "__name__", None)) for own in app.registered_commands):
        return
    points = sorted(set(entry_points(group=GROUP)), key=lambda point: point.name)
    for point in [point for point in points if point.name == first] or points:
        _add_plugin(point)


@functools.cache
def _add_plugin(point: EntryPoint) -> None:
    try:
        point.load()(app)
    except Exception as error:
        tell(f"the command {point.name} ({point.value}) is left out: {type(error).__name__}: {error}", "warning")


# what the commands share


def _freeze(
    names: list[str], state: Path, model: str | None, as_json: bool, threads: int | None, device: str | None, *,
    frozen: bool,
) -> int:
    log_to_stderr()
    meta = _needed(state)
    with closing(_resume(state, meta, model=model, threads=threads, device=device)) as learner:
        if unknown := [name for name in names if name not in learner.experts]:
            raise ConfigError(f"no expert {unknown[0]!r} in {state}: there are {', '.join(learner.experts)}")
        for name in names:
            (learner.freeze if frozen else learner.unfreeze)(name)
        # `status` reads what is saved
        learner.save_state()
        fields = learner.status()
    _answer(fields, as_json, f"frozen now: {', '.join(fields['frozen']) or 'none'}")
    return 0


def _meta(state: Path) -> dict[str, Any] | None:
    """What a state's newest snapshot says; None for a folder without one, which is made later.

    Loading a model takes long: a folder that is in use, damaged or not to be written is found before.
    """
    if not (state / "snapshots").is_dir():
        place = next(folder for folder in (state, *state.absolute().parents) if folder.exists())
        if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
            raise StateError(f"{state} cannot be used: {place} is no folder that can be written; "
                             "choose a folder that can")
        return None
    from ogpstream.learner.folder import StateFolder
    from ogpstream.learner.state import FORMAT
    from ogpstream.learner.status import read_status

    folder = StateFolder(state)
    try:
        if folder.empty:
            return None
        meta = folder.load().meta
        if meta.get("format") != FORMAT:
            # it raises what `status` says of such a state
            read_status(state)
        return {**meta, "versions": folder.versions()}
    finally:
        folder.close()


def _check_state(state: Path) -> None:
    if not (state / "snapshots").is_dir():
        raise ConfigError(f"{state} holds no learner state: give the folder that `learn --state` wrote")


def _needed(state: Path) -> dict[str, Any]:
    """`_meta` where there must be a state; makes no folder."""
    _check_state(state)
    meta = _meta(state)
    if meta is None:
        raise StateError(f"{state} is damaged: it has no snapshot; restore the folder from a copy")
    return meta


def _resume(
    state: Path,
    meta: dict[str, Any],
    *,
    model: str | None,
    threads: int | None = None,
    dtype: DType | None = None,
    device: str | None = None,
) -> StreamLearner:
    """A learner that goes on from a state, on the model that the state remembers or another place of the same."""
    saved = meta["model"]
    if dtype not in (None, DType.auto, saved["dtype"]):
        raise ConfigError(f"the state in {state} was made in {saved['dtype']}: leave --dtype out, "
                          "or choose another --state")
    name = model or saved["name"]
    if not name:
        raise ConfigError(f"the state in {state} does not say where its model is: give --model")
    from ogpstream.learner.learner import StreamLearner
    from ogpstream.learner.pretrained import load_pretrained

    _use_threads(threads or meta["environment"]["threads"])
    try:
        with busy(f"loading {name}"):
            base, tokenizer = load_pretrained(name, dtype=saved["dtype"], device=device)
    except ConfigError as error:
        if model is not None:
            raise
        raise ConfigError(f"{error}; the state was made with that one, --model says where it is now") from None
    with busy(f"continuing {state}"):
        return StreamLearner.load_state(state, base, tokenizer)


def _use_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def _answer(fields: dict[str, Any], as_json: bool, text: str) -> None:
    print(json.dumps(fields, allow_nan=False) if as_json else text, flush=True)
