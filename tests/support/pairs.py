"""Preference pairs, a policy with an adapter that tells them apart, and DPO by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lit_bilevel import LoraSettings, PolicySettings
from lit_bilevel.policy.load import load_policy
from lit_bilevel.policy.policy import Policy
from lit_bilevel.types import Example
from support.problems import normal

ROWS, BETA = 6, 0.5

LORA = {"r": 2, "alpha": 4, "target_modules": ["query_key_value"]}


def adapted(model: str, moved: bool = True, dropout: float = 0.0) -> Policy:
    """A policy with an adapter; `moved` away from its start, where it changes nothing."""
    torch.manual_seed(0)
    policy = load_policy(PolicySettings(model, lora=LoraSettings(**LORA, dropout=dropout)), torch.float64)
    if moved:
        with torch.no_grad():
            for i, parameter in enumerate(policy.trainable()):
                parameter += 0.3 * normal(*parameter.shape, seed=i)
    return policy


def pairs(seed: int, row: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> list[int]:
        return torch.randint(0, 260, (int(torch.randint(low, high, (), generator=generator)),)).tolist()

    torch.manual_seed(seed)
    prompts = [draw(2, 6) for _ in range(ROWS)]
    return [
        Example(row + i, 0, prompt + draw(1, 6), len(prompt), rejected_ids=prompt + draw(1, 6))
        for i, prompt in enumerate(prompts)
    ]


def by_hand(policy: Policy, examples: list[Example], beta: float) -> torch.Tensor:
    """Equation 7 of arXiv 2305.18290 from the logits of transformers and peft, an example and an answer at a time."""

    def logprob(ids: list[int], start: int) -> torch.Tensor:
        logits = policy.model(input_ids=torch.tensor([ids])).logits[0]
        return sum(F.log_softmax(logits[t - 1], 0)[ids[t]] for t in range(start, len(ids)))

    found = []
    for example in examples:
        answers = (example.input_ids, example.rejected_ids)
        chosen, rejected = (logprob(ids, example.response_start) for ids in answers)
        with torch.no_grad(), policy.model.disable_adapter():
            chosen_ref, rejected_ref = (logprob(ids, example.response_start) for ids in answers)
        found.append(-F.logsigmoid(beta * ((chosen - chosen_ref) - (rejected - rejected_ref))))
    return torch.stack(found)
