"""The command line `ogpstream`: learn a file, look at a state, go back in it, export it.

Results go to stdout, everything else to stderr; exit status 0 fine, 1 failed, 2 wrong use, 130 interrupted. Other
packages add commands through the entry point group `ogpstream.commands`, each value called with the typer app.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from enum import StrEnum
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer

from ogpstream.learner.config import LearnerConfig
from ogpstream.learner.errors import ConfigError, OgpStreamError, StateError
from ogpstream.learner.folder import StateFolder
from ogpstream.learner.learner import StreamLearner
from ogpstream.learner.pretrained import load_pretrained
from ogpstream.learner.status import read_status
from ogpstream.learner.stream import StreamResult, learn_file
from ogpstream.learner.terminal import LearnProgress, busy, log_to_stderr, tell

GROUP = "ogpstream.commands"
INTERRUPTED = 130

app = typer.Typer(
    name="ogpstream",
    help="A language model that learns from corrections while it serves, and protects what it learned before.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

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
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; by default the GPU where there is one.")]


@app.command()
def learn(
    model: Annotated[str, typer.Option(
        metavar="PATH_OR_ID", help="A decoder: a folder of save_pretrained, or an id on the Hugging Face hub.")],
    samples: Annotated[Path, typer.Option(
        metavar="FILE.jsonl", exists=True, dir_okay=False, readable=True,
        help='One sample a line: {"prompt", "completion"} as texts or chat messages, or {"messages"}; '
             'optional "id", "expert", "source"; "label": false keeps a line without learning it.')],
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
    strict: Annotated[bool, typer.Option(help="Exit with 1 when a line was rejected.")] = False,
    verbose: Annotated[bool, typer.Option(help="Also tell of each line that was cut or kept aside.")] = False,
    as_json: AsJson = False,
    threads: Threads = None,
    dtype: Annotated[DType | None, typer.Option(
        help="Type of the base's weights; by default the state's, or auto: as they were saved.")] = None,
    device: Device = None,
) -> int:
    """Learn a file of corrections, one sample at a time.

    Stop it whenever you like and run the same command again: it goes on where it was, and learns nothing twice (an id,
    or an equal line without one, is known for the next 2^20 lines).
    """
    log_to_stderr(verbose)
    given = _settings(config, setting or [])
    meta = _meta(state)
    if meta is not None:
        _same_settings(state, given, meta["config"])
    settings = LearnerConfig.from_dict(given)
    texts = None if calibration is None or meta is not None else _texts(calibration, settings)
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
        shown = stack.enter_context(LearnProgress(samples))
        result = learn_file(learner, samples, on_progress=shown.update)
    _answer(dataclasses.asdict(result), as_json, _summary(result, state))
    return int(strict and result.rejected > 0)


@app.command()
def status(state: State, as_json: AsJson = False) -> int:
    """Tell what a state holds; works beside a learner that is at work, and needs no model.

    Everything is as of the newest snapshot; `pending` counts the records acknowledged since, which the next start
    applies.
    """
    log_to_stderr()
    try:
        fields, problems = read_status(state)
    except StateError as error:
        if as_json:
            print(json.dumps({"healthy": False, "problem": str(error)}), flush=True)
        raise
    lines = [f"{name:<14}{', '.join(value) if isinstance(value, list) else value}" for name, value in fields.items()]
    _answer(fields, as_json, "\n".join(lines))
    return int(bool(problems))


@app.command()
def rollback(
    state: State,
    to: Annotated[int, typer.Option(metavar="VERSION", min=0, help="A version that is kept: see the error for which.")],
    model: Model = None,
    as_json: AsJson = False,
    threads: Threads = None,
    device: Device = None,
) -> int:
    """Go back to a saved version; what was learned since goes to quarantine.jsonl and stays known by its id."""
    log_to_stderr()
    learner = _resume(state, _needed(state), model=model, threads=threads, device=device)
    try:
        learner.rollback(to)
        fields = {"rolled_back_to": to, **learner.status()}
    finally:
        learner.close()
    _answer(fields, as_json, f"back at version {to}, published as version {fields['version']}")
    return 0


@app.command()
def export(
    state: State,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the adapter, as PEFT reads it.")],
    expert: Annotated[str, typer.Option(help="The expert to write.")] = "default",
    model: Model = None,
    as_json: AsJson = False,
    device: Device = None,
) -> int:
    """Write an expert as one LoRA adapter that PeftModel.from_pretrained loads."""
    log_to_stderr()
    learner = _resume(state, _needed(state), model=model, device=device)
    try:
        learner.export_peft(out, expert)
        fields = {"out": str(out), "expert": expert, "version": learner.version}
    except OSError as error:
        raise StateError(f"{out} cannot be written: {error.strerror or error}; choose another --out") from error
    finally:
        learner.close()
    _answer(fields, as_json, f"wrote expert {expert} of version {fields['version']} to {out}")
    return 0


def main(args: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; every error a user can act on is one line on stderr."""
    _add_plugins()
    words = list(sys.argv[1:] if args is None else args) or ["--help"]
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
        return 1
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except OSError as error:
        tell(f"{error.filename or 'a file'} cannot be used: {error.strerror or error}; check the path and the disk")
        return 1
    if code == INTERRUPTED:
        tell("interrupted: everything acknowledged is safe, and the same command goes on where it was")
    return int(code or 0)


@functools.cache
def _add_plugins() -> None:
    for point in sorted(set(entry_points(group=GROUP)), key=lambda point: point.name):
        try:
            point.load()(app)
        except Exception as error:
            tell(f"the command {point.name} ({point.value}) is left out: {type(error).__name__}: {error}", "warning")


# what the commands share


def _meta(state: Path) -> dict[str, Any] | None:
    """What a state's newest snapshot says; None for a folder without one, which is made.

    Loading a model takes long: a folder that is in use, damaged or not to be written is found before.
    """
    folder = StateFolder(state)
    try:
        return None if folder.empty else folder.load().meta
    finally:
        folder.close()


def _needed(state: Path) -> dict[str, Any]:
    """The same where there must be a state; makes no folder."""
    meta = _meta(state) if (state / "snapshots").is_dir() else None
    if meta is None:
        raise StateError(f"{state} holds no learner state: give the folder that `learn --state` wrote")
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
    _use_threads(threads or meta["environment"]["threads"])
    name = model or saved["name"]
    if not name:
        raise ConfigError(f"the state in {state} does not say where its model is: give --model")
    with busy(f"loading {name}"):
        base, tokenizer = load_pretrained(name, dtype=saved["dtype"], device=device)
    with busy(f"continuing {state}"):
        return StreamLearner.load_state(state, base, tokenizer)


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def _settings(file: Path | None, changes: Sequence[str]) -> dict[str, Any]:
    """The settings that were named, by --config and over it by --set; checked."""
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
            raise typer.BadParameter(f"{change!r} is no setting: write NAME=VALUE", param_hint="--set")
        try:
            given[name] = json.loads(text)
        except ValueError:
            given[name] = text
    LearnerConfig.from_dict(given)
    return given


def _same_settings(state: Path, given: dict[str, Any], saved: dict[str, Any]) -> None:
    asked = LearnerConfig.from_dict(given).to_dict()
    for name in given:
        if asked[name] != saved[name]:
            raise ConfigError(f"the state in {state} was made with {name} = {json.dumps(saved[name])}, not "
                              f"{json.dumps(asked[name])}: leave the setting out, or choose another --state")


def _texts(file: Path, settings: LearnerConfig) -> list[str]:
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


# what the commands print


def _answer(fields: dict[str, Any], as_json: bool, text: str) -> None:
    print(json.dumps(fields, allow_nan=False) if as_json else text, flush=True)


def _summary(result: StreamResult, state: Path) -> str:
    parts = [f"learned {result.learned} of {result.samples} samples"]
    counts = (("skipped as known", result.skipped), ("rejected", result.rejected),
              ("kept, not trained on", result.quarantined), ("cut to fit", result.cut))
    parts += [f"{count} {name}" for name, count in counts if count]
    lines = [", ".join(parts)]
    if result.update_ms_p50 is not None:
        lines.append(f"{result.update_ms_p50:.1f} ms a sample (median; 95 %: {result.update_ms_p95:.1f})")
    if result.loss_first is not None:
        lines.append(f"loss before the update {result.loss_first:.3f} at first, {result.loss_last:.3f} at last, "
                     "nats a token")
    lines.append(f"{state} serves version {result.version}")
    return "\n".join(lines)
