"""Measures rows by passes of a policy, with their prompts and without.

    features = Measure(policy, opening_of(tokenizer), tokenizer.eos_token_id)(examples, responses)

Two forward passes in batches of like length; the first also gives entropies. Token losses are brought to the CPU and
summed there in float64, so a row's numbers do not depend on the order of anything. Left out: gradients.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from lit_bilevel.data.collate import collate
from lit_bilevel.policy.policy import Policy
from lit_bilevel.scores.columns import FEATURES
from lit_bilevel.scores.hidden import NUMBERS, last_states
from lit_bilevel.scores.opening import has_prompt, last_response, without_prompt
from lit_bilevel.types import Example

FIRST = 3
"""Tokens that `first_loss` looks at."""


class Measure:
    """Measures rows under a policy.

    Args:
        policy: any policy; dropout is off while it is asked.
        opening: token ids that a response without a prompt follows.
        end_token: id of the token that ends a response which was not cut.
        batch_size: most rows in a call of the policy.
        call_cost: how many tokens' computation one more call is worth saving.
    """

    def __init__(
        self,
        policy: Policy,
        opening: list[int],
        end_token: int,
        batch_size: int = 64,
        call_cost: float = math.inf,
    ):
        self.policy, self.opening, self.end_token = policy, opening, end_token
        self.batch_size, self.call_cost = batch_size, call_cost

    def __call__(
        self,
        examples: Sequence[Example],
        responses: Sequence[str],
        counted: Callable[[int], object] = lambda tokens: None,
    ) -> np.ndarray:
        """[n, F] float32 numbers, in the order of `FEATURES` and then those of `hidden.py`; NaN where a row has none.

        Args:
            examples: the rows.
            responses: their responses as text.
            counted: told how many more tokens went through the policy, padding not among them.
        """
        examples = [last_response(example) for example in examples]
        prompted = [index for index, example in enumerate(examples) if has_prompt(example)]
        scores: list[dict[str, float]] = [{} for _ in examples]
        hidden = np.full((len(examples), NUMBERS), math.nan, dtype=np.float32)
        with self.policy.evaluating():
            for index, nll, entropy, state in self._pass(examples, counted):
                if state is not None:
                    hidden[index] = state
                ended = examples[index].input_ids[-1] == self.end_token
                scores[index] = {
                    "loss": nll.mean(),
                    "end_loss": nll[-1] if ended else math.nan,
                    "entropy": entropy.mean(),
                    "loss_before_end": _before_end(nll, ended),
                    "first_loss": nll[:FIRST].mean(),
                    "largest_loss": nll.max(),
                }
            alone = [without_prompt(examples[index], self.opening) for index in prompted]
            for number, nll, *_ in self._pass(alone, counted, states=False):
                ended = alone[number].input_ids[-1] == self.end_token
                scores[prompted[number]]["loss_without_prompt"] = nll.mean()
                scores[prompted[number]]["loss_before_end_without_prompt"] = _before_end(nll, ended)
        for own, example, response in zip(scores, examples, responses, strict=True):
            own |= {"length": example.response_length, "prompt_length": example.response_start}
            own["compressed"] = compress(response)
        measured = np.array([[own.get(name, math.nan) for name in FEATURES] for own in scores], dtype=np.float32)
        return np.hstack([measured, hidden])

    def _pass(
        self, examples: Sequence[Example], counted: Callable[[int], object], states: bool = True
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray | None]]:
        """Index of every example, NLL and entropy of its predicted tokens, and its last state, if wanted and known."""
        device = next(self.policy.parameters()).device
        order = sorted(range(len(examples)), key=lambda index: len(examples[index].input_ids))
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            rows = [replace(examples[index], row=number) for number, index in enumerate(indices)]
            batch = collate(rows, len(rows), self.call_cost)
            nll_K, entropy_K, hidden_KD = self.policy.predictions(batch.to(device))
            segment = batch.segment_K.numpy()
            tokens = segment.argsort(kind="stable")
            ends = np.bincount(segment).cumsum()
            both = [values_K.cpu().double().numpy() for values_K in (nll_K, entropy_K)]
            last: Sequence[np.ndarray | None] = [None] * len(rows)
            if states and hidden_KD is not None:
                last_B = torch.from_numpy(tokens[ends - 1]).to(hidden_KD.device)
                last = list(last_states(hidden_KD, last_B).cpu().numpy())
            yield from zip(indices, *(np.split(v[tokens], ends[:-1]) for v in both), last, strict=True)
            counted(sum(len(row.input_ids) for row in rows))


def compress(text: str) -> float:
    """Size of a text under zlib over its size; above 1 for short ones, small for text that repeats itself."""
    data = text.encode()
    return len(zlib.compress(data, 9)) / max(len(data), 1)


def _before_end(nll: np.ndarray, ended: bool) -> float:
    return float(nll[:-1].mean() if ended and len(nll) > 1 else nll.mean())
