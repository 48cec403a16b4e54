"""What the demo shows: the values of `demo --json`, one table, and the accuracy over the stream as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from ogpstream.profiling.evaluate import AccuracyMatrix

LEARNERS = {"": "ours", "_replay": "replay alone", "_sequential": "sequential LoRA"}


def summary(ours: Mapping[str, Any], steady: Mapping[str, Any], replay: Mapping[str, Any],
            sequential: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `demo --json` from the workers' results."""
    values: dict[str, Any] = {
        "updates": ours["updates"], "domains": ours["tasks"], "before": ours["before"],
        "acc_before": sum(ours["before"]) / len(ours["before"]),
        "resumed_exactly": ours["digest"] == steady["state_sha256"],
        # one meter watched the stream from the kill on, the other one until after it: their sum bounds the whole
        "guarantee_drift": ours["guarantee_drift"] + steady["guarantee_drift"],
        # of all cuts since creation, which the state remembers
        "held_drift": ours["held_drift"],
        "basis_columns": ours["basis_columns"], "state_sha256": ours["state_sha256"],
    }
    for suffix, result in zip(LEARNERS, (ours, replay, sequential), strict=True):
        matrix = AccuracyMatrix(result["tasks"])
        for row in result["rows"]:
            matrix.add(row)
        values |= {
            f"acc_after{suffix}": matrix.acc, f"la{suffix}": matrix.la, f"bwt{suffix}": matrix.bwt,
            f"after{suffix}": result["rows"][-1], f"base_retention{suffix}": result["base_retention"],
            f"ppl_ratio{suffix}": result["ppl_ratio"],
            f"base_retention_everywhere{suffix}": result["base_retention_everywhere"],
            f"update_ms_p50{suffix}": result["update_ms_p50"],
            f"grad_evals{suffix}": result["grad_evals"], f"state_bytes{suffix}": result["state_bytes"],
            f"points{suffix}": result["points"],
        }
    return values


def table(values: Mapping[str, Any]) -> Table:
    """Accuracy by domain before and after, and what else is measured, for the three learners."""
    shown = Table(title=f"{values['updates']} corrections, one pass, one at a time")
    shown.add_column("")
    shown.add_column("before", justify="right")
    for name in LEARNERS.values():
        shown.add_column(name, justify="right")
    for number, domain in enumerate(values["domains"]):
        after = [f"{values[f'after{suffix}'][number]:.2f}" for suffix in LEARNERS]
        shown.add_row(domain, f"{values['before'][number]:.2f}", *after)
    shown.add_section()
    shown.add_row("accuracy, mean", f"{values['acc_before']:.3f}", *_each(values, "acc_after", "{:.3f}"))
    shown.add_row("learning accuracy", "", *_each(values, "la", "{:.3f}"))
    shown.add_row("backward transfer", "", *_each(values, "bwt", "{:+.3f}"))
    shown.add_row("base retention", "1.000", *_each(values, "base_retention", "{:.3f}"))
    shown.add_row("the same, were all texts in scope", "1.000", *_each(values, "base_retention_everywhere", "{:.3f}"))
    shown.add_row("held-out perplexity", "x 1", *_each(values, "ppl_ratio", "x {:.3f}"))
    shown.add_row("ms per update", "", *_each(values, "update_ms_p50", "{:.0f}"))
    shown.add_row("gradient evaluations", "", *_each(values, "grad_evals", "{:,}"))
    shown.add_row("learner state, MB", "", *(f"{values[f'state_bytes{s}'] / 1e6:.1f}" for s in LEARNERS))
    shown.add_section()
    shown.add_row("killed and resumed exactly", "", "yes" if values["resumed_exactly"] else "NO", "", "")
    shown.add_row("drift of what is protected", "", f"{values['guarantee_drift']:.1e}", "", "")
    shown.add_row("moved by cuts, of what is learned, at most", "", f"{values['held_drift']:.1e}", "", "")
    return shown


def _each(values: Mapping[str, Any], field: str, form: str) -> list[str]:
    return [form.format(values[f"{field}{suffix}"]) for suffix in LEARNERS]


def draw(values: Mapping[str, Any], path: Path) -> None:
    """Mean accuracy over all domains along the stream, a line for each learner."""
    # here, because it takes a second or two
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.2), layout="constrained")
    for suffix, name in LEARNERS.items():
        samples, accuracies = zip((0, values["acc_before"]), *values[f"points{suffix}"], strict=True)
        axes.plot(samples, accuracies, marker="o", markersize=3, linewidth=2.4 if not suffix else 1.4, label=name)
    length = values["updates"] // len(values["domains"])
    for number, domain in enumerate(values["domains"]):
        axes.axvline(number * length, color="0.85", linewidth=0.8, zorder=0)
        axes.text((number + 0.5) * length, 1.005, domain, ha="center", va="bottom", fontsize=9)
    axes.set(xlabel="corrections learned, one at a time", ylabel="accuracy on other wordings, all domains", ylim=(0, 1))
    axes.legend(loc="upper left", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
