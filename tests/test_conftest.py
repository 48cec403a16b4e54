"""The fixtures do what the tests that use them rely on."""

import pytest
import torch

from ogpstream.kernels import reference


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma", "gemma2", "gpt2"])
def test_tiny_model_is_reproducible_and_fits_the_tokenizer(family, tiny_model, tiny_tokenizer):
    before = torch.random.get_rng_state()
    model, again, other = tiny_model(family), tiny_model(family), tiny_model(family, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    ids = tiny_tokenizer("What is\na kea?", return_tensors="pt").input_ids
    with torch.no_grad():
        logits, same, different = (m(ids).logits for m in (model, again, other))
    assert torch.equal(logits, same) and not torch.equal(logits, different)
    assert logits.shape[-1] == model.config.vocab_size > max(tiny_tokenizer.get_vocab().values())
    assert model.config.eos_token_id == tiny_tokenizer.eos_token_id


def test_tiny_model_takes_a_dtype_and_fields_of_the_config(tiny_model):
    model = tiny_model("llama", torch.float64, num_hidden_layers=3)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert len(model.model.layers) == 3 and not model.training


def test_tiny_tokenizer_round_trip(tiny_tokenizer):
    text = "a  line,\nand ~another~"
    ids = tiny_tokenizer(text).input_ids
    assert ids[0] == tiny_tokenizer.bos_token_id and len(ids) == 1 + len(text)
    assert tiny_tokenizer.decode(ids, skip_special_tokens=True) == text


def test_only_the_package_sees_poisoned_memory():
    def run_inside(expression):
        return eval(expression, {"__name__": reference.__name__, "torch": torch})

    for expression in ("torch.empty(3)", "torch.empty_like(torch.ones(3))", "torch.ones(1).new_empty(3)"):
        assert run_inside(expression).isnan().all(), expression
    assert run_inside("torch.empty(3, dtype=torch.int64)").dtype == torch.int64
    with torch.device("meta"):
        assert torch.empty(3).device.type == "meta"
        assert torch.nn.Linear(2, 2).weight.device.type == "meta"
