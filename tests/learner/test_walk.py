"""The walk computes what the model computes, for every family, and so does its layer-wise backward."""

import copy
from collections.abc import Callable

import pytest
import torch
import transformers as tf

from ogpstream.learner.errors import ModelError
from ogpstream.learner.sites import attach
from ogpstream.learner.walk import LayerWalk, run_layer
from ogpstream.memory.adapters import AdapterStore

TinyModel = Callable[..., tf.PreTrainedModel]

OTHERS: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(
            vocab_size=101,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            sliding_window=4,
            query_pre_attn_scalar=12,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    # scales beside the layers and on the logits
    "granite": lambda: tf.GraniteForCausalLM(
        tf.GraniteConfig(
            vocab_size=101,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            embedding_multiplier=2.0,
            logits_scaling=3.0,
        )
    ),
    # a projection between the final norm and the head
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=101,
            hidden_size=32,
            ffn_dim=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=24,
        )
    ),
    # layers that return tuples
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=101, hidden_size=32, n_layer=4, n_head=4)),
}


@pytest.fixture(params=["llama", "qwen3", "mistral", "gemma", "gemma2", "gpt2", *OTHERS])
def model(request: pytest.FixtureRequest, tiny_model: TinyModel) -> tf.PreTrainedModel:
    if request.param in OTHERS:
        torch.manual_seed(0)
        built = OTHERS[request.param]().double().eval()
    else:
        built = tiny_model(request.param, dtype=torch.float64)
    return built.requires_grad_(False)


@pytest.fixture
def llama(tiny_model: TinyModel) -> tf.PreTrainedModel:
    return tiny_model("llama", dtype=torch.float64).requires_grad_(False)


def _ids(length: int = 9) -> torch.Tensor:
    return torch.randint(4, 101, (1, length), generator=torch.Generator().manual_seed(1))


def _walk(walk: LayerWalk, ids: torch.Tensor) -> torch.Tensor:
    hidden, calls, final = walk.plan(ids)
    for call in calls:
        hidden = run_layer(call, hidden)
    return walk.head(final(hidden))


def test_walk_gives_the_models_logits(model: tf.PreTrainedModel) -> None:
    walk = LayerWalk(model)
    # the first plan also learns what the layers return, a second one of another length uses it
    for length in (9, 5):
        torch.testing.assert_close(
            _walk(walk, _ids(length)), model(_ids(length)).logits, rtol=1e-12, atol=1e-12
        )
    walk.check(_ids())


def test_only_what_follows_the_layers_is_final(tiny_model: TinyModel) -> None:
    """In eval mode the dropout before the layers of GPT-2 returns the very tensor that it reads."""
    final = LayerWalk(tiny_model("gpt2")).plan(_ids()).final
    assert [type(module) for module in final] == [torch.nn.LayerNorm]


def test_head_on_chosen_rows(model: tf.PreTrainedModel) -> None:
    walk = LayerWalk(model)
    hidden, calls, final = walk.plan(_ids())
    for call in calls:
        hidden = run_layer(call, hidden)
    rows = torch.tensor([1, 4, 7])
    torch.testing.assert_close(
        walk.head(final(hidden[:, rows])), model(_ids()).logits[:, rows], rtol=1e-12, atol=1e-12
    )


def test_walk_leaves_the_model_alone(model: tf.PreTrainedModel) -> None:
    def inventory() -> list[tuple[str, int, int, int]]:
        return [
            (n, id(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()
        ]

    before, keys = inventory(), [set(m.__dict__) for m in model.modules()]
    random_state = torch.get_rng_state()
    _walk(LayerWalk(model), _ids())
    assert inventory() == before
    assert [set(m.__dict__) for m in model.modules()] == keys
    assert torch.equal(torch.get_rng_state(), random_state)


def test_layerwise_backward_is_the_whole_backward(model: tf.PreTrainedModel) -> None:
    """With adapters in the layers, and each layer's graph kept, so that nothing is computed twice."""
    attachment = attach(model, rank=3, target_modules="all-linear")
    store = AdapterStore(attachment.shapes, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    slab = torch.randn(store.layout(3).numel, generator=generator, dtype=torch.float64)
    store.create("default", 3, 0.5, slab * 0.1)
    store.activate("default")
    attachment.binding.served = store.publish()

    walk = LayerWalk(model)
    hidden, calls, final = walk.plan(_ids())
    kept, x = [], hidden
    for call in calls:
        leaf = x.detach().requires_grad_()
        x = run_layer(call, leaf)
        kept.append((leaf, x))
    last = x.detach().requires_grad_()
    logits = walk.head(final(last))
    direction = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    (g,) = torch.autograd.grad(logits, last, direction)
    for leaf, out in reversed(kept):
        (g,) = torch.autograd.grad(out, leaf, g)

    entry = hidden.detach().requires_grad_()
    hook = calls[0].layer.register_forward_pre_hook(lambda _, args: (entry, *args[1:]))
    whole = model(_ids()).logits
    hook.remove()
    (reference,) = torch.autograd.grad(whole, entry, direction)
    torch.testing.assert_close(logits, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(g, reference, rtol=1e-10, atol=1e-12)


def test_check_refuses_a_model_that_computes_otherwise_as_a_whole(
    llama: tf.PreTrainedModel,
) -> None:
    class Odd(tf.LlamaForCausalLM):
        """Scales its logits, but not those that its head gives for the walk."""

        def forward(self, *args: object, **kwargs: object) -> object:
            output = super().forward(*args, **kwargs)
            if "inputs_embeds" not in kwargs:
                output.logits = output.logits * 1.01
            return output

    llama.__class__ = Odd
    with pytest.raises(ModelError, match="Odd run layer by layer differs from its own forward by 9.9e-03"):
        LayerWalk(llama).check(_ids())


def test_refuses_arithmetic_between_layers_and_head(llama: tf.PreTrainedModel) -> None:

    class Scaled(tf.LlamaModel):
        def forward(self, *args: object, **kwargs: object) -> object:
            output = super().forward(*args, **kwargs)
            output.last_hidden_state = output.last_hidden_state * 2
            return output

    llama.model.__class__ = Scaled
    with pytest.raises(ModelError, match="outside of modules"):
        LayerWalk(llama).plan(_ids())


def test_refuses_a_model_without_one_list_of_layers(llama: tf.PreTrainedModel) -> None:
    llama.model.draft = copy.deepcopy(llama.model.layers)
    with pytest.raises(ModelError, match="2 lists of decoder layers"):
        LayerWalk(llama)


def test_a_padding_mask_reaches_the_layers(llama: tf.PreTrainedModel) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]])
    walk = LayerWalk(llama)
    hidden, calls, final = walk.plan(_ids(), attention_mask=mask)
    for call in calls:
        hidden = run_layer(call, hidden)
    masked = llama(_ids(), attention_mask=mask).logits
    torch.testing.assert_close(walk.head(final(hidden)), masked, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(masked[:, -1], llama(_ids()).logits[:, -1])
