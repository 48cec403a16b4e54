"""Adapted linears: the model's function and parameters, every gradient, versions, and what is refused."""

import copy
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from ogpstream.learner.binding import Binding, GradientSink
from ogpstream.learner.errors import ConfigError, ModelError, StateError
from ogpstream.learner.sites import AdaptedLinear, Attachment, attach
from ogpstream.memory.adapters import AdapterStore
from ogpstream.memory.experts import Held
from ogpstream.memory.served import Served

TinyModel = Callable[..., tf.PreTrainedModel]


@pytest.fixture(params=["llama", "qwen3", "mistral", "gemma", "gpt2"])
def model(request: pytest.FixtureRequest, tiny_model: TinyModel) -> tf.PreTrainedModel:
    return tiny_model(request.param, dtype=torch.float64)


@pytest.fixture
def llama(tiny_model: TinyModel) -> tf.PreTrainedModel:
    """48 wide, its MLP 80, its keys and values 24."""
    return tiny_model("llama", dtype=torch.float64)


def _ids() -> Tensor:
    return torch.randint(4, 101, (2, 7), generator=torch.Generator().manual_seed(1))


def _serve(attachment: Attachment, seed: int = 2) -> AdapterStore:
    """Two active experts of ranks 3 and 2 with gates 1 and 0.75; "default" has a held part of rank 2."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return 0.1 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    store = AdapterStore(attachment.shapes, dtype=torch.float64)
    store.create("default", 3, 0.5, normal(store.layout(3).numel))
    store.create("other", 2, 2.0, normal(store.layout(2).numel))
    store.expert("default").held = [Held(normal(s.d_in, 2), normal(2, s.d_out)) for s in attachment.shapes]
    store.activate("other", 0.75)
    store.activate("default", 0.25)
    attachment.binding.served = store.publish()
    return store


class _Plus(nn.Module):
    """A parametrised weight W + delta."""

    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta


def _plain(
    model: tf.PreTrainedModel, attachment: Attachment, store: AdapterStore
) -> tuple[nn.Module, Tensor]:
    """A bare copy with the weights W + sum_e gate_e delta_e, and the slab of "default" as a leaf."""
    bare = copy.deepcopy(model)
    leaf = store.expert("default").factors.clone().requires_grad_()
    for site in attachment.sites:
        delta: Tensor = torch.zeros(site.shape.d_in, site.shape.d_out, dtype=torch.float64)
        for name, gate in store.active.items():
            expert = store.expert(name)
            slab = leaf if name == "default" else expert.factors
            a, b = expert.layout.a(slab, site.index), expert.layout.b(slab, site.index)
            held = expert.held[site.index]
            delta = delta + gate * (expert.scaling * a @ b + held.U @ held.V)
        linear = bare.get_submodule(site.name)
        turned = delta if type(linear) is Conv1D else delta.T
        parametrize.register_parametrization(linear, "weight", _Plus(turned), unsafe=True)
    return bare, leaf


def test_attach_and_detach_leave_the_model_as_it_was(model: tf.PreTrainedModel) -> None:
    model.train()
    model.get_input_embeddings().weight.requires_grad_(False)

    def inventory() -> tuple[object, object]:
        modules = [
            (name, id(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m.__dict__))
            for name, m in model.named_modules()
        ]
        return modules, [(n, id(p), p.requires_grad, p._version) for n, p in model.named_parameters()]

    before, state = inventory(), {k: v.clone() for k, v in model.state_dict().items()}
    parameters = {id(p) for p in model.parameters()}
    random_state = torch.get_rng_state()
    attachment = attach(model, rank=3, target_modules="all-linear")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {id(p) for p in model.parameters()} == parameters
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    _serve(attachment)
    model(_ids())
    attachment.detach()
    attachment.detach()
    assert inventory() == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_nothing_served_is_the_base_model(model: tf.PreTrainedModel) -> None:
    reference = model(_ids()).logits
    attachment = attach(model, rank=3)
    assert torch.equal(model(_ids()).logits, reference)
    attachment.binding.served = AdapterStore(attachment.shapes, dtype=torch.float64).publish()
    assert torch.equal(model(_ids()).logits, reference)


def test_sites_and_their_shapes(model: tf.PreTrainedModel) -> None:
    linears = {
        name: (m.weight.shape if isinstance(m, Conv1D) else m.weight.T.shape)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear | Conv1D) and name != "lm_head"
    }
    attachment = attach(model, rank=3, target_modules="all-linear")
    assert {s.name: (s.d_in, s.d_out) for s in attachment.shapes} == {k: tuple(v) for k, v in linears.items()}
    assert [site.index for site in attachment.sites] == list(range(len(linears)))
    assert all(model.get_submodule(site.name) is site.module for site in attachment.sites)
    assert not any(site.module._forward_pre_hooks for site in attachment.sites)
    assert set(attachment.target_modules) == {name.rpartition(".")[2] for name in linears}


def _check_gradients(model: tf.PreTrainedModel, bare: tf.PreTrainedModel, attachment: Attachment) -> None:
    store = _serve(attachment)
    layout = store.layout(3)
    plain, leaf = _plain(bare, attachment, store)
    sink = GradientSink(layout, "default", dtype=torch.float64)
    attachment.binding.sinks = (sink,)
    embedded = bare.get_input_embeddings()(_ids()).detach()
    ours, theirs = embedded.clone().requires_grad_(), embedded.clone().requires_grad_()
    logits, reference = model(inputs_embeds=ours).logits, plain(inputs_embeds=theirs).logits
    torch.testing.assert_close(logits, reference, rtol=1e-12, atol=1e-12)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (dx,) = torch.autograd.grad(logits, ours, direction)
    dx_reference, slab_reference = torch.autograd.grad(reference, (theirs, leaf), direction)
    compared = {"dx": (dx, dx_reference)}
    for index, site in enumerate(attachment.sites):
        for name, part in (("dA", layout.a), ("dB", layout.b)):
            compared[f"{name} of {site.name}"] = (part(sink.slab, index), part(slab_reference, index))
    for name, (got, expected) in compared.items():
        assert expected.norm() > 0, name
        error = ((got - expected).norm() / expected.norm()).item()
        assert error <= 1e-9, f"{name}: {error:.1e}"


def test_gradients_of_every_factor_equal_autograd(model: tf.PreTrainedModel) -> None:
    bare = copy.deepcopy(model)
    _check_gradients(model, bare, attach(model, rank=3, target_modules="all-linear"))


def test_gradients_of_the_head_and_of_a_layer_used_twice(llama: tf.PreTrainedModel) -> None:
    llama.model.layers[1] = llama.model.layers[0]
    bare = copy.deepcopy(llama)
    attachment = attach(llama, rank=3, target_modules=["lm_head", "v_proj"])
    assert [site.name for site in attachment.sites] == ["model.layers.0.self_attn.v_proj", "lm_head"]
    _check_gradients(llama, bare, attachment)


@pytest.fixture
def linear(llama: tf.PreTrainedModel) -> Iterator[tuple[AdaptedLinear, Attachment, AdapterStore]]:
    attachment = attach(llama, rank=3, target_modules=["up_proj"])
    yield attachment.sites[0].module, attachment, _serve(attachment)


def test_gradients_are_added(linear: tuple[AdaptedLinear, Attachment, AdapterStore]) -> None:
    module, attachment, store = linear
    sink = GradientSink(store.layout(3), "default", dtype=torch.float64)
    attachment.binding.sinks = (sink,)
    x = torch.randn(5, 48, dtype=torch.float64, requires_grad=True)
    module(x).sum().backward()
    once = sink.slab.clone()
    assert once.abs().sum() > 0
    (module(x).sum() + module(x).sum()).backward()
    torch.testing.assert_close(sink.slab, 3 * once)


@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 3, 48), (0, 48)])
def test_any_leading_shape_with_and_without_gradients(
    linear: tuple[AdaptedLinear, Attachment, AdapterStore], shape: tuple[int, ...]
) -> None:
    module, attachment, store = linear
    x = torch.randn(shape, dtype=torch.float64)
    other, default = store.expert("other"), store.expert("default")
    expected = module.base_layer(x) + x @ (0.75 * other.delta(0) + 0.25 * default.delta(0))
    torch.testing.assert_close(module(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(module(x.clone().requires_grad_()), expected)
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert leaf.grad is not None and leaf.grad.shape == shape


def test_narrow_model_keeps_its_dtype(llama: tf.PreTrainedModel) -> None:
    llama.to(torch.bfloat16)
    attachment = attach(llama, rank=3, target_modules=["q_proj"])
    store = AdapterStore(attachment.shapes, serve_dtype=torch.bfloat16)
    store.create("default", 3, 1.0, torch.ones(store.layout(3).numel))
    store.activate("default")
    attachment.binding.served = store.publish()
    sink = GradientSink(store.layout(3), "default")
    attachment.binding.sinks = (sink,)
    x = torch.randn(4, 48, dtype=torch.bfloat16, requires_grad=True)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = attachment.sites[0].module(x)
    # x as it came and h [4, R], but no wider copy of x
    assert [(t.dtype, t.shape[-1]) for t in saved] == [(torch.bfloat16, 48), (torch.float32, 3)]
    assert saved[0].data_ptr() == x.data_ptr()
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad is not None and x.grad.dtype == torch.bfloat16
    assert sink.slab.dtype == torch.float32 and sink.slab.abs().sum() > 0


def test_an_expert_that_is_not_served_cannot_be_trained(
    linear: tuple[AdaptedLinear, Attachment, AdapterStore],
) -> None:
    module, attachment, store = linear
    attachment.binding.sinks = (GradientSink(store.layout(3), "absent", dtype=torch.float64),)
    with pytest.raises(StateError, match="'absent' is not in the served version"):
        module(torch.randn(2, 48, dtype=torch.float64, requires_grad=True))


def _versions(attachment: Attachment) -> list[Served]:
    return [_serve(attachment, seed).served for seed in (5, 6)]


def test_two_threads_serve_two_pinned_versions(llama: tf.PreTrainedModel) -> None:
    attachment = attach(llama, rank=3)
    binding, versions = attachment.binding, _versions(attachment)
    expected = []
    for served in (*versions, None):
        binding.served = served
        expected.append(llama(_ids()).logits)
    assert not torch.allclose(expected[0], expected[1])
    wrong: list[int] = []
    barrier = threading.Barrier(3)

    def serve(number: int, served: Served | None) -> None:
        barrier.wait()
        with binding.using(served), torch.no_grad():
            for _ in range(20):
                if not torch.equal(llama(_ids()).logits, expected[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=serve, args=(n, served)) for n, served in enumerate((*versions, None))]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for served in versions:
            binding.served = served
    assert not wrong


def test_a_forward_keeps_the_version_it_started_with(llama: tf.PreTrainedModel) -> None:
    attachment = attach(llama, rank=3)
    binding, (old, new) = attachment.binding, _versions(attachment)
    binding.served = old
    reference = llama(_ids()).logits

    def publish(module: nn.Module, args: object) -> None:
        binding.served = new

    handle = llama.model.layers[1].register_forward_pre_hook(publish)
    assert torch.equal(llama(_ids()).logits, reference)
    handle.remove()
    assert binding.current() is new
    assert not torch.equal(llama(_ids()).logits, reference)


def test_pins_nest_and_end_with_an_error(llama: tf.PreTrainedModel) -> None:
    attachment = attach(llama, rank=3)
    binding, (one, two) = attachment.binding, _versions(attachment)
    elsewhere = Binding(two)
    with binding.using(one):
        with binding.using(None), elsewhere.using(one):
            assert binding.current() is None
        assert binding.current() is one
        assert elsewhere.current() is two
    assert binding.current() is two
    with pytest.raises(IndexError):
        llama(torch.tensor([[10_000]]))
    binding.served = one
    assert binding.current() is one


def test_basis_groups(llama: tf.PreTrainedModel) -> None:
    attachment = attach(llama, rank=3, target_modules="all-linear")
    layer = {s.name.removeprefix("model.layers.1."): s.basis for s in attachment.shapes if ".1." in s.name}
    prefix = "model.layers.1."
    assert layer == {
        "self_attn.q_proj": f"{prefix}self_attn.q_proj",
        "self_attn.k_proj": f"{prefix}self_attn.q_proj",
        "self_attn.v_proj": f"{prefix}self_attn.q_proj",
        "self_attn.o_proj": f"{prefix}self_attn.o_proj",
        "mlp.gate_proj": f"{prefix}mlp.gate_proj",
        "mlp.up_proj": f"{prefix}mlp.gate_proj",
        "mlp.down_proj": f"{prefix}mlp.down_proj",
    }
    attachment.detach()
    shared = attach(llama, rank=3, target_modules="all-linear", basis_scope="shared")
    assert {(s.d_in, s.basis) for s in shared.shapes} == {(48, "d48"), (80, "d80")}


class _Quantised(nn.Linear):
    pass


def _quantise(model: tf.PreTrainedModel) -> None:
    layer = model.model.layers[1].self_attn
    layer.q_proj = _Quantised(48, 48, bias=False)


@pytest.mark.parametrize(
    ("options", "change", "error", "message"),
    [
        (
            {"target_modules": ["q_prj"]},
            None,
            ModelError,
            "set target_modules to some of down_proj, gate_proj",
        ),
        (
            {"target_modules": ["q_proj", "o_prj"]},
            None,
            ModelError,
            "no linear named o_prj: set target_modules",
        ),
        (
            {"target_modules": "*_proj"},
            None,
            ConfigError,
            r"target_modules '\*_proj' is no regular expression \(nothing to repeat.*set target_modules to some of",
        ),
        ({"target_modules": ["embed_tokens"]}, None, ModelError, "model.embed_tokens, a Embedding"),
        ({"target_modules": None}, _quantise, ModelError, "_Quantised"),
        ({"rank": 25}, None, ConfigError, "rank 25 exceeds a width of model.layers.0.self_attn.v_proj"),
        ({"basis_scope": "global"}, None, ConfigError, "set it to 'layer' or 'shared'"),
    ],
)
def test_refusals_leave_the_model_alone(
    llama: tf.PreTrainedModel,
    options: dict[str, object],
    change: Callable[[tf.PreTrainedModel], None] | None,
    error: type[Exception],
    message: str,
) -> None:
    if change:
        change(llama)
    before = [(name, id(m), sorted(m.__dict__)) for name, m in llama.named_modules()]
    flags = [(name, id(p), p.requires_grad) for name, p in llama.named_parameters()]
    with pytest.raises(error, match=message) as caught:
        attach(llama, **{"rank": 3, **options})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert [(name, id(m), sorted(m.__dict__)) for name, m in llama.named_modules()] == before
    assert [(name, id(p), p.requires_grad) for name, p in llama.named_parameters()] == flags


def test_refuses_a_second_adapter(llama: tf.PreTrainedModel) -> None:
    attachment = attach(llama, rank=3)
    with pytest.raises(ModelError, match="adapters of another learner"):
        attach(llama, rank=3)
    attachment.detach()
    get_peft_model(llama, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="merge_and_unload"):
        attach(llama, rank=3)


def test_an_architecture_without_defaults_is_told_apart() -> None:
    model = tf.Olmo2ForCausalLM(
        tf.Olmo2Config(
            vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )
    with pytest.raises(
        ModelError, match="no default targets for Olmo2ForCausalLM: set target_modules to some"
    ):
        attach(model, rank=3)


def test_a_copied_model_has_its_own_binding(llama: tf.PreTrainedModel) -> None:
    attachment = attach(llama, rank=3)
    _serve(attachment)
    twin = copy.deepcopy(llama)
    reference = twin(_ids()).logits
    torch.testing.assert_close(reference, llama(_ids()).logits)
    attachment.binding.served = None
    assert torch.equal(twin(_ids()).logits, reference)


def test_what_a_hook_on_the_linear_gives_is_not_written_to(llama: tf.PreTrainedModel) -> None:
    attachment = attach(llama, rank=3)
    _serve(attachment)
    site = attachment.sites[0]
    x = torch.randn(2, 5, site.shape.d_in, dtype=torch.float64)
    plain = site.module(x)
    kept = site.module.base_layer(x).clone()
    before = kept.clone()
    with site.module.base_layer.register_forward_hook(lambda module, args, output: kept):
        assert torch.equal(site.module(x), plain)
    assert torch.equal(kept, before) and not torch.equal(plain, before)
