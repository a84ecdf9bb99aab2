"""Token losses in chunks against plain cross-entropy: values, first and second derivatives, tangents, precisions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.problems import normal
from torch.autograd import forward_ad
from transformers import AutoConfig, AutoModelForCausalLM

from lit_bilevel import SFT, losses
from lit_bilevel.data.collate import collate
from lit_bilevel.losses import OutputLayer, token_nll
from lit_bilevel.policy.head import Shape, head_shape
from lit_bilevel.policy.policy import Policy
from lit_bilevel.training.evaluation import Evaluation
from lit_bilevel.types import Example

K, V, D = 11, 13, 5
LAYERS = [Shape(), Shape(0.25), Shape(1.0, 2.0), Shape(3.0, 4.0)]


@pytest.fixture
def in_chunks(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 4 * V)


def inputs(*, bias: bool = True, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Hidden states, output layer and bias, as leaves."""
    values = [normal(K, D, seed=1), normal(V, D, seed=2), normal(V, seed=3)]
    return [value.to(dtype).requires_grad_() for value in values[: 3 if bias else 2]]


TARGETS = torch.randint(V, (K,), generator=torch.Generator().manual_seed(4))
SLOPES = normal(K, seed=5)


def plain(hidden, weight, bias=None, shape=LAYERS[0], temperature=1.0):
    """The definition."""
    logits = F.linear(hidden, weight, bias).to(torch.promote_types(hidden.dtype, torch.float32)) * shape.scale
    if shape.cap is not None:
        logits = shape.cap * torch.tanh(logits / shape.cap)
    return F.cross_entropy(logits / temperature, TARGETS, reduction="none")


def chunked(hidden, weight, bias=None, shape=LAYERS[0], temperature=1.0):
    return token_nll(hidden, OutputLayer(weight, bias, *shape), TARGETS, temperature)


@pytest.mark.parametrize("shape", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunks_change_no_loss_and_no_gradient(in_chunks, shape, bias, temperature):
    values = inputs(bias=bias)
    arguments = {"shape": shape, "temperature": temperature}
    expected, found = plain(*values, **arguments), chunked(*values, **arguments)
    assert (found - expected).abs().max() < 1e-12
    with torch.no_grad():
        assert (chunked(*values, **arguments) - expected).abs().max() < 1e-12
    pairs = zip(*(torch.autograd.grad((nll * SLOPES).sum(), values) for nll in (found, expected)), strict=True)
    assert all((a - b).abs().max() < 1e-12 for a, b in pairs)


@pytest.mark.parametrize("shape", LAYERS)
def test_second_derivatives_are_those_of_the_definition(in_chunks, shape):
    values = inputs()
    products = []
    for function in (plain, chunked):
        nll = function(*values, shape=shape)
        gradient = torch.autograd.grad((nll * SLOPES).sum(), values, create_graph=True)
        assert all(part.requires_grad for part in gradient)
        products.append(torch.autograd.grad(sum((g * g.detach().cos()).sum() for g in gradient), values))
    assert all((a - b).abs().max() < 1e-11 for a, b in zip(*products, strict=True))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")  # torch, of the rules that it loads, from 2.14 on
def test_forward_mode_gives_the_tangent_and_never_drops_it(in_chunks):
    values = [value.detach() for value in inputs()]
    direction = [normal(*value.shape, seed=10 + i) for i, value in enumerate(values)]
    jacobian = torch.autograd.functional.jacobian(plain, tuple(values))
    expected = sum((j * d).flatten(1).sum(1) for j, d in zip(jacobian, direction, strict=True))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(v, d) for v, d in zip(values, direction, strict=True)]
        with torch.no_grad():
            tangent = forward_ad.unpack_dual(chunked(*duals)).tangent
        assert (tangent - expected).abs().max() < 1e-12
        duals = [forward_ad.make_dual(v.requires_grad_(), d) for v, d in zip(values, direction, strict=True)]
        with pytest.raises(RuntimeError, match="forward mode"):
            chunked(*duals)


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_inputs_get_no_gradient(in_chunks, frozen):
    values = inputs()
    values[frozen].requires_grad_(False)
    chunked(*values).sum().backward()
    assert values[frozen].grad is None
    assert all(value.grad is not None for i, value in enumerate(values) if i != frozen)


def test_losses_of_a_bfloat16_policy_are_float32(in_chunks):
    values = inputs(dtype=torch.bfloat16)
    found, expected = chunked(*values), plain(*values)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-6
    gradients = [torch.autograd.grad((nll * SLOPES.float()).sum(), values) for nll in (found, expected)]
    for a, b in zip(*gradients, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - b).abs().max() < 2e-2 * b.abs().max()


def test_autocast_changes_nothing_by_chunks(in_chunks, monkeypatch):
    values = inputs(dtype=torch.float32)
    found = []
    for elements in (4 * V, 1 << 20):
        monkeypatch.setattr(losses, "CHUNK_ELEMENTS", elements)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            nll = chunked(*values)
        found.append((nll, *torch.autograd.grad((nll * SLOPES.float()).sum(), values)))
    for a, b in zip(*found, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() < 2e-2 * b.abs().max()


# ---- the output layers of real architectures ----

COMMON = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": ({}, Shape()),
    "gpt_neox": ({}, Shape()),
    "phi": ({}, Shape()),  # its output layer has a bias
    "gemma2": ({"final_logit_softcapping": 3.0}, Shape(1.0, 3.0)),
    "cohere": ({"logit_scale": 0.0625}, Shape(0.0625)),
    "granite": ({"logits_scaling": 8.0}, Shape(0.125)),
}


def model_of(name: str, **settings):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **COMMON, **settings)).double()


@pytest.mark.parametrize("name", list(MODELS))
def test_response_positions_alone_go_through_the_output_layer_of(name, in_chunks):
    settings, shape = MODELS[name]
    policy = Policy(model_of(name, **settings))
    assert policy.head_shape == shape
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 40, (n,), generator=draw).tolist() for n in (9, 6, 12)]
    batch = collate([Example(i, 0, tokens, 3) for i, tokens in enumerate(ids)], 3)
    nll = policy(batch)
    logits = policy.model(input_ids=batch.input_ids_ST, use_cache=False).logits.flatten(0, 1)[batch.position_K]
    expected = F.cross_entropy(logits, batch.target_K, reduction="none")
    assert (nll - expected).abs().max() < 1e-5  # some of these round to float32 inside
    parameters = policy.trainable()
    gradients = [torch.autograd.grad(n.mean(), parameters, allow_unused=True) for n in (nll, expected)]
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).abs().max() < 1e-4


def test_an_output_layer_that_is_not_known_is_left_to_the_model():
    model = model_of("gemma2", final_logit_softcapping=3.0)
    model.config.final_logit_softcapping = None
    hidden = model.register_forward_hook(lambda _m, _i, output: output.__setitem__("logits", output.logits.tanh()))
    assert head_shape(model) is None
    hidden.remove()
    assert head_shape(model) == Shape()


def test_a_step_before_the_output_layer_is_left_to_the_model():
    model = model_of("llama")
    doubled = model.lm_head.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 2,))
    assert head_shape(model) is None
    doubled.remove()
    assert head_shape(model) == Shape()


def test_a_cap_that_does_not_bite_yet_is_found():
    """Logits of 3 under a cap of 60 are as without it; those of a trained model will not be."""
    model = model_of("llama")
    ids = torch.arange(4)[None]
    assert model(ids).logits.abs().max() < 9
    model.register_forward_hook(lambda _m, _i, output: output.__setitem__("logits", 60 * (output.logits / 60).tanh()))
    assert head_shape(model) is None


def test_masked_logits_are_left_to_the_model():
    """A vocabulary entry at −∞ must not make every difference count as within the tolerance."""

    def masked(_module, _inputs, output):
        output.logits = output.logits.tanh().index_fill(-1, torch.tensor([3]), -torch.inf)
        return output

    model = model_of("gemma2", final_logit_softcapping=None)
    model.register_forward_hook(masked)
    assert head_shape(model) is None


def test_a_mean_is_over_all_rows_or_not_a_number():
    batch = collate([Example(row, 0, [1, 2, 3], 1) for row in range(2)], 2)
    metrics = Evaluation(SFT(), SFT())("test", lambda batch: torch.tensor([1.0, 1.0, 1.0, torch.nan]), batch)
    assert all(metric.compute().isnan() for metric in metrics.values())


def test_a_mean_keeps_its_digits_in_a_bfloat16_module():
    batch = collate([Example(row, 0, [1, 2, 3], 1) for row in range(2)], 2)
    evaluation = Evaluation(SFT(), SFT()).to(torch.bfloat16)
    for _ in range(1000):
        metrics = evaluation("test", lambda batch: torch.full((4,), 3.5), batch)
    assert all(metric.compute() == 3.5 for metric in metrics.values())
    assert evaluation.to(torch.float64).test_loss.mean_value.dtype == torch.float64
