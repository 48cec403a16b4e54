"""What `bench serving` tells of a run: the fields of the JSON line, and the picture's percentiles."""

from __future__ import annotations

from collections.abc import Sequence

from ogpstream.profiling.bench_report import Row
from ogpstream.profiling.gpu_timer import percentile
from ogpstream.profiling.serving_run import LOAD, Run


def summary(done: Run, checked: Sequence[Row]) -> Row:
    """The fields of the JSON line. Percentiles are of milliseconds; TTFT and tokens/s of the blocks of both phases."""
    off = [row for row in done.rows if row["phase"] == "off"]
    on = [row for row in done.rows if row["phase"] == "on"]
    both = {row["block"] for row in off}
    paired = [row for row in on if row["block"] in both]
    found: Row = {}
    for name, rows in (("off", off), ("on", paired)):
        found |= {f"ttft_p{q}_{name}": percentile([row["ttft_ms"] for row in rows], q) for q in (50, 99)}
        seconds = sum(row["generation_ms"] for row in rows) / 1e3
        found[f"tokens_per_s_{name}"] = sum(row["tokens"] for row in rows) / seconds
    waits = [row["wait_ms"] for row in on]
    paces = [report.pace for report in done.reports if report.pace is not None]
    learned = [report for report in done.reports if report.status == "learned"]
    return found | {
        "ratio_p99": found["ttft_p99_on"] / found["ttft_p99_off"], "updates": len(learned), "max_wait_ms": max(waits),
        "wait_ms_p50": percentile(waits, 50), "wait_ms_p99": percentile(waits, 99),
        "wait_ms_p99_off": percentile([row["wait_ms"] for row in off], 99),
        "update_ms_p50": percentile([pace.actual_ms for pace in paces], 50) if paces else None,
        "limited": sum(pace.limited for pace in paces) / len(paces) if paces else None,
        "longest_unit_ms": 1e3 * done.status.longest_unit, "longest_wait_units": done.status.longest_wait,
        "versions": len({row["version"] for row in on}), "requests": len(done.rows), "requests_on": len(on),
        "served_per_s": done.rate, "load": LOAD, "rejected": len(done.reports) - len(learned),
        "out_of_memory": sum(report.out_of_memory for report in done.reports), "failures": done.status.failures,
        "admitted": sum(report.admitted for report in done.reports),
        "checked": len(checked), "wrong": sum(not row["equal"] for row in checked),
        "told_apart": sum(row["tells_apart"] for row in checked),
    }  # fmt: skip


def distribution(rows: Sequence[Row]) -> list[Row]:
    """TTFT that each percent of the requests of a phase stays under, milliseconds; for the picture."""
    by_phase = {phase: [row["ttft_ms"] for row in rows if row["phase"] == phase] for phase in ("off", "on")}
    return [{"percent": q, **{name: percentile(times, q) for name, times in by_phase.items()}} for q in range(101)]
