"""What `bench kernels` shows: a table, the CSV with where it was measured, a picture, rows for `configs.CUBLAS`."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

# where a row was measured; repeated in each line of the CSV, so that files of several cards can be put together
WHERE = ("device", "capability", "torch", "triton", "driver", "copy_gbps", "command")
# operation of `dispatch` that a CUBLAS entry names: the case that measures it, and its Triton provider
DISPATCHED = {
    "lora_forward": ("lora_forward", "ours"),
    "lora_backward": ("lora_backward", "separate"),
    "project_out_": ("projection", "ours"),
}
# a gain below this is not worth a second backend, and within what two runs differ
WORTH = 0.95


class CsvLog:
    """kernels.csv, written case by case: a run that is stopped leaves what it has measured."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self._path, self._where = path, {name: values[name] for name in WHERE}
        capability = self._where["capability"]
        self._where["capability"] = capability and "{}.{}".format(*capability)
        self._begun = False

    def rewrite(self, rows: Sequence[Row]) -> None:
        """All of it anew, when something is known of them that was not."""
        self._begun = False
        self.write(rows)

    def write(self, rows: Sequence[Row]) -> None:
        with open(self._path, "a" if self._begun else "w", newline="", encoding="utf-8") as file:
            for row in rows:
                writer = csv.DictWriter(file, fieldnames=[*row, *WHERE])
                if not self._begun:
                    writer.writeheader()
                    self._begun = True
                writer.writerow({**row, **self._where})


def table(rows: Sequence[Row]) -> list[str]:
    """Lines for each case and provider: hot percentiles, the cold median, and what else was measured anywhere."""
    cold = {_key(row): row["ms_p50"] for row in rows if row["l2"] == "cold"}
    hot = [row for row in rows if row["l2"] == "hot"]
    ours = {_case(row): row["ms_p50"] for row in hot if row["provider"] == "ours"}

    def cells(row: Row) -> dict[str, str]:
        reference = ours.get(_case(row))
        ratio = row["ms_p50"] / reference if row["ms_p50"] and reference else None
        return {
            "p20": _number(row["ms_p20"], ".3g"), "p50": _number(row["ms_p50"], ".3g"),
            "p80": _number(row["ms_p80"], ".3g"), "cold": _number(cold.get(_key(row)), ".3g"),
            "graph": _number(row["graph_ms_p50"], ".3g"), "GB/s": _number(row["gbps"], ".3g"),
            "x floor": _number(row["floor_ratio"], ".2f"), "x ours": _number(ratio, ".2f"),
            "error": _number(row["rel_err"], ".0e"), "leak": _number(row["leak"], ".0e"),
            "launches": _number(row["launches"], "d"),
        }  # fmt: skip

    every = [cells(row) for row in hot]
    # a CPU has no cold caches, for one
    columns = [name for name in (every[0] if every else ()) if any(each[name] for each in every)]
    lines = [_cells("ms of a call", *columns)]
    for number, (row, each) in enumerate(zip(hot, every, strict=True)):
        if number == 0 or _case(row) != _case(hot[number - 1]):
            floor = f": floor {row['floor_ms']:.3g} ms ({row['floor_by']})" if row["floor_ms"] else ""
            lines.append(f"{row['op']} {row['dtype']} {row['shape']}{floor}")
        name = f"  {row['provider']}{'' if row['correct'] else ' WRONG'}"
        lines.append(_cells(name, *(each[column] for column in columns)))
    return lines


def suggestion(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each operation that `configs.CUBLAS` can name: how the cuBLAS backend compares with the Triton kernels.

    ratio is the geometric mean of cuBLAS over Triton in half precision, of cold medians, over all shapes.
    """
    found = []
    for operation, (op, ours) in DISPATCHED.items():
        times: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
        for row in rows:
            # the projection is float32 in each of them; its rows come from cases in bf16
            if row["op"] == op and row["l2"] == "cold" and row["dtype"] != "fp32" and row["ms_p50"]:
                times[_case(row)[1:]][row["provider"]] = row["ms_p50"]
        ratios = [each["cublas"] / each[ours] for each in times.values() if {"cublas", ours} <= set(each)]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            won = sum(ratio < 1 for ratio in ratios)
            found.append({"operation": operation, "ratio": mean, "cublas_wins": won, "shapes": len(ratios),
                          "take_cublas": mean < WORTH})
    return found


def suggestion_text(found: Sequence[Row], capability: Sequence[int] | None) -> list[str]:
    """The lines for `kernels/configs.py`; it is a person who enters them."""
    if not found or capability is None:
        return ["kernels/configs.py: nothing to suggest, no case has times of both cuBLAS and Triton on a GPU"]
    lines = [
        f"{row['operation']}: cuBLAS takes {row['ratio']:.2f} x the time of Triton, and wins {row['cublas_wins']} of "
        f"{row['shapes']} shapes" for row in found
    ]  # fmt: skip
    names = ", ".join(f'"{row["operation"]}"' for row in found if row["take_cublas"])
    entry = f"({capability[0]}, {capability[1]}): frozenset({{{names}}})" if names else "no entry, Triton throughout"
    return [*lines, f"kernels/configs.py, CUBLAS: {entry}"]


def draw(values: Mapping[str, Any], path: Path) -> None:
    """Hot medians of the first case of each operation, with p20 and p80, and the floor as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in values["rows"]:
        if row["l2"] == "hot" and row["ms_p50"] is not None:
            groups.setdefault(_case(row), []).append(row)
    of_operation: dict[str, list[Row]] = {}
    for (op, *_), rows in groups.items():
        of_operation.setdefault(op, rows)
    first = list(of_operation.values())
    columns = min(3, max(1, len(first)))
    lines = max(1, math.ceil(len(first) / columns))
    size = (4.2 * columns, 3.2 * lines)
    figure, axes = pyplot.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for axis, rows in zip(axes.flat, first, strict=False):
        medians = [row["ms_p50"] for row in rows]
        spread = [[row["ms_p50"] - row["ms_p20"] for row in rows], [row["ms_p80"] - row["ms_p50"] for row in rows]]
        colours = ["tab:orange" if row["provider"] in ("ours", "separate") else "tab:blue" for row in rows]
        axis.barh([row["provider"] for row in rows], medians, xerr=spread, color=colours, height=0.6)
        if rows[0]["floor_ms"]:
            axis.axvline(rows[0]["floor_ms"], color="0.3", linestyle="--", linewidth=1)
        axis.invert_yaxis()
        axis.set(xlabel="ms, dashed: floor" if rows[0]["floor_ms"] else "ms")
        axis.set_title(f"{rows[0]['op']}, {rows[0]['dtype']}\n{rows[0]['shape']}", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(first):]:
        axis.set_visible(False)
    figure.suptitle(f"{values['device']}, torch {values['torch']}", fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _case(row: Row) -> tuple[str, str, str]:
    return row["op"], row["dtype"], row["shape"]


def _key(row: Row) -> tuple[str, ...]:
    return *_case(row), row["provider"]


def _cells(first: str, *rest: str) -> str:
    return f"{first:<22}" + "".join(f"{cell:>9}" for cell in rest)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
