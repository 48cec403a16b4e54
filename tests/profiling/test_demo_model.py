import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import ogpstream.profiling.demo_model as demo_model
from ogpstream.learner import ConfigError
from ogpstream.profiling.demo_model import (
    BaseRecipe,
    Corpus,
    base_model,
    gather_corpus,
    train_model,
    train_tokenizer,
)
from ogpstream.profiling.evaluate import perplexity

TINY = BaseRecipe(
    vocab=320,
    width=32,
    layers=1,
    heads=2,
    hidden=48,
    window=32,
    batch=4,
    steps=30,
    warmup=3,
    held_out=4,
    threads=1,
)


def english(n, seed=0):
    words = "the list of open files is read from a stream when its name has been given to this module".split()
    chosen = np.random.default_rng(seed).choice(words, (n, 12))
    return tuple(" ".join(row).capitalize() + "." for row in chosen)


@pytest.fixture
def small_corpus(monkeypatch):
    """Counts how often the text is gathered, which is once for each model that is made."""
    calls = []
    corpus = Corpus(english(200), ("Q: Read a stream.\nA: read",), english(4, seed=1), english(4, seed=2))

    def gather(held_out):
        calls.append(held_out)
        return corpus

    monkeypatch.setattr(demo_model, "gather_corpus", gather)
    return calls


@pytest.fixture(scope="module")
def library():
    return gather_corpus(96)


def test_library_holds_enough_english_in_disjoint_sets(library):
    assert sum(len(text.encode()) for text in library.train) >= 1_000_000
    assert len(library.held_out) == len(library.calibration) == 96
    sets = [library.train, library.calibration, library.held_out]
    paragraphs = [{part.lower() for text in texts for part in text.split("\n")} for texts in sets]
    assert (
        not paragraphs[0] & paragraphs[1]
        and not paragraphs[0] & paragraphs[2]
        and not paragraphs[1] & paragraphs[2]
    )
    apart = "\n".join((*library.calibration, *library.held_out))
    assert not [q for q in library.questions if q.removeprefix("Q: ").split("\nA: ")[0] in apart]
    assert len(library.questions) > 1000


def test_split_depends_on_the_text_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_model, "MIN_TEXT_BYTES", 1000)
    docs = [" ".join(english(12, seed)) for seed in range(20)]
    for i, text in enumerate(docs):
        (tmp_path / f"m{i:02}.py").write_text(f'"""{text}"""\n')
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text('"""A docstring of a test is not a part of the library."""\n')
    (tmp_path / "broken.py").write_text('"""A file that does not parse is passed over."""\nprint 1\n')
    first = gather_corpus(4, stdlib=tmp_path)
    for i, text in enumerate(reversed(docs)):
        (tmp_path / f"m{i:02}.py").write_text(f'"""{text}"""\n')
    second = gather_corpus(4, stdlib=tmp_path)
    assert first.held_out == second.held_out and first.calibration == second.calibration
    assert sorted(first.train) == sorted(second.train) and len(first.train) == 12


def test_too_little_text_is_an_error(tmp_path):
    (tmp_path / "a.py").write_text('"""A single docstring does not make a language model."""\n')
    with pytest.raises(ConfigError, match="use a Python whose"):
        gather_corpus(4, stdlib=tmp_path)


def test_tokenizer_starts_with_bos_and_decodes_what_it_wrote():
    tokenizer = train_tokenizer(english(50), 300, 64)
    for text in ("The list is open.", "Zürich ≠ x\n\tß", " a  b"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and len(tokenizer) <= 300
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (
        tokenizer(" list", add_special_tokens=False)["input_ids"] == tokenizer("The list")["input_ids"][-1:]
    )


def test_training_lowers_the_loss_and_repeats_bit_for_bit():
    tokenizer = train_tokenizer(english(100), TINY.vocab, TINY.window)
    rows = tokenizer(list(english(100)))["input_ids"]
    torch.set_num_threads(1)
    models = [train_model(rows, recipe) for recipe in (TINY, TINY, replace(TINY, steps=1))]
    losses = [math.log(perplexity(model, rows)) for model in models]
    assert losses[0] < losses[2] - 1.0
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name


def test_cache_gives_back_the_same_model(tmp_path, small_corpus):
    random_state = torch.get_rng_state()
    model, tokenizer, report = base_model(tmp_path, recipe=TINY)
    again, same_tokenizer, cached = base_model(tmp_path, recipe=TINY)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert len(small_corpus) == 1
    assert not report.cached and cached == replace(report, cached=True)
    assert model.state_dict().keys() == again.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    text = "Q: The open files?\nA:"
    assert tokenizer(text)["input_ids"] == same_tokenizer(text)["input_ids"]
    assert not again.training
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("making-")] == []
    base_model(tmp_path, recipe=replace(TINY, seed=1))
    assert len(small_corpus) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "report.json"])
def test_damaged_cache_is_made_anew(tmp_path, small_corpus, name):
    model, _, _ = base_model(tmp_path, recipe=TINY)
    (folder,) = tmp_path.iterdir()
    damaged = bytearray((folder / name).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (folder / name).write_bytes(damaged[:-1])
    again, _, report = base_model(tmp_path, recipe=TINY)
    assert len(small_corpus) == 2 and not report.cached
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert base_model(tmp_path, recipe=TINY)[2].cached


def test_report_is_about_this_model(tmp_path, small_corpus):
    model, tokenizer, report = base_model(tmp_path, recipe=TINY)
    rows = tokenizer(list(report.held_out))["input_ids"]
    assert report.perplexity == pytest.approx(perplexity(model, rows), rel=1e-5)
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.tokens_seen == 30 * 4 * 32
    assert set(report.held_out).isdisjoint(report.calibration)
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "report.json").read_text())["text_tokens"] == report.text_tokens


def test_default_model_is_large_enough():
    recipe = BaseRecipe()
    block = 4 * recipe.width**2 + 3 * recipe.width * recipe.hidden + 2 * recipe.width
    assert recipe.vocab * recipe.width + recipe.layers * block + recipe.width >= 1_000_000
    assert recipe.held_out >= 64
