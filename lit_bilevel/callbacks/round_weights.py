"""Writes what every response of a round weighs at its end, under each rule, for `lit-bilevel inspect` to judge them.

When a round begins all ratios are 1, so rules of ratios differ only after some steps. One pass over the responses that
are trained on tells what they have come to, under the run's own rule and under the others. On the first process,
without gradients or random numbers. Left out: `Aligned`, which needs derivatives; its weights exist in training alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer

from lit_bilevel.callbacks.run import run_folder
from lit_bilevel.data.collate import collate
from lit_bilevel.inspection.folder import Inspection
from lit_bilevel.module import LitBilevel
from lit_bilevel.policy.logprobs import response_logprobs
from lit_bilevel.refinement.consensus import Agreement
from lit_bilevel.refinement.response_weights import LengthNormalised, Ratios, SelfNormalised, SequenceRatio, TokenRatio
from lit_bilevel.training.trainer import data_of, policy_of
from lit_bilevel.types import Example

if TYPE_CHECKING:
    from lit_bilevel.data.module import BilevelDataModule

ROWS = 32  # in a pass


def write_round_weights(trainer: Trainer, module: LitBilevel) -> None:
    """Add a line for every response of the current round to `inspection/response_weights.jsonl`."""
    store = data_of(trainer).responses
    files = Inspection(run_folder(trainer) / "inspection")
    earlier = [known for known in files.response_weights() if known["round"] < store.source]
    with trainer.precision_plugin.forward_context():
        files.write("response_weights.jsonl", [*earlier, *_records(module, data_of(trainer))])


def _records(module: LitBilevel, data: BilevelDataModule) -> Iterator[dict[str, Any]]:
    store, pool = data.responses, data.sets["pool"].select_columns(["input_ids", "response_start"])
    rows, group_M = module.refinement.table()
    own = module.refinement.rule
    rules = [TokenRatio(), SequenceRatio(), LengthNormalised(), SelfNormalised(), Agreement()]
    rules = [rule for rule in rules if type(rule) is not type(own)] + ([] if own.needs_alignment else [own])
    for start in range(0, len(rows), ROWS):
        chosen = rows[start : start + ROWS].tolist()
        table = pool[chosen]
        pairs = zip(chosen, table["input_ids"], table["response_start"], strict=True)
        examples = [Example(row, 0, ids, first) for row, ids, first in pairs]
        groups = [example for example in store.overlay(examples, len(pool)) if example.group is not None]
        batch = collate(groups, len(groups)).to(module.device)
        generated = batch.generated
        assert generated is not None
        log_ratio_J = (response_logprobs(policy_of(module), batch) - generated.logprob_J).double()
        grouping = (generated.response_J, generated.example_R, batch.size)
        ratios = Ratios(log_ratio_J, *grouping, agreement_R=generated.agreement_R)
        weights = {
            type(rule).__name__: (ratios.sums(rule.weigh(ratios)[0].double()) / ratios.length_R).tolist()
            for rule in rules
        }
        counts: dict[int, int] = {}
        for number, index in enumerate(generated.example_R.tolist()):
            row = chosen[index]
            counts[row] = counts.get(row, -1) + 1
            by_rule = {name: values[number] for name, values in weights.items()}
            by_rule["group"] = float(group_M[start + index])
            yield {"round": store.source, "row": row, "used": counts[row], "weights": by_rule}
