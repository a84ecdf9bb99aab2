"""Packed rows give what padded ones do: losses, gradients, scores of every solver, whole runs; or they are refused."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from packaging.version import Version
from support import policies, ranks
from support.files import TOY
from support.policies import EVERY_SOLVER, ROWS, UPPER_WEIGHT, distance, flat, made, replays_dropout, tiny_policy
from support.refining import refine_all
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    Qwen3Config,
)

from lit_bilevel.data.collate import collate
from lit_bilevel.data.layout import Layout, layout_for
from lit_bilevel.errors import UserError
from lit_bilevel.losses import example_nll
from lit_bilevel.policy.policy import Policy
from lit_bilevel.types import Example, Group, Response

COMMON = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
COMMON |= {"initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = COMMON | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
EXACT = {
    "llama": lambda: LlamaConfig(**LLAMA),
    "gpt_neox": lambda: GPTNeoXConfig(**COMMON, intermediate_size=48, hidden_dropout=0.0, attention_dropout=0.0),
    "qwen3": lambda: Qwen3Config(**LLAMA, head_dim=16),
    "sliding": lambda: MistralConfig(**LLAMA, sliding_window=4),
}
LEAKING = {
    "positions ignored": lambda: OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64),
    "no positions": lambda: BloomConfig(vocab_size=40, hidden_size=32, n_layer=2, n_head=2),
    "no attention": lambda: MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2),
    "convolution": lambda: Lfm2Config(**LLAMA, layer_types=["conv", "full_attention"]),
}


def policy_of(config) -> Policy:
    """A random model in float64 throughout."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if type(module).__name__.endswith("RMSNorm"):  # it rounds to float32, whatever the model's precision
                setattr(parent, name, nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon))
    return Policy(model.double()).train()


def examples() -> list[Example]:
    """Rows of 3 to 21 tokens, one with two turns to learn, one with a group of responses."""
    generator = torch.Generator().manual_seed(1)
    lengths = [21, 3, 9, 20, 4, 12, 6]
    rows = [torch.randint(1, 40, (length,), generator=generator).tolist() for length in lengths]
    group = Group((Response([5, 6, 7], [-1.0] * 3, True), Response([8], [-2.0], True)), 2.0, 1.0)
    return [
        *(Example(row, 0, ids, 2) for row, ids in enumerate(rows)),
        Example(7, 0, rows[0], 15, earlier=[3, 4]),
        Example(8, 0, rows[2], 9, group),
    ]


def losses_and_gradients(policy: Policy, **layout) -> tuple[torch.Tensor, torch.Tensor]:
    """[B] losses and [B, everything] gradients, one backward pass an example."""
    batch = collate(examples(), 9, **layout)
    loss_B = example_nll(policy(batch), batch)
    gradients = [torch.autograd.grad(loss, policy.trainable(), retain_graph=True) for loss in loss_B]
    return loss_B.detach(), torch.stack([flat(gradient) for gradient in gradients])


@pytest.mark.parametrize(("attention", "tolerance"), [("sdpa", 1e-10), ("eager", 1e-6)])  # its softmax is float32
@pytest.mark.parametrize("name", EXACT)
def test_losses_and_gradients_are_those_of_padded_rows(name, attention, tolerance):
    config = EXACT[name]()
    config._attn_implementation = attention
    policy = policy_of(config)
    padded = losses_and_gradients(policy)
    for width in (0.0, math.inf):
        for found, expected in zip(losses_and_gradients(policy, pack_width=width), padded, strict=True):
            assert distance(found, expected) < tolerance
    policy.head_shape = None  # the model's own logits
    assert distance(losses_and_gradients(policy, pack_width=0.0)[0], padded[0]) < tolerance
    assert padded[1].abs().max() > 0.1


@pytest.mark.parametrize("width", [0.0, 30.0, math.inf])
def test_every_token_has_one_place(width):
    batch = collate(examples(), 9, pack_width=width)
    packing, lengths = batch.packing, [21, 3, 9, 20, 4, 12, 6, 21, 12, 10]
    ids, offsets = packing.input_ids_PW.flatten(), packing.offset_PW.flatten()
    assert torch.equal(ids[packing.position_K], batch.input_ids_ST.flatten()[batch.position_K])
    assert torch.equal(offsets[packing.position_K], batch.position_K % batch.input_ids_ST.shape[1])
    assert int((ids != 0).sum()) == sum(lengths)
    assert len(packing.input_ids_PW) == {0.0: 6, 30.0: 4, math.inf: 1}[width]
    assert batch.computed_tokens == ids.numel() <= sum(lengths) * 1.1
    if width == math.inf:
        assert batch.computed_tokens == sum(lengths)
    moved = batch.map(lambda tensor: tensor + 1)
    assert torch.equal(moved.packing.offset_PW, packing.offset_PW + 1)
    assert torch.equal(moved.generated.token_J, batch.generated.token_J + 1)


# ---- solvers and runs ----


@pytest.mark.parametrize("size", [ROWS, 3])
@pytest.mark.parametrize("solver", EVERY_SOLVER)
def test_solvers_give_the_same_scores_and_gradients(monkeypatch, solver, size):
    found = []
    for width in (None, 0.0):
        monkeypatch.setattr(policies, "collate", partial(collate, pack_width=width))
        policy = tiny_policy()
        problem = made(policy, size)
        score_B = EVERY_SOLVER[solver]()(problem)
        problem.backward()
        found.append((score_B, flat([parameter.grad for parameter in policy.trainable()])))
    tolerance = 1e-6 if solver == "one_sided" else 1e-9  # rounding over a small step
    for a, b in zip(*found, strict=True):
        assert distance(a, b) < tolerance * b.abs().max()


def test_dropout_is_replayed(monkeypatch):
    monkeypatch.setattr(policies, "collate", partial(collate, pack_width=0.0))
    replays_dropout(3, UPPER_WEIGHT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packing")
    ranks.save_model(folder / "model")
    for name, size in {"pool": 60, "validation": 30}.items():
        lines = (TOY / f"{name}.jsonl").read_text().splitlines(keepends=True)[:size]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


@pytest.mark.filterwarnings("ignore:.*ModelCheckpoint.*")
@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize("solver", ["OneStep", "Penalty"])
def test_a_run_ends_with_the_same_weights_and_policy(folder, tmp_path, solver, refined):
    case = {"strategy": "auto", "model": str(folder / "model"), "folder": str(tmp_path), "precision": "64-true"}
    case |= {name: str(folder / f"{name}.jsonl") for name in ("pool", "validation")}
    case |= {"solver": solver, "rows": 4, "accumulate": 2, "steps": 8}
    found = []
    for packing in (False, True):
        callbacks = [refine_all()] if refined else None
        module, _ = ranks.fitted(case | {"packing": packing}, callbacks)
        assert module.policy.isolated is packing
        assert module.refinement.active is refined
        found.append([module.weights.table(), flat(module.policy.trainable()).detach()])
        if refined:
            found[-1].append(module.refinement.table()[1])
    assert all(distance(a, b) < 1e-9 for a, b in zip(*found, strict=True))
    assert found[0][0].std() > 0.01


# ---- layouts and refusals ----


def test_layouts():
    def trainer(strategy, any_length=False):
        policy = SimpleNamespace(takes_any_length=any_length)
        return SimpleNamespace(strategy=strategy, lightning_module=SimpleNamespace(policy=policy))

    one = SingleDeviceStrategy("cpu")
    assert layout_for(None, False) == layout_for(trainer(ModelParallelStrategy()), False) == Layout(math.inf, None)
    assert layout_for(trainer(one), False) == Layout(256, None)
    assert layout_for(trainer(one), True) == layout_for(None, True) == Layout(math.inf, 0.0)
    assert layout_for(trainer(one, any_length=True), True) == Layout(math.inf, math.inf)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LEAKING)
def test_models_that_do_not_keep_sequences_apart_are_refused(name):
    torch.manual_seed(0)
    policy = Policy(AutoModelForCausalLM.from_config(LEAKING[name]()))
    policy(collate(examples(), 9))
    kind = type(policy.model).__name__
    for _ in range(2):
        with pytest.raises(UserError, match=rf"`data.packing` is true, but `{kind}` with .* set `data.packing: false`"):
            policy(collate(examples(), 9, pack_width=0.0))


def test_a_policy_that_looks_at_nothing_proves_nothing():
    policy = policy_of(EXACT["llama"]())
    for layer in policy.model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
    with pytest.raises(UserError, match="was not found to keep packed sequences apart"):
        policy(collate(examples(), 9, pack_width=0.0))


def test_an_attention_without_masks_is_refused(monkeypatch):
    policy = policy_of(EXACT["llama"]())
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    with pytest.raises(UserError, match="`LlamaForCausalLM` with `sdpa` attention"):
        policy(collate(examples(), 9, pack_width=0.0))


class FlashInPython:
    """The two kernels of flash-attention-2 as plain sums, behind transformers' own code that chooses between them."""

    def __init__(self):
        self.lengths: list[int] = []

    def functions(self, *_, **__):
        """In the place of the package."""

        def settings(softmax_scale, **_):
            return {"scale": softmax_scale}

        return (self.fixed, self.varlen, None, None, None), (settings, settings)

    def fixed(self, query, key, value, scale):
        """[S, T, heads, width], causal."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale).transpose(
            1, 2
        )

    def varlen(self, query, key, value, cu_seqlens_q, cu_seqlens_k, scale):
        """[tokens, heads, width], causal inside each sequence."""
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        self.lengths = cu_seqlens_q.diff().tolist()
        parts = zip(*(x.split(self.lengths) for x in (query, key, value)), strict=True)
        return torch.cat([self.fixed(*(x[None] for x in part), scale)[0] for part in parts])


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="stands in for a private function")
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen3"])
def test_one_row_goes_through_the_kernel_for_any_length(monkeypatch, name):
    kernels = FlashInPython()
    policy = policy_of(EXACT[name]())
    padded = losses_and_gradients(policy)
    monkeypatch.setattr("transformers.modeling_flash_attention_utils.lazy_import_flash_attention", kernels.functions)
    policy.model.config._attn_implementation = "flash_attention_2"
    assert policy.takes_any_length
    for found, expected in zip(losses_and_gradients(policy, pack_width=math.inf), padded, strict=True):
        assert distance(found, expected) < 1e-10
    assert sorted(kernels.lengths) == [3, 4, 6, 9, 10, 12, 12, 20, 21, 21]
    policy.isolated = False
    monkeypatch.setattr("transformers.modeling_flash_attention_utils._is_packed_sequence", lambda *_: False)
    with pytest.raises(UserError, match="with `flash_attention_2` attention"):
        policy(collate(examples(), 9, pack_width=math.inf))


def test_the_output_layer_is_found_without_kernels_of_a_gpu(monkeypatch):
    model = policy_of(EXACT["llama"]()).model
    monkeypatch.delattr("transformers.modeling_flash_attention_utils.lazy_import_flash_attention")
    model.config._attn_implementation = "flash_attention_2"
    assert Policy(model).head_shape == (1.0, None)
    assert Policy(model).takes_any_length


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EXACT)
def test_isolation_is_found_in_any_precision(name, dtype):
    config = EXACT[name]()
    config.initializer_range = 0.02
    torch.manual_seed(0)
    policy = Policy(AutoModelForCausalLM.from_config(config).to(dtype)).train()
    policy(collate(examples(), 9, pack_width=0.0))
    assert policy.isolated
    assert policy.training
