"""`bench serving`: arrivals and waits from given numbers, the fields of the JSON line, and replies that are checked."""

import csv
import itertools
import json
import random
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from ogpstream.learner import LearnerConfig, StreamLearner
from ogpstream.learner.report import LoopStatus, Pace, SampleReport
from ogpstream.memory.served import Pack, Served
from ogpstream.profiling import bench_serving
from ogpstream.profiling.bench import register
from ogpstream.profiling.load import Server, arrivals, waits
from ogpstream.profiling.serving_inputs import demo_samples, random_ids, random_samples
from ogpstream.profiling.serving_report import distribution, summary
from ogpstream.profiling.serving_run import Run, check, moved, run

FIELDS = {
    "ttft_p50_off", "ttft_p99_off", "ttft_p50_on", "ttft_p99_on", "ratio_p99", "updates", "max_wait_ms", "wait_ms_p50",
    "wait_ms_p99", "update_ms_p50", "versions", "requests", "tokens_per_s_off", "tokens_per_s_on", "limited",
    "peak_mib", "out_of_memory",
}  # fmt: skip
TINY = ["--device", "cpu", "--layers", "1", "--width", "64", "--vocabulary", "200", "--tokens", "12", "--prompt", "6",
        "--new", "3"]
serving = pytest.importorskip("transformers.cli.serving.utils")


def _bench(*words: str) -> Any:
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, ["bench", "serving", *words])


@pytest.fixture
def learner(tiny_model: Any) -> Iterator[StreamLearner]:
    config = LearnerConfig(lr=0.05, served_to="all", warm_samples=2, warm_tokens=8, settled_below=0.0)
    learner = StreamLearner(tiny_model("llama", num_hidden_layers=1, hidden_size=16, intermediate_size=24,
                                       num_attention_heads=2), config=config)
    yield learner
    learner.close()


# formulas


def test_arrivals_are_poisson() -> None:
    due = arrivals(4.0, 4000, random.Random(0))
    gaps = [later - earlier for earlier, later in itertools.pairwise([0.0, *due])]
    assert min(gaps) > 0
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.05)
    # exponential: as much spread as mean
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.05)
    assert due == arrivals(4.0, 4000, random.Random(0))


def test_other_generations_are_no_wait_for_the_learner() -> None:
    # the learner until 1.5, then generations one after the other, and from 6.0 to 6.25 the learner once more
    generations = [(1.5, 3.0), (3.0, 4.0), (4.5, 6.0), (6.25, 7.0), (9.0, 10.0)]
    assert waits([1.0, 1.25, 3.5, 3.5, 9.0], generations) == [0.5, 0.25, 0.5, 0.75, 0.0]


def test_the_fields_come_from_the_times() -> None:
    def row(phase: str, block: int, ttft: float, wait: float, version: int) -> dict[str, Any]:
        return {"phase": phase, "block": block, "arrival": 0.0, "ttft_ms": ttft, "wait_ms": wait,
                "generation_ms": 50.0, "tokens": 4, "version": version}

    def report(status: Any, actual: float, limited: bool, out_of_memory: int = 0) -> SampleReport:
        pace = Pace(limited, 8, 1, 2, actual, actual, 500.0)
        return SampleReport(None, status, 1, pace=pace, out_of_memory=out_of_memory, admitted=5)

    rows = [*(row("off", 0, float(ms), 0.5, 1) for ms in range(101)),
            *(row("on", 0, 2.0 * ms, ms / 10, 1 + ms // 50) for ms in range(101)),
            # more of phase on, for updates: no pair
            row("on", 1, 5000.0, 40.0, 9)]
    reports = [report("learned", 100.0, False), report("learned", 200.0, True, 2), report("rejected", 600.0, False),
               report("learned", 400.0, False)]
    checked = [{"version": 1, "equal": True, "tells_apart": True}, {"version": 2, "equal": False, "tells_apart": False}]
    found = summary(Run(8.0, rows, reports, LoopStatus(longest_unit=0.25)), checked)
    assert (found["ttft_p50_off"], found["ttft_p99_off"]) == (50.0, 99.0)
    assert (found["ttft_p50_on"], found["ttft_p99_on"], found["ratio_p99"]) == (100.0, 198.0, 2.0)
    assert found["max_wait_ms"] == 40.0
    assert found["wait_ms_p50"] == pytest.approx(5.05) and found["wait_ms_p99"] == pytest.approx(9.999)
    assert found["tokens_per_s_off"] == found["tokens_per_s_on"] == pytest.approx(80.0)
    assert (found["updates"], found["rejected"], found["out_of_memory"]) == (3, 1, 2)
    assert (found["update_ms_p50"], found["limited"], found["longest_unit_ms"]) == (300.0, 0.25, 250.0)
    assert (found["versions"], found["requests"], found["requests_on"]) == (4, 203, 102)
    assert (found["checked"], found["wrong"], found["told_apart"], found["admitted"]) == (2, 1, 1, 20)
    quantiles = distribution(rows)
    assert quantiles[99]["off"] == 99.0 and quantiles[100]["on"] == 5000.0


def test_a_version_is_moved_with_its_layout() -> None:
    slab = torch.arange(40.0)
    views = slab[1:13].view(4, 3), slab[13:25].view(3, 4).T, slab[25:28]
    served = Served(3, ("default",), (1.0,), (Pack(*views, {"default": slice(0, 2)}),))
    pack = moved(served, torch.device("meta")).packs[0]
    assert {t.device.type for t in (pack.A, pack.B, pack.scale)} == {"meta"}
    assert pack.A.untyped_storage()._cdata == pack.B.untyped_storage()._cdata
    back = moved(served, torch.device("cpu")).packs[0]
    for old, new, there in zip(views, (back.A, back.B, back.scale), (pack.A, pack.B, pack.scale), strict=True):
        assert torch.equal(old, new)
        assert (old.stride(), old.storage_offset()) == (new.stride(), new.storage_offset())
        assert (old.stride(), old.storage_offset()) == (there.stride(), there.storage_offset())


# runs


def test_phases_take_turns_on_the_same_requests(learner: StreamLearner) -> None:
    server = Server(learner, serving.InferenceThread(), 3)
    told: list[tuple[int, int]] = []
    done = run(server, random_ids(101, 5, 0), random_samples(101, 10, 1), requests=20, updates=24,
               on_block=lambda *numbers: told.append(numbers))
    off, on = ([row for row in done.rows if row["phase"] == phase] for phase in ("off", "on"))
    assert len(off) == 20 <= len(on) and [row["arrival"] for row in off] == [row["arrival"] for row in on[:20]]
    # in turns, and each first in turn
    assert [row["phase"] for row in done.rows[:8]] == ["off", "off", "on", "on", "on", "on", "off", "off"]
    # nothing is learned in phase off
    assert all(one["version"] == two["version"] for one, two in zip(off[::2], off[1::2], strict=True))
    assert told[-1] == (len(on), sum(report.status == "learned" for report in done.reports))
    assert told[-1][1] >= 24 and (len(on) == 20 or told[-2][1] < 24)
    assert all(row["tokens"] == 3 and 0 <= row["wait_ms"] < row["ttft_ms"] for row in done.rows)
    assert {report.pace.budget_ms for report in done.reports if report.pace} == {500}
    assert server.engine.is_idle() and learner.version > 24
    checked = check(server, done.kept)
    assert len(checked) == 8 and all(row["equal"] for row in checked)


def test_a_reply_of_another_version_is_found(learner: StreamLearner) -> None:
    server, first = Server(learner, serving.InferenceThread(), 8), learner.attachment.binding.served
    done = run(server, random_ids(101, 5, 0), random_samples(101, 10, 1), requests=3, updates=30)
    checked = check(server, done.kept)
    assert all(row["equal"] for row in checked)
    for version, others in (
        (learner.attachment.binding.served, [row["tells_apart"] for row in checked]),
        (first, [server.again(reply.request.prompt, first) != list(reply.tokens) for reply in done.kept]),
    ):
        mixed = [replace(reply, served=version) for reply in done.kept]
        assert [row["equal"] for row in check(server, mixed)] == [not other for other in others]
    # the rate is high enough for versions to reply in different ways; on a slow machine all may be of the last ones
    assert any(others)


def test_bench_serving(tmp_path: Path) -> None:
    done = _bench(*TINY, "--requests", "3", "--updates", "2", "--out", str(tmp_path), "--json")
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout.splitlines()[-1])
    assert values.keys() >= FIELDS
    # growth, the longest unit, takes part
    assert values["admitted"] > 0
    assert values["updates"] >= 2 and values["failures"] == values["wrong"] == 0 < values["checked"]
    assert values["ratio_p99"] == values["ttft_p99_on"] / values["ttft_p99_off"]
    assert values["peak_mib"] is None and values["device"] == "cpu"
    with open(tmp_path / "serving.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == values["requests"] == len(values["rows"])
    assert lines[0].keys() >= {"phase", "arrival", "wait_ms", "ttft_ms", "tokens", "version", "torch", "device"}
    assert (tmp_path / "serving.png").stat().st_size > 5000
    assert "requests of phase on" in done.stderr


def test_a_saved_model_learns_the_corrections_of_the_demo(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    tiny_model(num_hidden_layers=1, max_position_embeddings=256).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    done = _bench("--device", "cpu", "--model", str(tmp_path), "--new", "2", "--requests", "2", "--updates", "2",
                  "--json")
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout.splitlines()[-1])
    assert values["updates"] >= 2 and values["wrong"] == 0


def test_a_wrong_token_ends_with_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Server.again

    def wrong(server: Server, prompt: Any, served: Any) -> list[int]:
        tokens = right(server, prompt, served)
        return [*tokens[:-1], tokens[-1] ^ 1]

    monkeypatch.setattr(Server, "again", wrong)
    done = _bench(*TINY, "--requests", "2", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout.splitlines()[-1])["wrong"] == 2
    assert "2 of 2 replies are not of the version that they name" in done.stderr


def test_an_error_of_the_learner_ends_with_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise MemoryError("no memory for the step")

    monkeypatch.setattr("ogpstream.learner.proposal.Proposer._step", fail)
    done = _bench(*TINY, "--requests", "3", "--updates", "1000", "--json")
    assert done.exit_code == 1 and json.loads(done.stdout.splitlines()[-1])["failures"] > 0
    assert "MemoryError: no memory for the step" in done.stderr


def test_no_memory_for_a_request_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    monkeypatch.setattr(Server, "_generate", fail)
    done = _bench(*TINY, "--requests", "1")
    assert done.exit_code == 1 and "CUDA out of memory.; raise --cap-mib" in done.stderr


@pytest.mark.parametrize(("words", "message"), [
    (["--device", "cpu", "--cap-mib", "3686"], "--cap-mib bounds the memory of a GPU: leave it out on a CPU"),
    (["--device", "cpu", "--width", "100"], "--width is 100: use a multiple of 64"),
    (["--device", "tpu"], "--device is 'tpu': use cpu or cuda"),
    (["--device", "cpu", "--model", "/nowhere/model"], "there is no folder /nowhere/model"),
])
def test_wrong_use_is_one_line(words: list[str], message: str) -> None:
    done = _bench(*words)
    assert done.exit_code == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_the_cap_is_a_share_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Card:
        total_memory = 81920 * 2**20

    shares: list[float] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    bench_serving._cap(3686, torch.device("cuda"))
    assert shares == [3686 / 81920]
    with pytest.raises(typer.Exit) as refused:
        bench_serving._cap(90000, torch.device("cuda"))
    assert refused.value.exit_code == 2


def test_corrections_of_the_demo_come_again_and_again() -> None:
    samples = list(itertools.islice(demo_samples(0), 1201))
    assert {sample.id for sample in samples} == {None}
    assert {s.prompt for s in samples[:600]} == {s.prompt for s in samples[600:1200]}
