"""A summary before the first step: what is trained on what, by which method, and where to look.

Left out: a table of layers; `trainer.enable_model_summary: true` gives Lightning's.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lit_bilevel.callbacks.inspect import boards
from lit_bilevel.data.table import column
from lit_bilevel.module import LitBilevel
from lit_bilevel.settings import Plain, run_settings


class Summary(Callback):
    """Says at the start what a fit will do, and keeps the monitor losses for what is said at the end."""

    def __init__(self) -> None:
        self.monitor_losses: list[float] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = trainer.callback_metrics.get("monitor/loss")
        if loss is not None and not trainer.sanity_checking:
            self.monitor_losses.append(float(loss))

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, LitBilevel)
        settings = run_settings(trainer, pl_module)
        lines = {
            "pool": _pool(trainer),
            "validation": _validation(trainer),
            "policy": _policy(pl_module),
            "method": _method(settings, pl_module),
            "run": _run(trainer),
            "look": _look(trainer),
        }
        rank_zero_info("\n".join(f"{name:<11} {text}" for name, text in lines.items()))


def _pool(trainer: Trainer) -> str:
    import pyarrow.compute

    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    pool = data.sets["pool"]
    tokens = pyarrow.compute.sum(column(pool, "length")).as_py()
    truncated = pyarrow.compute.sum(column(pool, "truncated")).as_py()
    sources = len(data.source_names)
    return (
        f"{len(pool):,} rows, {tokens:,} tokens ({tokens / len(pool):.0f} a row),"
        f" {sources} source{'' if sources == 1 else 's'}; {truncated:,} truncated at {data.max_length} tokens,"
        f" {len(data.skipped.get('pool', [])):,} skipped"
    )


def _validation(trainer: Trainer) -> str:
    sets = trainer.datamodule.sets  # type: ignore[attr-defined]
    test = f"{len(sets['test']):,} test rows" if "test" in sets else "no test file"
    return f"{len(sets['upper']):,} rows train the weights, {len(sets['monitor']):,} choose the checkpoint; {test}"


def _policy(module: LitBilevel) -> str:
    assert module.policy is not None
    trained = sum(parameter.numel() for parameter in module.policy.trainable())
    total = sum(parameter.numel() for parameter in module.policy.parameters())
    lora = "" if module.policy_settings.lora is None else f" (LoRA, rank {module.policy_settings.lora.r})"
    return f"{module.policy_settings.path}: {trained:,} of {total:,} parameters are trained{lora}"


def _method(settings: dict[str, Plain], module: LitBilevel) -> str:
    parts = [f"{settings['solver']} with {settings['weights']}, λ = {settings['upper_weight']}"]
    if not module.learns_weights:
        parts = [f"{settings['solver']}: no weights are learned, λ = {settings['upper_weight']}"]
    for name, what in (("optimizer", "policy"), ("weight_optimizer", "weights")):
        if name in settings and (name == "optimizer" or module.learns_weights):
            parts.append(f"{what}: {settings[name]} at {settings[f'{name}.lr']:g}")
    if "refine" in settings:
        parts.append(f"self-refining: {settings['refine']}, {settings['refine.responses']} responses a row")
    return "; ".join(parts)


def _run(trainer: Trainer) -> str:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    total = trainer.estimated_stepping_batches
    steps = "no end is set" if total == float("inf") else f"{total:,} steps"
    begun = f", {trainer.global_step:,} done" if trainer.global_step else ""
    strategy, device = type(trainer.strategy).__name__, trainer.strategy.root_device.type
    return (
        f"{steps}{begun}; {data.window('lower'):,} pool and {data.window('upper'):,} validation rows a step;"
        f" {trainer.world_size} process{'' if trainer.world_size == 1 else 'es'} on {device} ({strategy}),"
        f" precision {trainer.precision}"
    )


def _look(trainer: Trainer) -> str:
    folder = trainer.default_root_dir
    return f"tensorboard --logdir {folder}" if boards(trainer) else f"lit-bilevel inspect {folder}"
