"""The demo's base model: a small Llama made on the spot from the English that every Python carries.

The text is pydoc's language reference and the docstrings of the standard library; a document is a few
consecutive paragraphs of prose of one file. A hash of its text puts a document into one of three disjoint
sets: train, calibration (for a warm start) and held out (for perplexity and base retention). The training set
also asks for the names that docstrings explain, so that the model has seen questions with short answers. The
perplexity on the held-out tokens stands beside that of a trigram model counted on the same training tokens.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import re
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from safetensors.torch import load_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ogpstream.learner.errors import ConfigError
from ogpstream.profiling.demo_progress import DemoProgress
from ogpstream.profiling.evaluate import Trigram, perplexity
from ogpstream.profiling.muon import Muon

# raise it with every change of this file that changes the model that comes out
CODE_VERSION = 3
MIN_TEXT_BYTES = 1_000_000
DOCUMENT_CHARS = 800
BOS = "<s>"
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class BaseRecipe:
    """Everything that, with the text, the Python and the torch at hand, determines the base model."""

    vocab: int = 2048  # byte-level BPE entries, BOS among them
    width: int = 192
    layers: int = 3  # 4 have perplexity 57, and the demo takes a third more time
    heads: int = 4
    hidden: int = 512  # inner width of the feed-forward layers
    window: int = 128  # tokens of a training window, BOS among them, and the model's positions
    batch: int = 8  # windows of a step
    steps: int = 600  # with 4 layers 1000 have perplexity 43 and retain less of the base (profiling/README.md)
    warmup: int = 40
    lr: float = 2e-2  # peak of AdamW, for embeddings and norms; 400 steps: perplexity 69, with 3e-3 85
    matrix_lr: float = 0.02  # peak of Muon, for all other weights
    weight_decay: float = 0.1
    held_out: int = 96  # documents; as many again for calibration
    seed: int = 0
    threads: int = 2  # of the training: the order of its sums depends on them


@dataclass(frozen=True)
class Corpus:
    """Texts in three disjoint sets of documents; the questions go with the training set."""

    train: tuple[str, ...]
    questions: tuple[str, ...]  # "Q: first sentence of a docstring\\nA: words of the name that it explains"
    calibration: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class BaseReport:
    """What was made. Both perplexities are per token, on the tokens of the held-out documents after BOS."""

    parameters: int
    seconds: float  # spent on collecting, tokenizing, training and evaluating
    text_bytes: int  # UTF-8 bytes of the training documents
    text_tokens: int
    tokens_seen: int  # by the training, repetitions counted
    perplexity: float
    trigram_perplexity: float
    calibration: tuple[str, ...]  # documents that were not trained on
    held_out: tuple[str, ...]  # others that were not trained on
    cached: bool  # loaded, not made by this call


def _docstrings(path: Path) -> list[tuple[str, str]]:
    """Names and docstrings of a module, its classes and functions; pydoc's topics have no names."""
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    if path.parent.name == "pydoc_data":
        return [("", n.value) for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [(getattr(n, "name", ""), ast.get_docstring(n) or "") for n in nodes if isinstance(n, documented)]


def _prose(paragraph: str) -> str | None:
    """The paragraph on one line, or None where it is not mostly words: a table, code, a grammar."""
    text = " ".join(paragraph.split())
    letters = sum(map(len, re.findall(r"[A-Za-z][a-z']*", text)))
    return text if len(text) >= 20 and letters >= 0.7 * len(text) and ">>>" not in text else None


def _spoken(name: str) -> str | None:
    """The words of an identifier, `readRawConfig` -> `read raw config`; None for a dunder or over four."""
    words = re.sub(r"([a-z])([A-Z])", r"\1 \2", name).replace("_", " ").lower().split()
    return " ".join(words) if 1 <= len(words) <= 4 and not name.startswith("__") else None


def _read_library(stdlib: Path) -> tuple[list[str], dict[str, str]]:
    """Documents of the standard library, no paragraph twice, and the first sentences of docstrings with the
    words of the name that they explain; both in an order that the file system has no part in."""
    documents: list[str] = []
    explained: dict[str, str] = {}
    seen: set[str] = set()
    for path in sorted(stdlib.rglob("*.py")):
        if NOT_LIBRARY & set(path.relative_to(stdlib).parts):
            continue
        try:
            named = _docstrings(path)
        except (UnicodeDecodeError, SyntaxError):
            continue  # the library carries broken files on purpose, as lib2to3's examples of Python 2
        document: list[str] = []
        for name, docstring in named:
            paragraphs = [_prose(part) for part in re.split(r"\n\s*\n", docstring)]
            sentence = re.split(r"(?<=[.!?])\s", paragraphs[0] or "")[0]
            if 20 <= len(sentence) <= 160 and (answer := _spoken(name)):
                explained.setdefault(sentence, answer)
            for text in paragraphs:
                if text is None or text.lower() in seen:
                    continue
                seen.add(text.lower())
                document.append(text)
                if sum(map(len, document)) >= DOCUMENT_CHARS:
                    documents.append("\n".join(document))
                    document = []
        if document:
            documents.append("\n".join(document))
    return documents, explained


def gather_corpus(held_out: int, *, stdlib: Path | None = None) -> Corpus:
    """The standard library's English, split by hash: the `held_out` long documents of smallest hash are held
    out, the next as many are for calibration, the rest for training. ConfigError where there is too little."""
    folder = stdlib or Path(sysconfig.get_path("stdlib"))
    documents, explained = _read_library(folder)
    long = [text for text in documents if len(text) >= DOCUMENT_CHARS // 2]
    ranked = sorted(long, key=lambda text: hashlib.sha256(text.encode()).digest())
    apart = ranked[: 2 * held_out]
    kept_away = set(apart)
    train = [text for text in documents if text not in kept_away]
    size = sum(len(text.encode()) for text in train)
    if size < MIN_TEXT_BYTES or len(apart) < 2 * held_out:
        raise ConfigError(
            f"{folder} holds {size} bytes of English, the demo needs {MIN_TEXT_BYTES}: "
            "use a Python whose standard library comes as .py files"
        )
    away = "\n".join(apart)
    questions = [f"Q: {sentence}\nA: {name}" for sentence, name in explained.items() if sentence not in away]
    return Corpus(tuple(train), tuple(questions), tuple(apart[held_out:]), tuple(apart[:held_out]))


def train_tokenizer(texts: Sequence[str], vocab: int, positions: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with BOS in front by default; it writes any text and decodes it exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, pad_token=BOS, model_max_length=positions
    )


def _windows(rows: Sequence[Sequence[int]], recipe: BaseRecipe) -> Iterator[torch.Tensor]:
    """Batches [batch, window] without end: all rows in one line, reordered and cut anew each epoch."""
    generator = torch.Generator().manual_seed(recipe.seed)
    bos, width = rows[0][0], recipe.window - 1
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        line = torch.tensor([token for i in order for token in rows[i]])
        cut = line[: len(line) // width * width].view(-1, width)
        windows = torch.cat([torch.full((len(cut), 1), bos), cut], 1)
        for batch in windows[torch.randperm(len(cut), generator=generator)].split(recipe.batch):
            if len(batch) == recipe.batch:
                yield batch


def _schedule(step: int, recipe: BaseRecipe) -> float:
    """The factor of the learning rates: a linear warmup, then a cosine from 1 to 0.05."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
    return min(1.0, (step + 1) / recipe.warmup) * (0.05 + 0.95 * cosine)


def train_model(
    rows: Sequence[Sequence[int]], recipe: BaseRecipe, console: Console | None = None
) -> LlamaForCausalLM:
    """A Llama trained from scratch on rows of ids that start with BOS; equal for equal recipe and build."""
    config = LlamaConfig(
        vocab_size=recipe.vocab,
        hidden_size=recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        intermediate_size=recipe.hidden,
        max_position_embeddings=recipe.window,
        tie_word_embeddings=True,
        bos_token_id=rows[0][0],
        eos_token_id=rows[0][0],
    )
    # the caller's random numbers must not depend on whether the model was made or loaded
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = LlamaForCausalLM(config)
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    outer = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    # loss 4.7 after 200 steps of 2048 tokens, where AdamW alone stood at 5.5
    optimizers = [
        Muon(inner, lr=recipe.matrix_lr, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(outer, lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    batches = _windows(rows, recipe)
    before = torch.get_num_threads()
    torch.set_num_threads(recipe.threads)
    try:
        with DemoProgress(console, {"base model": recipe.steps}) as progress:
            for step in range(recipe.steps):
                for group, lr in groups:
                    group["lr"] = lr * _schedule(step, recipe)
                ids = next(batches)
                with torch.autocast("cpu", torch.bfloat16, enabled=has_amx()):
                    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
                loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optimizer in optimizers:
                    # Muon's products too: a third of a step in float32
                    with torch.autocast("cpu", torch.bfloat16, enabled=has_amx()):
                        optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                progress.show("base model", step + 1, f"loss {loss.item():.2f}")
    finally:
        torch.set_num_threads(before)
    return model.eval()


def has_amx() -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware; where it does not, bf16 is slower than fp32."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and " amx_bf16" in cpuinfo.read_text()


def _key(recipe: BaseRecipe) -> str:
    builds = [sys.version, torch.__version__, transformers.__version__, has_amx()]
    return hashlib.sha256(json.dumps([asdict(recipe), CODE_VERSION, builds]).encode()).hexdigest()[:16]


def _digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.iterdir()) if path.name != "report.json")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _load(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, BaseReport] | None:
    """What an earlier call left in the folder; None where nothing is or a file is not as it was written."""
    try:
        record = json.loads((folder / "report.json").read_text("utf-8"))
        if record.pop("files") != _digests(folder):
            return None
        report = BaseReport(**record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    calibration, held_out = tuple(report.calibration), tuple(report.held_out)
    report = replace(report, calibration=calibration, held_out=held_out, cached=True)
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    load_model(model, folder / "model.safetensors")
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(folder), report


def base_model(
    cache_dir: str | os.PathLike[str], *, progress: Console | None = None, recipe: BaseRecipe | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, BaseReport]:
    """The demo's model, its tokenizer and how it came about: loaded from `cache_dir`, or made and left there.

    Args:
        cache_dir: holds a folder for each recipe, Python, torch and transformers; it appears whole or not at
            all, and one with a damaged file is made anew.
        progress: the console that shows the bar; None shows nothing.
    """
    recipe = recipe or BaseRecipe()
    cache = Path(cache_dir)
    folder = cache / f"base-{_key(recipe)}"
    if (cached := _load(folder)) is not None:
        return cached
    started = time.perf_counter()
    corpus = gather_corpus(recipe.held_out)
    texts = [*corpus.train, *corpus.questions]
    tokenizer = train_tokenizer(texts, recipe.vocab, recipe.window)
    # verbose warns of rows beyond the model's positions; here they are cut into windows
    rows = tokenizer(texts, verbose=False)["input_ids"]
    held_out = tokenizer(list(corpus.held_out), truncation=True)["input_ids"]
    model = train_model(rows, recipe, progress)
    report = BaseReport(
        parameters=sum(p.numel() for p in model.parameters()),
        text_bytes=sum(len(text.encode()) for text in texts),
        text_tokens=sum(map(len, rows)),
        tokens_seen=recipe.steps * recipe.batch * recipe.window,
        perplexity=perplexity(model, held_out),
        trigram_perplexity=Trigram(rows, recipe.vocab).perplexity(held_out),
        calibration=corpus.calibration,
        held_out=corpus.held_out,
        seconds=time.perf_counter() - started,
        cached=False,
    )
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="making-") as name:
        made = Path(name) / folder.name
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        record = asdict(report) | {"files": _digests(made)}
        (made / "report.json").write_text(json.dumps(record, indent=1), "utf-8")
        if folder.exists():
            folder.rename(Path(name) / "damaged")
        made.rename(folder)
    return model, tokenizer, report
