"""LightningCLI with this project's module, data and callbacks.

`fit` ends by testing the monitor-best checkpoint. Mistakes of the user end in one message and status 2, without a
traceback; SIGTERM and Ctrl-C in a checkpoint and status 143 or 130. Left out: a second trainer, or modes; what a run
does is what its YAML composes.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

import lit_bilevel.optim
import lit_bilevel.policy.backends
import lit_bilevel.ratios
import lit_bilevel.solvers
import lit_bilevel.weights  # noqa: F401  (known classes can be named in YAML without their module)
from lit_bilevel.callbacks import BilevelCheckpoint, Export, Predictions, RandomState, WeightInspector
from lit_bilevel.callbacks.export import is_rehearsal
from lit_bilevel.data.module import BilevelDataModule
from lit_bilevel.errors import UserError
from lit_bilevel.module import LitBilevel


class FitConfig(SaveConfigCallback):
    """Writes `config.yaml`, the merged settings of a fit, into the run folder."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not is_rehearsal(trainer):
            super().setup(trainer, pl_module, stage)


class BilevelCLI(LightningCLI):
    """The commands `fit`, `validate`, `test` and `predict`."""

    def __init__(self, args: list[str] | None = None, **settings: Any):
        super().__init__(
            LitBilevel,
            BilevelDataModule,
            save_config_callback=FitConfig,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            seed_everything_default=0,
            args=args,
            **settings,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; unlike Lightning's, without a warning where a program with arguments of its own calls this CLI."""
        self.config = parser.parse_args(args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(BilevelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Export, "export")
        parser.add_lightning_class_args(WeightInspector, "inspect")
        parser.add_lightning_class_args(RandomState, "random_state")
        parser.add_lightning_class_args(Predictions, "predictions")
        parser.set_defaults({"trainer.default_root_dir": "runs/default"})

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.subcommand] if self.subcommand else self.config_init
        if config["trainer"].get("logger") in (None, True):
            folder = config["trainer"]["default_root_dir"]
            kwargs["logger"] = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        """Test the monitor-best checkpoint, so that a run ends with the number that counts."""
        if is_rehearsal(self.trainer) or not self.trainer.state.finished or self.trainer.received_sigterm:
            return
        if self.datamodule.paths["test"] is None:
            return
        best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best or None, verbose=False)
        self._report()

    def _report(self) -> None:
        if self.trainer.is_global_zero:
            folder = Path(self.trainer.default_root_dir)
            metrics = ", ".join(f"{name} {float(value):.4f}" for name, value in self.trainer.callback_metrics.items())
            sys.stdout.write(f"\n{metrics}\nresults in {folder}; look at them with: tensorboard --logdir {folder}\n")


def main(args: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    try:
        BilevelCLI(args)
    except UserError as error:
        sys.stderr.write(f"lit-bilevel: {error}\n")
        return 2
    except SIGTERMException:  # while no state was at stake, as in a test
        return 128 + signal.SIGTERM
    return 0
