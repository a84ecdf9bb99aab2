"""A random policy of two layers in float64, and plain autograd for what it answers."""

from __future__ import annotations

from functools import partial

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lit_bilevel import SFT, Implicit, OneStep, Penalty, ValueFunction
from lit_bilevel.data.collate import collate
from lit_bilevel.losses import example_nll
from lit_bilevel.policy.engine import Engine
from lit_bilevel.policy.policy import Policy
from lit_bilevel.policy.problem import PolicyProblem
from lit_bilevel.types import Example
from support.problems import normal

ROWS, UPPER_WEIGHT = 8, 0.3
WEIGHTS = normal(ROWS, seed=9).exp()


def tiny_policy(dropout: float = 0.0, rounding: bool = False) -> Policy:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        attention_dropout=dropout,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    for layer in [] if rounding else [model.model, *model.model.layers]:
        for name, module in layer.named_children():
            if isinstance(module, LlamaRMSNorm):  # it rounds to float32, whatever the model's precision
                setattr(layer, name, torch.nn.RMSNorm(16, eps=module.variance_epsilon))
    policy = Policy(model.double()).train()
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_("proj" in name)  # embeddings stay frozen, as a LoRA base would
    return policy


def batches(first: int, size: int) -> list:
    generator = torch.Generator().manual_seed(first)
    examples = []
    for row in range(ROWS):
        length = int(torch.randint(5, 11, (), generator=generator))
        ids = torch.randint(0, 40, (length,), generator=generator).tolist()
        examples.append(Example(row, row % 2, ids, 2 + row % 2))
    return [collate(examples[i : i + size], ROWS) for i in range(0, ROWS, size)]


ENGINE = Engine(backward=torch.Tensor.backward, unsynchronised=torch.enable_grad, average=lambda values: values)


def made(policy, size=ROWS, upper_weight=UPPER_WEIGHT, weigh=None, needs_loss=False, optimizer=None) -> PolicyProblem:
    policy.zero_grad()
    return PolicyProblem(
        policy,
        batches(1, size),
        batches(2, size),
        weigh or (lambda features: WEIGHTS[features.row_B]),
        needs_loss,
        upper_weight,
        optimizer or torch.optim.AdamW(policy.trainable(), lr=1e-3),
        ENGINE,
        (SFT(), SFT()),
    )


def reference(policy, level: int):
    """Losses and per-example gradients, [B] and [B, everything], one backward pass an example."""
    loss_B = example_nll(policy(batches(level, ROWS)[0]), batches(level, ROWS)[0])
    gradients = [torch.autograd.grad(loss, policy.trainable(), retain_graph=True) for loss in loss_B]
    return loss_B.detach(), torch.stack([flat(gradient) for gradient in gradients])


def flat(values) -> torch.Tensor:
    return torch.cat([value.flatten() for value in values])


def direction_of(policy, seed=3) -> list:
    return [normal(*parameter.shape, seed=seed + i) for i, parameter in enumerate(policy.trainable())]


def distance(left, right) -> float:
    return float((left - right).abs().max())


def replays_dropout(size: int, upper_weight: float) -> None:
    """Losses, gradients and derivatives along a direction see the masks that the first pass of a step drew."""
    policy = tiny_policy(dropout=0.3)
    assert policy.has_dropout
    earlier = made(policy, size, upper_weight)
    earlier.lower_losses()  # as a solver would
    earlier.backward()
    problem = made(policy, size, upper_weight)
    losses = problem.lower_losses()
    assert distance(losses, earlier.lower_losses()) > 1e-3  # another step draws other masks
    for _ in range(2):
        assert distance(problem.lower_losses_at(problem.values()), losses) < 1e-12
        assert distance(problem.lower_gradient_at(problem.values())[0], losses) < 1e-12
    direction, epsilon = direction_of(policy), 1e-6
    moved = [value + epsilon * part for value, part in zip(problem.values(), direction, strict=True)]
    back = [value - epsilon * part for value, part in zip(problem.values(), direction, strict=True)]
    difference = (problem.lower_losses_at(moved) - problem.lower_losses_at(back)) / (2 * epsilon)
    assert distance(problem.lower_jvp(direction), difference) < 1e-5 * max(1, float(difference.abs().max()))
    twice = [flat(problem.hessian_vector_product(direction)) for _ in range(2)]
    assert torch.equal(*twice)
    problem.backward()
    assert distance(problem.lower_losses(), losses) < 1e-12


EVERY_SOLVER = {
    "penalty": Penalty,
    "one_sided": partial(OneStep, "one_sided", epsilon=1e-6),
    "forward": partial(OneStep, "forward"),
    "value_function": partial(ValueFunction, inner_steps=2),  # at its first step φ is θ
    "implicit": partial(Implicit, iterations=2, damping=1.0),
}
