"""What `ogpstream bench forgetting` shows: a line for each row, a table of means, CSV, and two pictures a stream."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from rich.table import Table

Row = Mapping[str, Any]
# columns of the table, and how each is written
_SHOWN = {"acc": "{:.3f}", "la": "{:.3f}", "bwt": "{:+.3f}", "crs": "{:.3f}", "ppl_ratio": "x {:.3f}",
          "crs_everywhere": "{:.3f}", "stickiness": "{:.3f}", "prequential_loss": "{:.3f}", "coverage": "{:.2f}",
          "grad_evals": "{:.0f}", "update_ms_p50": "{:.0f}", "state_bytes": "{:,.0f}"}


def line(row: Row) -> str:
    """One finished row."""
    shown = "  ".join(f"{name} {form.format(row[name])}" for name, form in _SHOWN.items()
                      if name in ("acc", "la", "bwt", "crs", "ppl_ratio", "grad_evals") and row.get(name) is not None)
    strength = "" if row["strength"] is None else f" strength {row['strength']:g}"
    return (f"{row['method']:<11} {row['stream']} seed {row['seed']} ring {row['ring']} lr {row['lr']:g}{strength}  "
            f"{shown}  {row['seconds']:.0f} s")


def groups(rows: Sequence[Row]) -> dict[tuple[str, int], dict[str, list[Row]]]:
    """Rows by (stream, ring) and method, in their order."""
    found: dict[tuple[str, int], dict[str, list[Row]]] = {}
    for row in rows:
        found.setdefault((row["stream"], row["ring"]), {}).setdefault(row["method"], []).append(row)
    return found


def tables(rows: Sequence[Row]) -> list[Table]:
    """One for each stream: means over the seeds, with the standard deviation of ACC and BWT behind."""
    found = []
    for (stream, ring), methods in groups(rows).items():
        table = Table(title=f"{stream}, ring {ring}")
        for name in ("method", "seeds", *_SHOWN):
            table.add_column(name, justify="left" if name == "method" else "right")
        for method, runs in methods.items():
            told = f"{method} *" if runs[0]["boundaries"] else method
            table.add_row(told, str(len(runs)), *(_cell(runs, name, form) for name, form in _SHOWN.items()))
        if any(run["boundaries"] for runs in methods.values() for run in runs):
            table.caption = "* is told where tasks end"
        found.append(table)
    return found


def _cell(runs: Sequence[Row], name: str, form: str) -> str:
    values = [run[name] for run in runs if run.get(name) is not None]
    if not values:
        return ""
    spread = f" ± {stdev(values):.3f}" if name in ("acc", "bwt") and len(values) > 1 else ""
    return form.format(mean(values)) + spread


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """All rows, with the columns of all; lists as JSON."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows({name: json.dumps(value) if isinstance(value, list) else value for name, value in row.items()}
                         for row in rows)


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """For each stream and ring the accuracy over the stream and the accuracy matrices; means over the seeds."""
    written = []
    for (stream, ring), methods in groups(rows).items():
        name = re.sub(r"[^\w-]+", "_", f"{stream}-ring{ring}")
        for kind, picture in (("accuracy", _curves), ("matrix", _matrices)):
            written.append(folder / f"{kind}-{name}.png")
            picture(methods, f"{stream}, ring {ring}").savefig(written[-1], dpi=120)
    return written


def _curves(methods: Mapping[str, Sequence[Row]], title: str) -> Any:
    """Mean accuracy over all tasks along the stream; joint training as a level."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, (method, runs) in enumerate(methods.items()):
        color = colormaps["tab20"](number % 20)
        if not runs[0]["points"]:
            axes.axhline(mean(run["acc"] for run in runs), color=color, linestyle=":", label=method)
            continue
        samples = [at for at, _ in runs[0]["points"]]
        values = np.array([[accuracy for _, accuracy in run["points"]] for run in runs])
        axes.plot(samples, values.mean(0), color=color, marker="o", markersize=3, label=method,
                  linewidth=2.4 if method == "ogp" else 1.3)
        if len(runs) > 1:
            axes.fill_between(samples, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
    axes.set(xlabel="samples learned, one at a time", ylabel="accuracy, all tasks", ylim=(0, 1), title=title)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _matrices(methods: Mapping[str, Sequence[Row]], title: str) -> Any:
    """a[t][i] of each method: down the tasks learned, across the tasks tested."""
    from matplotlib.figure import Figure

    columns = min(4, len(methods))
    figure = Figure(figsize=(2.6 * columns, 2.4 * -(-len(methods) // columns)), layout="constrained")
    panels = figure.subplots(-(-len(methods) // columns), columns, squeeze=False).ravel()
    for panel in panels:
        panel.axis("off")
    for panel, (method, runs) in zip(panels, methods.items(), strict=False):
        values = np.mean([run["accuracies"] for run in runs], axis=0)
        panel.axis("on")
        panel.imshow(values, vmin=0, vmax=1, cmap="viridis")
        for (t, i), value in np.ndenumerate(values):
            panel.text(i, t, f"{value:.2f}".lstrip("0"), ha="center", va="center", fontsize=7,
                       color="white" if value < 0.6 else "black")
        panel.set(title=method, xticks=[], yticks=[])
    figure.suptitle(f"{title}: after each task (down), on each task (across)", fontsize=9)
    return figure
