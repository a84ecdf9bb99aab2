"""Writes `predictions.jsonl`: the policy's greedy answers to the test prompts, from `lit-bilevel predict`.

Left out: sampling; one answer a prompt that is the same at every run.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_bilevel.callbacks.run import is_rehearsal, module_of, run_folder
from lit_bilevel.data.table import column
from lit_bilevel.files import replace_text
from lit_bilevel.policy.context import context_of, room
from lit_bilevel.training.trainer import data_of, policy_of


class Predictions(Callback):
    """Writes what `predict` returns, in the order of the test file."""

    def __init__(self) -> None:
        self._answers: list[tuple[int, dict[str, str]]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._answers = []
        module = module_of(pl_module)
        policy = policy_of(module)
        context, most = context_of(policy.causal_lm.config), module.max_new_tokens
        starts = column(data_of(trainer).sets["test"], "response_start").to_pylist()
        short = sum(room(context, start, most) < most for start in starts)
        if short:
            rank_zero_info(
                f"the policy was made for {context} tokens, so answers to {short:,} of {len(starts):,} test prompts"
                f" have room for fewer than `model.max_new_tokens` ({most}) and end there."
            )

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._answers += [(question.row, answer) for question, answer in zip(batch, outputs, strict=True)]

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_rehearsal(trainer):
            return
        parts = [self._answers] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(parts, self._answers)
        if trainer.is_global_zero:
            answers = sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])
            path = run_folder(trainer) / "predictions.jsonl"
            lines = (json.dumps(answer, ensure_ascii=False) + "\n" for _, answer in answers)
            replace_text(path, "".join(lines))
            rank_zero_info(f"{len(answers):,} answers: {path}")
