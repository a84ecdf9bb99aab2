"""A summary before the first step: what is trained on what, by which method, and where to look; and how good the policy
was then, so that the end of the run can be held against it.

Left out: a table of layers; `trainer.enable_model_summary: true` gives Lightning's.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lit_bilevel.callbacks.passes import test_losses
from lit_bilevel.callbacks.progress import say
from lit_bilevel.callbacks.run import boards, is_rehearsal, module_of
from lit_bilevel.data.table import column
from lit_bilevel.inspection.settings import Plain, in_words, run_settings
from lit_bilevel.module import LitBilevel
from lit_bilevel.policy.origin import adapter_of, origin
from lit_bilevel.training.phases import current_index
from lit_bilevel.training.trainer import data_of, policy_of


class Summary(Callback):
    """Says at the start what a fit will do, and keeps what is said about the start at the end.

    Args:
        test_first: whether to measure the loss on the test file before the first step too.
    """

    def __init__(self, test_first: bool = True):
        self.test_first = test_first
        self.first: dict[str, float] = {}
        """Test metrics of the policy that the run began with."""
        self.monitor_losses: list[float] = []
        self.monitor_errors: list[float] = []
        """Standard errors of these losses."""
        self._phase_index = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":  # or what an earlier one showed would be taken for this one's
            self.first, self.monitor_losses, self.monitor_errors = {}, [], []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = trainer.callback_metrics.get("monitor/loss")
        if loss is not None and not trainer.sanity_checking:
            self.monitor_losses.append(float(loss))
            self.monitor_errors.append(float(trainer.callback_metrics["monitor/error"]))

    @rank_zero_only
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Say the phase where a new one begins, and where a run is continued."""
        module = module_of(pl_module)
        index, phases = current_index(module), module.phases
        if len(phases) == 1 or index == self._phase_index:
            return
        self._phase_index = index
        text = f"phase {index + 1} of {len(phases)}, {in_words(phases[index])}"
        say(text)
        for logger in boards(trainer):
            logger.experiment.add_text("phase", text, trainer.global_step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = module_of(pl_module)
        self._phase_index = -1
        self._say(trainer, module)
        begins = trainer.global_step == 0 and not is_rehearsal(trainer)
        if self.test_first and begins and "test" in data_of(trainer).sets:
            self.first = test_losses(trainer, module)
            for logger in trainer.loggers:
                logger.log_metrics(self.first, 0)

    def state_dict(self) -> dict[str, Any]:
        names = ("first", "monitor_losses", "monitor_errors")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)

    @staticmethod
    @rank_zero_only
    def _say(trainer: Trainer, module: LitBilevel) -> None:
        settings = run_settings(trainer, module)
        lines = {
            "pool": _pool(trainer),
            "validation": _validation(trainer),
            "policy": _policy(module),
            "method": _method(settings, module),
            "run": _run(trainer),
            "look": _look(trainer),
        }
        rank_zero_info("\n".join(f"{name:<11} {text}" for name, text in lines.items()))


def _pool(trainer: Trainer) -> str:
    import pyarrow.compute

    data = data_of(trainer)
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
    sets = data_of(trainer).sets
    test = f"{len(sets['test']):,} test rows" if "test" in sets else "no test file"
    return f"{len(sets['upper']):,} rows train the weights, {len(sets['monitor']):,} choose the checkpoint; {test}"


def _policy(module: LitBilevel) -> str:
    policy = policy_of(module)
    trained = sum(parameter.numel() for parameter in policy.trainable())
    total = policy.causal_lm.num_parameters()  # which knows that four-bit ones are packed
    settings = module.policy_settings
    adapter = adapter_of(settings)
    lora = "" if settings.lora is None else f" (LoRA, rank {settings.lora.r})"
    held = "" if adapter is None else f"; {origin(settings, adapter)}"
    return f"{settings.path}: {trained:,} of {total:,} parameters are trained{lora}{held}"


def _method(settings: dict[str, Plain], module: LitBilevel) -> str:
    parts = [f"{settings['solver']} with {settings['weights']}, λ = {settings['upper_weight']}"]
    if not module.learns_weights:
        parts = [f"{settings['solver']}: no weights are learned, λ = {settings['upper_weight']}"]
    for name, what in (("optimizer", "policy"), ("weight_optimizer", "weights")):
        if name in settings and (name == "optimizer" or module.learns_weights):
            parts.append(f"{what}: {settings[name]} at {settings[f'{name}.lr']:g}")
    for level in ("upper", "lower"):
        if settings[f"{level}_objective"] != "SFT":
            parts.append(f"{level} objective: {settings[f'{level}_objective']}")
    if "phases" in settings:
        parts.append(f"phases: {', '.join(phase.name for phase in module.phases)}")
    if "refine" in settings:
        parts.append(f"self-refining: {settings['refine']}, {settings['refine.responses']} responses a row")
    return "; ".join(parts)


def _run(trainer: Trainer) -> str:
    data = data_of(trainer)
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
