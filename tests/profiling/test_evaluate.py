import math
from collections import Counter

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ogpstream.profiling.evaluate import (
    AccuracyMatrix,
    Trigram,
    accuracy,
    perplexity,
    rank_labels,
)

VOCAB = 40
POSITIONS = 16
WORDS = ["<s>", "<unk>", *(f"w{i}" for i in range(VOCAB - 2))]
LABELS = ["w3 w4", "w3 w5", "w8", "w9 w4", "w6 w7", "w3 w5 w7", "w6 w5"]


def word_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def llama(**changes):
    torch.manual_seed(0)
    config = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(LlamaConfig(**(config | changes)))


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=POSITIONS,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def prompts(lengths):
    generator = torch.Generator().manual_seed(1)
    return [" ".join(f"w{i}" for i in torch.randint(38, (n,), generator=generator)) for n in lengths]


def slow_scores(model, tokenizer, prompt, labels, positions):
    """The definition, one label and one token at a time, without a cache."""
    longest = max(len(label.split()) for label in labels)
    ids = tokenizer(prompt)["input_ids"][-(positions - longest + 1) :]
    sums = []
    for label in labels:
        row, total = list(ids), 0.0
        for token in tokenizer(" " + label, add_special_tokens=False)["input_ids"]:
            with torch.no_grad():
                total += float(model(torch.tensor([row])).logits[0, -1].double().log_softmax(-1)[token])
            row.append(token)
        sums.append(total)
    return sums


@pytest.mark.parametrize("make", [llama, gpt2])
def test_ranking_equals_the_slow_loop(make):
    model, tokenizer = make().eval(), word_tokenizer()
    questions = prompts([1, 5, 5, 5, 5, 9, 9, 2, 30, 40, 13, 12])
    scores = [slow_scores(model, tokenizer, prompt, LABELS, POSITIONS) for prompt in questions]
    expected = [LABELS[row.index(max(row))] for row in scores]
    assert len(set(expected)) > 1
    assert rank_labels(model, tokenizer, questions, [LABELS] * len(questions), batch=3) == expected
    # every label's sum takes part, not only the winner's: the higher of each two neighbours in rank wins
    for prompt, row in zip(questions[:6], scores, strict=False):
        order = sorted(range(len(LABELS)), key=row.__getitem__)
        for low, high in zip(order, order[1:], strict=False):
            assert rank_labels(model, tokenizer, [prompt], [[LABELS[low], LABELS[high]]]) == [LABELS[high]]


def test_each_prompt_has_labels_of_its_own():
    model, tokenizer = llama().eval(), word_tokenizer()
    # of equal length, so that they share a forward: numbers and lengths of labels differ
    questions, sets = prompts([5, 5, 5]), [LABELS, LABELS[:1], LABELS[::-1][:3]]
    expected = []
    for prompt, own in zip(questions, sets, strict=True):
        row = slow_scores(model, tokenizer, prompt, own, POSITIONS)
        expected.append(own[row.index(max(row))])
    assert rank_labels(model, tokenizer, questions, sets) == expected
    # scores of single labels are negative: a label that fills up must not win with 0
    assert [rank_labels(model, tokenizer, [q, q], [[label], LABELS])[0] for q in questions for label in LABELS] == [
        *LABELS
    ] * 3
    with pytest.raises(ValueError, match="zip"):
        rank_labels(model, tokenizer, questions, sets[:2])


def test_sums_are_not_divided_by_length():
    """A model that gives every token the same probability prefers the shortest label."""
    model = llama()
    model.lm_head.weight.data.zero_()
    assert rank_labels(model, word_tokenizer(), prompts([3]), [["w3 w4 w5", "w6 w7", "w8"]]) == ["w8"]


def test_ties_go_to_the_first_label():
    model = llama()
    model.lm_head.weight.data.zero_()
    assert rank_labels(model, word_tokenizer(), prompts([3]), [["w9 w3", "w8", "w3", "w1"]]) == ["w8"]


def test_ranking_leaves_the_mode_and_needs_labels_with_tokens():
    model, tokenizer = llama().train(), word_tokenizer()
    rank_labels(model, tokenizer, prompts([3]), [LABELS])
    assert model.training
    with pytest.raises(ValueError, match="no labels"):
        rank_labels(model, tokenizer, prompts([3]), [[]])
    with pytest.raises(ValueError, match="'' has no tokens"):
        rank_labels(model, tokenizer, prompts([3]), [["w3", ""]])
    with pytest.raises(ValueError, match="leaves no room"):
        rank_labels(model, tokenizer, prompts([3]), [[" ".join(["w3"] * (POSITIONS + 1))]])


def test_a_perplexity_equals_the_slow_loop():
    model = llama().eval()
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in (9, 2, 16, 5, 30, 3, 9)]
    nats = []
    for row in (row[:POSITIONS] for row in rows):
        with torch.no_grad():
            log_probs = model(torch.tensor([row])).logits[0].double().log_softmax(-1)
        nats += [-float(log_probs[t - 1, row[t]]) for t in range(1, len(row))]
    assert perplexity(model, rows) == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-5)
    for bad, message in (([[1, 2], [3]], "row 1 has 1 tokens"), ([], "no rows")):
        with pytest.raises(ValueError, match=message):
            perplexity(model, bad)


def test_accuracy_counts():
    assert accuracy(["a", "b", "c"], ["a", "x", "c"]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="2 predictions for 1"):
        accuracy(["a", "b"], ["a"])


def test_matrix_formulas():
    matrix = AccuracyMatrix(["x", "y", "z"])
    for row in ([0.9, 0.1, 0.2], [0.5, 0.8, 0.3], [0.4, 0.9, 0.7]):
        matrix.add(row)
    assert matrix.acc == pytest.approx((0.4 + 0.9 + 0.7) / 3)
    assert matrix.la == pytest.approx((0.9 + 0.8 + 0.7) / 3)
    assert matrix.bwt == pytest.approx(((0.4 - 0.9) + (0.9 - 0.8)) / 2)


def test_matrix_refuses_what_it_cannot_say():
    matrix = AccuracyMatrix(["x", "y"])
    matrix.add([1.0, 0.0])
    with pytest.raises(ValueError, match="1 of 2 tasks"):
        _ = matrix.bwt
    with pytest.raises(ValueError, match="1 accuracies for 2"):
        matrix.add([1.0])
    matrix.add([1.0, 1.0])
    with pytest.raises(ValueError, match="have their row"):
        matrix.add([1.0, 1.0])
    with pytest.raises(ValueError, match="each once"):
        AccuracyMatrix(["x", "x"])
    single = AccuracyMatrix(["x"])
    single.add([0.5])
    assert (single.acc, single.la, single.bwt) == (0.5, 0.5, 0.0)


def slow_trigram(rows, vocab, u, v, w):
    """p(w | u v) by the definition, from sets and counters."""
    seen = [[row[0], *row] for row in rows]
    trigrams = Counter(gram for row in seen for gram in zip(row, row[1:], row[2:], strict=False))
    bigrams = Counter(gram[1:] for gram in trigrams)
    unigrams = Counter(gram[1:] for gram in bigrams)
    p = 1 / vocab
    for counts, context in ((unigrams, ()), (bigrams, (v,)), (trigrams, (u, v))):
        n = [max(1, sum(c == k for c in counts.values())) for k in (1, 2, 3, 4)]
        y = n[0] / (n[0] + 2 * n[1])
        discounts = [min(max(k - (k + 1) * y * n[k] / n[k - 1], 0), k) for k in (1, 2, 3)]
        after = {gram[-1]: c for gram, c in counts.items() if gram[:-1] == context}
        if after:
            taken = {x: discounts[min(c, 3) - 1] for x, c in after.items()}
            p = (after.get(w, 0) - taken.get(w, 0) + sum(taken.values()) * p) / sum(after.values())
    return p


def test_trigram_equals_the_definition():
    rng = np.random.default_rng(0)
    vocab = 9
    usual = np.array([1, 9, 5, 3, 2, 1, 1, 1, 0]) / 23
    rows = [[0, *rng.choice(vocab, 25, p=usual).tolist()] for _ in range(20)]
    model = Trigram(rows, vocab)
    for row in ([0, 1, 2, 1, 8, 7, 7], [8, 8, 8, 1], [0, 3, 1, 1, 1, 1, 2, 4]):
        expected = [
            slow_trigram(rows, vocab, *gram) for gram in zip([row[0], *row], row, row[1:], strict=False)
        ]
        assert model.perplexity([row]) == pytest.approx(math.prod(expected) ** (-1 / len(expected)), rel=1e-9)
    for u, v in ((1, 2), (8, 8), (0, 3)):
        assert sum(slow_trigram(rows, vocab, u, v, w) for w in range(vocab)) == pytest.approx(1)
