"""What the benchmarks of updates share: options, the folder they write to, CSV, and pictures of rows.

torch is imported where it is used: what a benchmark's --help needs is here too.
"""

from __future__ import annotations

import csv
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import typer
from rich.console import Console

from ogpstream.learner import ConfigError
from ogpstream.profiling.environment import environment
from ogpstream.profiling.methods import METHODS
from ogpstream.profiling.out_folder import OutFolderError, open_folder

if TYPE_CHECKING:
    import torch

Row = dict[str, Any]
Case = TypeVar("Case")


@dataclass(frozen=True)
class Picture:
    """One panel: columns of rows against one of them.

    Attributes:
        sweep: the rows of this value of their column `sweep`.
        x: column along the bottom; y: columns drawn, each divided by `unit`.
        rows: drawn in place of those of the CSV file.
    """

    sweep: str
    x: str
    y: Sequence[str]
    unit: float
    label: str
    rows: Sequence[Row] | None = None

    def of(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that are drawn, of all."""
        return [row for row in rows if row["sweep"] == self.sweep] if self.rows is None else list(self.rows)


def fail(message: str, status: int) -> NoReturn:
    """One line on stderr."""
    Console(stderr=True).print(f"ogpstream: {message}", markup=False, soft_wrap=True)
    raise typer.Exit(status)


def chosen(option: str, words: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """What was asked for, all for nothing, none for "none"; exit status 2 for a word that is not known."""
    unknown = [word for word in words or [] if word not in (*known, "none")]
    if unknown:
        fail(f"{option} {', '.join(unknown)} is unknown: use {', '.join(known)} or none", 2)
    return [name for name in known if not words or name in words]


def assigned(items: Sequence[str], option: str) -> dict[str, Any]:
    """name=value items; a value that is no JSON is a text."""
    values = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            fail(f"{option} {item}: write name=value", 2)
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return values


def method_rates(items: Sequence[str]) -> dict[str, float]:
    """method=rate items of --lr."""
    rates = {}
    for name, rate in assigned(items, "--lr").items():
        if name not in METHODS:
            raise ConfigError(f"--lr {name}={rate} is of no method: use {', '.join(METHODS)}")
        if not isinstance(rate, (int, float)) or isinstance(rate, bool):
            raise ConfigError(f"--lr {name}={rate} is no number: write one, as in {name}=1e-3")
        rates[name] = float(rate)
    return rates


def device_named(name: str) -> torch.device:
    """cpu, cuda, or by default the GPU where there is one."""
    import torch

    if name not in ("", "cpu", "cuda"):
        fail(f"--device is {name!r}: use cpu or cuda", 2)
    if name == "cuda" and not torch.cuda.is_available():
        fail("there is no CUDA device here: leave --device out, or use --device cpu", 1)
    return torch.device("cuda" if torch.cuda.is_available() and name != "cpu" else "cpu")


def prepare(out: Path | None) -> None:
    """`open_folder`, where one is given; what is wrong with it ends the command with one line."""
    try:
        if out is not None:
            open_folder(out)
    except OutFolderError as error:
        fail(str(error), error.exit_status)


def measured(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The values of a benchmark; a setting that does not fit ends it with one line."""
    try:
        return work()
    except (ConfigError, ValueError) as error:
        fail(str(error), 2)


def each(cases: Sequence[Case], name: Callable[[Case], str]) -> Iterator[Case]:
    """The cases one by one; a line on stderr says which one has begun, since each may take a minute."""
    console = Console(stderr=True)
    for number, case in enumerate(cases, 1):
        console.print(f"{number} of {len(cases)}: {name(case)}", markup=False, highlight=False, soft_wrap=True)
        yield case


def write(values: dict[str, Any], name: str, pictures: Sequence[Picture], out: Path | None, *, as_json: bool) -> None:
    """CSV and picture into a folder, if one is given, and the JSON line; each with versions, device and command."""
    import torch

    on = torch.device("cuda" if torch.cuda.is_available() and values["device"] != "cpu" else "cpu")
    # a row that names its own device, such as one that is not there, keeps it
    where = {**environment(on), "command": shlex.join(["ogpstream", *sys.argv[1:]])}
    values = {**where, **values}
    if out is not None:
        rows = [{**where, **row} for row in values["rows"]]
        with (out / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
        _draw(values, pictures, out / f"{name}.png")
        Console(stderr=True).print(f"{out / name}.csv, {out / name}.png", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        typer.echo(json.dumps(values))


def table(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """Lines of fixed width."""
    cells = [list(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[at]) for line in cells) for at in range(len(columns))]
    return ["  ".join(word.rjust(width) for word, width in zip(line, widths, strict=True)) for line in cells]


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _draw(values: dict[str, Any], pictures: Sequence[Picture], path: Path) -> None:
    from matplotlib.figure import Figure

    shown = [one for one in pictures if one.of(values["rows"])]
    figure = Figure(figsize=(4.2 * max(1, len(shown)), 3.4), layout="constrained")
    panels = figure.subplots(1, max(1, len(shown)), squeeze=False)[0]
    for panel, picture in zip(panels, shown, strict=False):
        rows = picture.of(values["rows"])
        for column in picture.y:
            panel.plot([row[picture.x] for row in rows], [row[column] / picture.unit for row in rows],
                       marker="o", markersize=3, label=column)
        panel.set(xlabel=picture.x, ylabel=picture.label, ylim=(0, None))
        panel.legend(fontsize=7)
    figure.suptitle(f"{values['device']}, torch {values['torch']}", fontsize=8)
    figure.savefig(path, dpi=110)
