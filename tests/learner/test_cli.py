import json
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from ogpstream import learner as learner_package
from ogpstream.learner import Sample, StreamLearner, cli, terminal
from ogpstream.learner.answer import Answer
from ogpstream.learner.folder import StateFolder
from ogpstream.learner.state import FORMAT
from ogpstream.profiling.bench import NAMES

SETTINGS = ["--set", "warm_samples=2", "--set", "warm_tokens=4", "--set", "snapshot_every=4"]
# names that scripts depend on
LEARN_FIELDS = {"samples", "learned", "rejected", "skipped", "quarantined", "update_ms_p50", "update_ms_p95",
                "loss_first", "loss_last", "rss_peak_mb", "version", "state_sha256", "learned_in_all"}
STATUS_FIELDS = {"healthy", "acknowledged", "learned", "rejected", "quarantined", "pending", "version", "updates",
                 "basis_columns", "ring_samples", "experts", "expert_samples", "frozen", "held_discarded",
                 "state_sha256", "versions", "quarantine_bytes", "imports_bytes"}


@pytest.fixture(scope="module", autouse=True)
def no_plugins():
    """What is installed beside this package may add commands, and take its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "entry_points", lambda group: [])
        yield


@pytest.fixture(scope="module")
def place(tiny_model, tiny_tokenizer, tmp_path_factory):
    """A folder with two models, a stream of 6 lines, and a state that learned it."""
    folder = tmp_path_factory.mktemp("cli")
    for name, seed in (("model", 0), ("other", 1)):
        tiny_model(num_hidden_layers=1, seed=seed).save_pretrained(folder / name)
        tiny_tokenizer.save_pretrained(folder / name)
    lines = [json.dumps({"prompt": f"say {n}", "completion": f" {n} then"}) for n in range(6)]
    (folder / "s.jsonl").write_text("\n".join(lines) + "\n")
    assert cli.main(learn(folder, "--json")) == 0
    return folder


def learn(place, *more, model="model", samples="s.jsonl", state="state", settings=SETTINGS):
    named = ["--model", str(place / model), "--samples", str(place / samples), "--state", str(place / state)]
    return ["learn", *named, *settings, *more]


@pytest.fixture
def run(capfd):
    """Call `main` with arguments: (exit status, stdout lines, stderr lines)."""

    def call(*arguments):
        capfd.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return code, out.splitlines(), err.splitlines()

    return call


@pytest.fixture
def copy(place, tmp_path):
    """A copy of the learned state that a test may change."""
    return shutil.copytree(place / "state", tmp_path / "state")


def test_learn_answers_in_one_json_line_and_status_tells_the_same_state(place, run, tmp_path):
    code, out, err = run(*learn(tmp_path, "--json", model=place / "model", samples=place / "s.jsonl"))
    assert (code, err, len(out)) == (0, [], 1)
    told = json.loads(out[0])
    assert told.keys() >= LEARN_FIELDS
    assert [told[name] for name in ("samples", "learned", "rejected", "skipped")] == [6, 6, 0, 0]
    assert 50 < told["rss_peak_mb"] < 10_000

    code, out, err = run("status", "--state", tmp_path / "state", "--json")
    assert (code, err, len(out)) == (0, [], 1)
    status = json.loads(out[0])
    assert status.keys() == STATUS_FIELDS
    assert (status["healthy"], status["learned"], status["pending"], status["experts"]) == (True, 6, 0, ["default"])
    assert (status["state_sha256"], status["version"]) == (told["state_sha256"], told["version"])

    again = learn(tmp_path, model=place / "model", samples=place / "s.jsonl", settings=[])
    code, out, err = run(*again, "--json")
    told_again = json.loads(out[-1])
    assert [told_again[name] for name in ("skipped", "learned", "learned_in_all")] == [6, 0, 6] and code == 0
    assert told_again["state_sha256"] == told["state_sha256"]
    code, out, err = run(*again)
    assert (code, err) == (0, []) and out[0] == "learned 0 of 6 samples now, 6 in all; 6 skipped as known"


def test_a_time_budget_is_told_and_is_no_setting_of_the_state(place, run, tmp_path):
    first = learn(tmp_path, "--update-budget-ms", "0.001", model=place / "model", samples=place / "s.jsonl")
    code, out, err = run(*first, "--json")
    assert code == 0 and len(err) == 1 and "fits in no way into 0.001 ms" in err[0]
    choice = json.loads(out[0])["choice"]
    assert (choice["limited"], choice["layers_min"], choice["depth"]) == (6, 1, 1)
    assert 2 <= choice["tokens_min"] and 0 < choice["actual_ms_p50"] <= choice["actual_ms_p95"]
    code, out, err = run(*learn(tmp_path, "--json", model=place / "model", samples=place / "s.jsonl"))
    assert (code, err, json.loads(out[0])["choice"]) == (0, [], None)
    code, out, err = run(*first[:-1], "0")
    assert code == 2 and "update_budget_ms is 0" in err[0]


def test_status_equals_the_loaded_learners(place, run, tiny_tokenizer):
    code, out, _ = run("status", "--state", place / "state", "--json")
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    learner = StreamLearner.load_state(place / "state", model, tiny_tokenizer)
    assert json.loads(out[0]) == learner.status()
    learner.close()
    code, out, _ = run("status", "--state", place / "state")
    assert code == 0 and out[0].split() == ["healthy", "yes"]
    fields = json.loads(run("status", "--state", place / "state", "--json")[1][0])
    assert [line.split()[0] for line in out] == list(fields) and all(len(line) <= 80 for line in out)
    assert out[-1].split()[1] == fields["state_sha256"][:32] + "..."
    assert fields["versions"] == StateFolder(place / "state", readonly=True).versions() and len(fields["versions"]) > 1


def test_the_table_of_a_status_keeps_its_columns():
    fields = {"healthy": False, "held_discarded": 0.12345678, "experts": [f"expert{n}" for n in range(20)], "empty": []}
    lines = terminal.status_table(fields).splitlines()
    assert lines[0] == "healthy         no" and lines[1] == "held_discarded  0.123"
    assert lines[2].startswith("experts         expert0, expert1") and lines[3].startswith(16 * " " + "expert")
    assert max(map(len, lines)) <= 80


def test_status_needs_no_lock_and_counts_what_is_pending(copy, run):
    folder = StateFolder(copy)
    for n in range(3):
        folder.append({"kind": "sample", "id": str(n)})
    folder.sync()
    code, out, _ = run("status", "--state", copy, "--json")
    folder.close()
    status = json.loads(out[0])
    assert (code, status["pending"], status["acknowledged"], status["learned"]) == (0, 3, 9, 6)


def test_the_version_is_that_of_the_distribution(run):
    assert run("--version") == (0, [f"ogpstream {version('ogp-lora-stream')}"], [])


def test_what_an_earlier_run_left_over_is_told(place, copy, run, tmp_path):
    with StreamLearner.load_state(copy, AutoModelForCausalLM.from_pretrained(place / "model")) as learner:
        learner.accept(Sample(prompt_ids=(5, 6), completion_ids=(7,), id="left"))
    code, out, _ = run(*learn(tmp_path, model=place / "model", samples=place / "s.jsonl"))
    assert code == 0
    assert out[0] == "learned 0 of 6 samples now, 7 in all; 1 left over from an earlier run; 6 skipped as known"


def test_rejected_lines_are_told_and_only_strict_fails(place, run, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x", "completion": ""}\n{"prompt": "x", "completion": "y"}\n{\n')
    options = dict(model=place / "model", samples=tmp_path / "bad.jsonl")
    code, out, err = run(*learn(tmp_path, **options))
    assert code == 0
    assert [line.split(": ")[0] for line in err] == [f"{tmp_path}/bad.jsonl:1", f"{tmp_path}/bad.jsonl:3"]
    assert out[0] == "learned 1 of 3 samples now, 1 in all; 2 rejected"
    # on every run, until they are mended
    for _ in range(2):
        code, out, err = run(*learn(tmp_path, "--strict", "--json", state="strict", **options))
        assert code == 1 and len(err) == 2 and len(json.loads(out[0])["problems"]) == 2
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x", "completion": "z"}\n{"prompt": "x", "completion": "y"}\n')
    code, out, err = run(*learn(tmp_path, "--strict", state="strict", **options))
    assert (code, err) == (0, []) and out[0] == "learned 1 of 2 samples now, 2 in all; 1 skipped as known"


def test_experts_that_lines_name_are_made_once(place, run, tmp_path):
    lines = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d", "expert": "law"}]
    (tmp_path / "law.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = dict(model=place / "model", samples=tmp_path / "law.jsonl")
    code, _, err = run(*learn(tmp_path, "--strict", **options))
    assert code == 1 and "law.jsonl:2: unknown expert 'law'" in err[0] and "--add-expert" in err[0]
    for number in range(2):
        more = ("--add-expert", "law:3", "--add-expert", "tax", "--strict")
        code, out, err = run(*learn(tmp_path, *more, **options))
        assert (code, err) == (0, []) and out[0].startswith(f"learned {1 - number} of 2 samples now, 2 in all")
    status = json.loads(run("status", "--state", tmp_path / "state", "--json")[1][0])
    assert (status["experts"], status["learned"]) == (["default", "law", "tax"], 2)
    entries = StateFolder(tmp_path / "state", readonly=True).load().meta["experts"]["experts"]
    assert [(entry["rank"], entry["steps"] > 0) for entry in entries] == [(8, True), (3, True), (8, False)]
    one_line(*run(*learn(tmp_path, "--add-expert", "law:4", **options)), "law has rank 3, not 4", exit_status=2)
    for word in ("a.b", "law:", "law:0", "law:x", "", "a b"):
        one_line(*run(*learn(tmp_path, "--add-expert", word, state="new", **options)), "NAME:RANK", exit_status=2)
    assert not (tmp_path / "new").exists()


def test_no_expert_is_made_where_one_of_them_cannot_be(place, copy, run, tmp_path):
    options = dict(model=place / "model", samples=place / "s.jsonl")

    def wrong(last, *words, state="state"):
        command = learn(tmp_path, "--add-expert", "law", "--add-expert", last, state=state, **options)
        one_line(*run(*command), *words, exit_status=2)

    wrong("default-x", "'default-x' is a name that routing gives", state="new")
    assert not (tmp_path / "new").exists()
    wrong("default-x", "'default-x' is a name that routing gives")
    for state in ("state", "new"):
        wrong("tax:99", "--add-expert tax:99", "a rank of 1 to 24", state=state)
        status = json.loads(run("status", "--state", tmp_path / state, "--json")[1][0])
        assert (status["experts"], status["pending"]) == (["default"], 0)
    only_in_the_journal(place, copy, "law")
    one_line(*run(*learn(tmp_path, "--add-expert", "law:4", **options)), "law has rank 8, not 4", exit_status=2)
    # where prompts are not routed the name is one like others
    named = [*SETTINGS, "--set", "routing=named"]
    assert run(*learn(tmp_path, "--add-expert", "default-x", state="named", settings=named, **options))[0] == 0


def only_in_the_journal(place, state, expert):
    """An expert that no snapshot has."""
    learner = StreamLearner.load_state(state, AutoModelForCausalLM.from_pretrained(place / "model"))
    learner.add_expert(expert)
    learner.close()


def test_a_cut_sample_is_told(place, run, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "x" * 300, "completion": "y"}) + "\n")
    code, out, err = run(*learn(tmp_path, model=place / "model", samples=tmp_path / "long.jsonl"))
    assert code == 0 and out[0] == "learned 1 of 1 samples now, 1 in all; 1 cut to fit"
    assert err == [f"{tmp_path}/long.jsonl:1: too long: 174 ids were cut from the left of the prompt"]


def test_of_many_cut_samples_the_first_are_told(place, run, tmp_path, monkeypatch):
    monkeypatch.setattr("ogpstream.learner.stream.TOLD", 2)
    lines = [json.dumps({"prompt": "x" * 300, "completion": f"y{n}"}) + "\n" for n in range(4)]
    (tmp_path / "long.jsonl").write_text("".join(lines))
    for options, numbers in (((), [1, 2]), (("--verbose",), [1, 2, 3, 4])):
        state = f"state{len(numbers)}"
        code, out, err = run(*learn(tmp_path, *options, state=state, model=place / "model",
                                    samples=tmp_path / "long.jsonl"))
        assert code == 0 and "4 cut to fit" in out[0]
        assert [int(line.split(":")[1]) for line in err] == numbers


def test_rollback_and_export_find_the_model_by_themselves(place, copy, run, tmp_path):
    code, out, err = run("export", "--state", copy, "--out", tmp_path / "adapter", "--json")
    assert (code, err) == (0, []) and json.loads(out[0])["expert"] == "default"
    assert json.loads(out[0])["experts"] == ["default"]
    card = (tmp_path / "adapter" / "README.md").read_text()
    rank = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"]
    version = json.loads(out[0])["version"]
    for fact in (place / "model", f"version {version}, after 6 samples", f"rank {rank}:", "k_proj, o_proj, q_proj"):
        assert str(fact) in card
    written = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    one_line(*run("export", "--state", copy, "--out", tmp_path / "adapter"), "not empty", "--force", exit_status=2)
    assert run("export", "--state", copy, "--out", tmp_path / "adapter", "--force")[0] == 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == written
    code, out, err = run("export", "--state", copy, "--out", copy)
    one_line(code, out, err, "not empty", exit_status=2)
    assert "--force" not in err[0], "advice that the next line refuses"
    one_line(*run("export", "--state", copy, "--out", copy, "--force"), "is no PEFT adapter", "another folder")
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    ids = torch.arange(5, 25)[None]
    tuned = PeftModel.from_pretrained(model, tmp_path / "adapter")
    learner = StreamLearner.load_state(copy, AutoModelForCausalLM.from_pretrained(place / "model"))
    served = learner.state.store.served
    # an exported adapter answers every prompt
    with torch.no_grad(), learner.attachment.binding.using(served, frozenset(served.experts)):
        torch.testing.assert_close(tuned(ids).logits, learner.model(ids).logits, atol=1e-5, rtol=0)
    older = learner.versions()[0]
    learner.close()

    before = json.loads(run("status", "--state", copy, "--json")[1][0])
    code, out, err = run("rollback", "--to", older, "--state", copy, "--json")
    told = json.loads(out[0])
    assert (code, err, told["rolled_back_to"], told["version"]) == (0, [], older, before["version"] + 1)
    assert told["learned"] < 6 and told["quarantined"] == 6 - told["learned"]
    assert json.loads(run("status", "--state", copy, "--json")[1][0])["state_sha256"] == told["state_sha256"]
    undone = [json.loads(line) for line in (copy / "quarantine.jsonl").read_text().splitlines()]
    assert len(undone) == told["quarantined"]
    # the version is pinned, so it outlives the journal behind it, and can be returned to again
    (tmp_path / "more.jsonl").write_text("".join(
        json.dumps({"prompt": f"then {n}", "completion": f" {n}"}) + "\n" for n in range(12)))
    assert run(*learn(tmp_path, model=place / "model", samples=tmp_path / "more.jsonl"))[0] == 0
    code, out, err = run("rollback", "--to", older, "--state", copy)
    assert (code, err) == (0, []) and out[0].startswith(f"back at version {older}, published as version ")
    assert run("status", "--state", copy)[0] == 0


def test_a_model_that_has_moved_is_told_with_the_option(copy, run, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_needed", lambda folder: {"model": {"name": str(tmp_path / "gone"), "dtype": "float32"},
                                                        "environment": {"threads": 1}})
    one_line(*run("ask", "say 3", "--state", copy), "--model says where it is now", exit_status=2)
    code, _, err = run("ask", "say 3", "--state", copy, "--model", tmp_path / "gone")
    assert code == 2 and "--model" not in err[-1]


def test_a_frozen_expert_stays_as_it_is_until_it_is_unfrozen(place, copy, run, tmp_path):
    one_line(*run("freeze", "default", "other", "--state", copy), "no expert 'other'", "there are default",
             exit_status=2)
    only_in_the_journal(place, copy, "law")
    for names in (["default"], ["law", "default"]):
        code, out, err = run("freeze", *names, "--state", copy, "--json")
        assert (code, err, json.loads(out[0])["frozen"]) == (0, [], sorted(names))
        # and who looks at the state is told the same
        assert json.loads(run("status", "--state", copy, "--json")[1][0]) == json.loads(out[0])
    (tmp_path / "more.jsonl").write_text(json.dumps({"prompt": "say 4", "completion": " 9"}) + "\n")
    more = ["learn", "--model", place / "model", "--samples", tmp_path / "more.jsonl", "--state", copy, "--json"]
    assert json.loads(run(*more)[1][0])["rejected"] == 1
    assert run("unfreeze", "default", "--state", copy) == (0, ["frozen now: law"], [])
    assert json.loads(run(*more)[1][0])["learned"] == 1


def test_ask_tells_what_was_learned_who_answers_and_what_the_base_says(
    place, run, tmp_path, tiny_tokenizer, monkeypatch
):
    (tmp_path / "s.jsonl").write_text(json.dumps({"prompt": "say 3", "completion": "7"}) + "\n")
    settings = [*SETTINGS, "--set", "lr=0.02", "--set", "repeats=60", "--set", "base_anchor=0"]
    assert run(*learn(tmp_path, model=place / "model", settings=settings))[0] == 0
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    other = "an unlike question of 7 words"
    before = run("status", "--state", tmp_path / "state")
    code, out, err = run("ask", "say 3", other, "--state", tmp_path / "state", "--max-new-tokens", 1, "--json")
    assert (code, err) == (0, [])
    answers = json.loads(out[0])["answers"]
    assert [one["prompt"] for one in answers] == ["say 3", other]
    assert [one["experts"] for one in answers] == [["default"], []]
    for one in answers:
        ids = torch.tensor([tiny_tokenizer(one["prompt"])["input_ids"]])
        made = model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert one["base_answer"] == tiny_tokenizer.decode(made, skip_special_tokens=True)
    learned, left = answers
    assert learned["answer"] == "7" != learned["base_answer"]
    assert left["answer"] == left["base_answer"]

    code, out, err = run("ask", "say 3", "--state", tmp_path / "state", "--max-new-tokens", 1)
    assert (code, err) == (0, []) and out[0] == "default: 7" and out[1].startswith("base model:")
    one_line(*run("ask", "\udcff", "--state", tmp_path / "state"), "UTF-8", exit_status=2)
    one_line(*run("ask", "say 3", "--state", tmp_path / "state", "--max-new-tokens", 10_000), "positions",
             exit_status=2)
    code, out, err = run("ask", "say 3", "--state", tmp_path / "state", "--chat", "--json")
    assert (code, err) == (0, [])
    assert json.loads(out[0])["answers"][0]["prompt"] == [{"role": "user", "content": "say 3"}]
    assert run("status", "--state", tmp_path / "state") == before

    def no_room(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr(LlamaForCausalLM, "generate", no_room)
        one_line(*run("ask", "say 3", "--state", tmp_path / "state"), "memory ran out on", exit_status=1)
    # and the state is free for the next command
    assert run("ask", "say 3", "--state", tmp_path / "state")[0] == 0


def test_how_answers_are_shown():
    several = Answer("q\nr", ("a", "b"), " one\ntwo\n", " no")
    assert terminal.answers_shown([several]) == "a and b:\n     one\n    two\nbase model: no"
    assert terminal.answers_shown([Answer("q", ("a",), "no ", " no")]) == "a: no\nbase model: the same"
    assert terminal.answers_shown([Answer("q", (), " no", " no")]) == "base model: no"
    assert terminal.answers_shown([Answer("q", ("a",), "\n", "")]) == "a: '\\n'\nbase model: the same"
    both = terminal.answers_shown([several, Answer("s", (), "no", "no")]).splitlines()
    assert both[:2] == ["> q r", "a and b:"] and both[-3:] == ["", "> s", "base model: no"]


def one_line(code, out, err, *words, exit_status=1):
    assert code == exit_status and out == [] and len(err) == 1, (code, out, err)
    for word in words:
        assert str(word) in err[0]


def test_errors_are_one_line_with_a_remedy(place, copy, run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    good = dict(model=place / "model", samples=place / "s.jsonl")

    def wrong(command, *words):
        """What was asked for is wrong."""
        one_line(*run(*command), *words, exit_status=2)

    def failed(command, *words):
        """It was right, and did not work."""
        one_line(*run(*command), *words)

    for state in ("new", "state"):
        wrong(learn(tmp_path, state=state, **good | {"model": tmp_path / "none"}), tmp_path / "none", "give a folder")
        wrong(learn(tmp_path, state=state, **good | {"model": tmp_path}), "config.json", "give a folder")
        no_id = ["no-such-org/no-such-model" if w == str(place / "model") else w
                 for w in learn(tmp_path, state=state, **good)]
        failed(no_id, "cannot load the model no-such-org/no-such-model", "give a folder")
        wrong(learn(tmp_path, "--device", "cuda:99", state=state, **good), "cuda:99", "--device cpu")
        wrong(learn(tmp_path, "--device", "abacus", state=state, **good), "abacus", "--device cpu")
        wrong(learn(tmp_path, "--set", "lr=fast", state=state, **good), "lr is 'fast'", "float")
        wrong(learn(tmp_path, "--set", "rate=1", state=state, **good), "unknown setting rate")
        wrong(learn(tmp_path, "--set", "lr", state=state, **good), "NAME=VALUE")
    shutil.copytree(place / "model", tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"x" * 99)
    failed(learn(tmp_path, state="new", **good | {"model": tmp_path / "broken"}), "cannot load the model")
    failed(learn(tmp_path, state=place / "s.jsonl" / "x", **good), "s.jsonl/x cannot be used", "choose a folder")
    failed(learn(tmp_path, **good | {"model": place / "other"}), "another base model", place / "model")
    other_setting = learn(tmp_path, "--set", "warm_tokens=5", **good)
    wrong(other_setting, "has warm_tokens = 4, not 5", "choose another --state")
    wrong(learn(tmp_path, "--dtype", "bfloat16", **good), "made in float32", "leave --dtype out")
    wrong(["rollback", "--to", "77", "--state", copy], "no version 77", "there are")
    wrong(["export", "--state", copy, "--out", tmp_path / "a", "--expert", "who"], "no expert 'who'", "default")
    wrong(["status", "--state", tmp_path / "none"], "no learner state", "learn --state")
    for command in (["rollback", "--to", "1"], ["export", "--out", tmp_path / "a"]):
        wrong([*command, "--state", tmp_path / "none"], "no learner state", "learn --state")
    wrong(["ask", "--state", copy, "a", " "], "a prompt is empty", "give what to ask")
    assert not {"none", "new", "a"} & {path.name for path in tmp_path.iterdir()}
    lock = StateFolder(copy)
    one_line(*run(*learn(tmp_path, **good)), "in use", "stop it first")
    lock.close()
    # none of it harmed the state
    assert run(*learn(tmp_path, **good))[0] == 0


def forge(state, **changes):
    """Save a state's newest snapshot again, with another meta."""
    folder = StateFolder(state)
    snapshot = folder.load()
    folder.save(snapshot.version, snapshot.tensors, {**snapshot.meta, **changes})
    folder.close()


def test_a_state_of_another_format_is_told_alike_by_every_command(place, copy, run, tmp_path):
    config = StateFolder(copy, readonly=True).load().meta["config"]
    del config["loraplus_lr_ratio"]
    forge(copy, format=FORMAT - 1, config={**config, "retired": 1})
    said = run("status", "--state", copy)
    one_line(*said, f"{copy} has a state of format {FORMAT - 1}, this version reads {FORMAT}")
    good = dict(model=place / "model", samples=place / "s.jsonl")
    for command in (learn(tmp_path, "--set", "loraplus_lr_ratio=2", **good), ["ask", "x", "--state", copy],
                    ["rollback", "--to", 1, "--state", copy], ["freeze", "default", "--state", copy],
                    ["export", "--out", tmp_path / "a", "--state", copy]):
        assert run(*command) == said
    # a setting that a state of this format lacks has its default, as where it is loaded
    forge(copy, format=FORMAT, config=config)
    assert run(*learn(tmp_path, "--set", "loraplus_lr_ratio=2", **good))[0] == 0
    forge(copy, config=config)
    one_line(*run(*learn(tmp_path, "--set", "loraplus_lr_ratio=3", **good)), "has loraplus_lr_ratio = 2.0, not 3",
             exit_status=2)


def test_settings_and_calibration_come_from_files(place, run, tmp_path):
    (tmp_path / "config.json").write_text('{"lr": 0.01, "warm_samples": 2, "warm_tokens": 4}')
    (tmp_path / "texts.txt").write_text("some text\n\nmore of it\n")
    good = dict(model=place / "model", samples=place / "s.jsonl", settings=[])
    files = ["--config", str(tmp_path / "config.json"), "--calibration", str(tmp_path / "texts.txt")]
    command = learn(tmp_path, *files, "--set", "rank=4", "--set", "target_modules=[\"q_proj\"]", **good)
    assert run(*command)[0] == 0
    meta = StateFolder(tmp_path / "state", readonly=True).load().meta
    assert (meta["config"]["lr"], meta["config"]["rank"], meta["config"]["target_modules"]) == (0.01, 4, ["q_proj"])
    assert run(*command)[0] == 0

    new = dict(state="new", **good)
    (tmp_path / "bad.json").write_text("[1]")

    def wrong(*words):
        one_line(*run(*learn(tmp_path, *words[:-1], **new)), words[-1], exit_status=2)

    bad = ("--config", str(tmp_path / "bad.json"))
    wrong(*bad, "one object")
    (tmp_path / "bad.json").write_text("{")
    wrong(*bad, "bad.json is not JSON")
    (tmp_path / "texts.txt").write_text("\n")
    wrong(*files, "texts.txt holds no text")
    wrong(*files, "--set", "warm_start=false", "drop the texts")
    wrong("--set", "target_modules=*_proj", "target_modules '*_proj' is no regular expression")


def test_wrong_use_exits_with_2_in_one_line(place, run):
    for words, what in (
        (["frob"], "frob"),
        (["learn", "--samples", place / "s.jsonl"], "Missing option"),
        (["learn", "--model", "m", "--state", "s", "--samples", place / "none.jsonl"], "none.jsonl"),
        (["rollback", "--state", place / "state", "--to", "abc"], "--to"),
        (learn(place, "--set", "lr"), "NAME=VALUE"),
        (["status", "--state"], "--state"),
    ):
        one_line(*run(*words), what, exit_status=2)
    for words in ([], ["--help"], ["learn", "--help"]):
        code, out, err = run(*words)
        assert (code, err) == (0, []) and any("Usage" in line for line in out)


def test_a_damaged_folder_is_unhealthy(copy, run):
    newest = max((copy / "snapshots").glob("snapshot-*"), key=lambda path: int(path.name.split("-")[1].split(".")[0]))
    data = bytearray((newest / "state.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "state.safetensors").write_bytes(data)
    code, out, err = run("status", "--state", copy, "--json")
    status = json.loads(out[0])
    # the older snapshot and the journal after it still hold everything
    assert (code, status["healthy"], status["acknowledged"]) == (1, False, 6) and "checksum" in err[0]
    shutil.rmtree(copy / "snapshots")
    (copy / "snapshots").mkdir()
    code, out, err = run("status", "--state", copy, "--json")
    assert code == 1 and json.loads(out[0])["healthy"] is False and len(err) == 1
    one_line(*run("rollback", "--state", copy, "--to", "1"), "damaged", "from a copy")


def test_an_interrupt_is_one_line_and_the_next_run_goes_on(place, run, tmp_path, monkeypatch):
    good = dict(model=place / "model", samples=place / "s.jsonl")
    calls = []

    def interrupted(self, result, line):
        calls.append(line)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)

    # a shell has its background jobs ignore it
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(cli.LearnProgress, "update", interrupted)
            one_line(*run(*learn(tmp_path, **good)), "interrupted", "goes on where it was", exit_status=130)
    finally:
        signal.signal(signal.SIGINT, handler)
    code, out, _ = run(*learn(tmp_path, "--json", **good))
    assert code == 0
    expected = json.loads(run("status", "--state", place / "state", "--json")[1][0])
    assert json.loads(run("status", "--state", tmp_path / "state", "--json")[1][0]) == expected


def test_progress_is_a_line_a_minute_in_a_log(place, run, tmp_path, monkeypatch):
    good = dict(model=place / "model", samples=place / "s.jsonl")
    assert run(*learn(tmp_path, **good))[2] == []
    monkeypatch.setattr(terminal, "EVERY", 0.0)
    code, _, err = run(*learn(tmp_path, "--refresh", state="told", **good))
    assert code == 0 and all(line.startswith("ogpstream: progress: ") for line in err)
    assert "line 1: learned 1, rejected 0" in err[0]
    first = next(number for number, line in enumerate(err) if "rehearsing what was learned once" in line)
    assert len(err) > first + 1 and all("looked at were known" in line for line in err[first + 1 :])


def test_plugins_add_commands_and_broken_ones_are_told(run, monkeypatch):
    class Point:
        def __init__(self, name, load):
            self.name, self.value, self.load = name, f"{name}:register", load

    def register(app):
        @app.command()
        def greet(name: str) -> int:
            """Say hello."""
            print(f"hello {name}")
            return 3

    def broken():
        raise ImportError("no such module")

    points = [Point("good", lambda: register), Point("bad", broken)]
    monkeypatch.setattr(cli, "entry_points", lambda group: points if group == "ogpstream.commands" else [])
    monkeypatch.setattr(cli.app, "registered_commands", list(cli.app.registered_commands))
    code, out, err = run("greet", "you")
    assert (code, out) == (3, ["hello you"])
    assert len(err) == 1 and "bad" in err[0] and "no such module" in err[0]
    # what needs none of them does not wait for them
    monkeypatch.setattr(cli, "entry_points", lambda group: pytest.fail("looked for plugins"))
    assert run("status", "--help")[0] == 0


MODULES = """
import sys
from ogpstream.learner import cli
from ogpstream.profiling import bench, demo
cli.entry_points = lambda group: []
for plugin in (bench, demo):
    plugin.register(cli.app)
for words in {commands!r}:
    cli.main(words)
print(*sorted(sys.modules))
"""


@pytest.mark.parametrize("command", ["help", "status"])
def test_what_needs_no_model_imports_no_library_of_models(place, command):
    every = [[], ["learn"], ["demo"], ["bench"], *(["bench", name] for name in NAMES)]
    helps = [[*words, "--help"] for words in every]
    commands = helps if command == "help" else [["status", "--state", str(place / "state")]]
    program = [sys.executable, "-c", MODULES.format(commands=commands)]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "typer" in loaded and not loaded & {"transformers", "peft", "triton"}
    assert command == "status" or "torch" not in loaded
    if command == "help":
        assert all(name in done.stdout for name in (
            "learn", "ask", "status", "rollback", "freeze", "export", "demo", "bench", *NAMES))
        # of the help of each, at its beginning
        assert done.stdout.count("Usage: ogpstream") == len(helps)
        # the exit status is told where a user looks for it
        assert "0 fine; 1 the work failed" in " ".join(done.stdout.split())


def test_every_name_of_the_package_is_there():
    for name in learner_package.__all__:
        assert getattr(learner_package, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = learner_package.Nothing
