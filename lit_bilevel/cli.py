"""The command line: LightningCLI with this project's module, data and callbacks.

`fit` ends by testing the monitor-best checkpoint. Mistakes of the user end in one message and status 2, without a
traceback; SIGTERM and Ctrl-C in a checkpoint and status 143 or 130; the end of another process of the run in a message
that says so. Left out: a second trainer, or modes; what a run
does is what its YAML composes.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

import lit_bilevel.generation.backends
import lit_bilevel.objectives
import lit_bilevel.refinement.consensus
import lit_bilevel.refinement.trust
import lit_bilevel.solvers
import lit_bilevel.weights
import lit_bilevel.weights.optimizer  # noqa: F401  (known classes can be named in YAML without their module)
from lit_bilevel.callbacks import (
    BilevelCheckpoint,
    Export,
    Figures,
    ModelCard,
    Predictions,
    RandomState,
    Summary,
    WeightInspector,
)
from lit_bilevel.callbacks.progress import Bar, Lines
from lit_bilevel.callbacks.run import is_rehearsal, run_checkpoint, run_folder
from lit_bilevel.data.module import BilevelDataModule
from lit_bilevel.errors import UserError
from lit_bilevel.module import LitBilevel
from lit_bilevel.parser import NOTE, Parser
from lit_bilevel.resources import locate_configs
from lit_bilevel.training.folder import try_folder, write_error
from lit_bilevel.training.refusals import check_flags, check_precision
from lit_bilevel.training.trainer import find_callbacks

# lines of libraries that say nothing to a user of this program; each is matched as a beginning
UNTOLD = (
    "💡 Tip:",
    "GPU available: False",
    "TPU available: False",
    "Loading `train_dataloader` to estimate",
    "Restoring states from the checkpoint path",  # followed by "Loaded model weights" or "Restored all states"
)
LOST = ("closed by peer", "reset by peer", "Broken pipe", "Connection was likely closed", "remote process exited")
PREFIX = "LIT_BILEVEL"
OUTDATED = (r".*isinstance\(treespec, LeafSpec\).*", r".*(instantiate_classes|skip_none).*")


COMMANDS = {
    "fit": "Learn data weights and the policy, test the monitor-best checkpoint, and write the run folder.",
    "validate": "The loss on the monitor part of the validation file, of a checkpoint.",
    "test": "The loss on the test file, of a checkpoint.",
    "predict": "Greedy answers to the test prompts, in `predictions.jsonl` of the run folder.",
}


WRITING = ("fit", "test", "predict")


def _describe(command: str, text: str) -> dict[str, str]:
    return {"description": text, "epilog": NOTE.format(prefix=PREFIX, command=command.upper())}


class FitConfig(SaveConfigCallback):
    """Writes `config.yaml`, the merged settings of a fit, into the run folder, whatever the logger.

    Without `ckpt_path`: a fit with these settings is a new run.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not is_rehearsal(trainer):
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        path = run_folder(trainer) / self.config_filename
        path.parent.mkdir(parents=True, exist_ok=True)
        config = self.config.clone()
        if "ckpt_path" in config:
            config.ckpt_path = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # `skip_none` is the name that all versions know
            self.parser.save(config, path, skip_none=False, overwrite=True, multifile=self.multifile)


class BilevelCLI(LightningCLI):
    """The commands `fit`, `validate`, `test` and `predict`."""

    model: LitBilevel
    datamodule: BilevelDataModule
    trainer: Trainer

    def __init__(self, args: list[str] | None = None, **settings: Any):
        super().__init__(
            LitBilevel,
            BilevelDataModule,
            save_config_callback=FitConfig,
            save_config_kwargs={"save_to_log_dir": False},
            auto_configure_optimizers=False,
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={name: _describe(name, text) for name, text in COMMANDS.items()},
            args=args,
            **settings,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that also reads the environment: `LIT_BILEVEL_FIT__DATA__BATCH_SIZE=9`."""
        return super().init_parser(**{"prog": "lit-bilevel", "default_env": True, "env_prefix": PREFIX, **kwargs})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; unlike Lightning's, without a warning where a program with arguments of its own calls this CLI."""
        self.config = parser.parse_args(cast("list[str] | None", args))

    def _parse_ckpt_path(self) -> None:
        """Leave settings as they are; Lightning's would take them from a checkpoint that has any, unasked."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(BilevelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Export, "export")
        parser.add_lightning_class_args(WeightInspector, "inspect")
        parser.add_lightning_class_args(RandomState, "random_state")
        parser.add_lightning_class_args(Predictions, "predictions")
        parser.add_lightning_class_args(Summary, "summary")
        parser.add_lightning_class_args(Figures, "figures")
        parser.add_lightning_class_args(ModelCard, "card")
        parser.set_defaults({"trainer.default_root_dir": "runs/default", "trainer.enable_model_summary": False})

    def before_instantiate_classes(self) -> None:
        """Refuse what still has to be set, and let loggers with an empty `save_dir` write into the run folder."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        unset = [f"`{name}`" for name, value in vars(config.as_flat()).items() if value == "set_me"]
        if unset and self.subcommand:
            raise UserError(f"{', '.join(unset)} still {'say' if len(unset) > 1 else 'says'} set_me; give your own.")
        if self.subcommand in WRITING and not config.trainer.fast_dev_run and getattr(rank_zero_only, "rank", 0) == 0:
            try_folder(config.trainer.default_root_dir)
        given = config.trainer.logger
        for logger in given if isinstance(given, list) else [given]:
            settings = getattr(logger, "init_args", None)
            if settings is not None and settings.get("save_dir") == "":
                settings.save_dir = config.trainer.default_root_dir

    def instantiate_classes(self) -> None:
        """Build trainer, module and data; nothing but settings can be wrong there."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"the settings cannot be used: {error} (`--print_config` shows all of them)") from error
        self.datamodule.pair_levels = self.model.pair_levels  # for data that are set up without a run

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.subcommand] if self.subcommand else self.config_init
        if config["trainer"].get("logger") in (None, True):
            folder = config["trainer"]["default_root_dir"]
            board = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
            kwargs["logger"] = board if self.subcommand in (None, "fit") else False  # or they write into a fit's curves
        return super().instantiate_trainer(**kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        own = [config.get("callbacks") or [], self.trainer_defaults.get("callbacks") or []]
        given = [*callbacks, *(c for part in own for c in (part if isinstance(part, list) else [part]))]
        if config.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in given):
            callbacks = [*callbacks, Bar() if sys.stdout.isatty() else Lines()]
        asked = config.get("precision")
        trainer = super()._instantiate_trainer(config, callbacks)
        check_precision(asked, trainer)
        check_flags(trainer)  # a Trainer with some of the callbacks that it refuses would do something before it asks
        return trainer

    def after_fit(self) -> None:
        """Test the monitor-best checkpoint, so that a run ends with the number that counts."""
        if is_rehearsal(self.trainer) or not self.trainer.state.finished or self.trainer.received_sigterm:
            return
        if self.datamodule.paths["test"] is not None:
            best = getattr(run_checkpoint(self.trainer), "best_model_path", "")
            self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best or None, verbose=False)
        if self.trainer.is_global_zero:
            sys.stdout.write(f"\n{self._results()}\n")

    def _results(self) -> str:
        """What came out, and where it lies."""
        folder = Path(self.trainer.default_root_dir)
        lines = []
        (summary,) = find_callbacks(self.trainer, Summary)
        if monitor := summary.monitor_losses:
            lowest, error = min(zip(monitor, summary.monitor_errors, strict=True))
            score = getattr(run_checkpoint(self.trainer), "best_model_score", None)
            later = "" if score is None or float(score) <= lowest else f", {float(score):.4f} at the state chosen"
            lines.append(
                f"{'monitor/loss':<20} {monitor[0]:.4f} at its first check, {lowest:.4f} at its best{later} (standard"
                f" error {error:.4f}, over {len(self.datamodule.sets['monitor']):,} rows)"
            )
        metrics = folder / "metrics.json"
        if metrics.is_file():
            for name, value in json.loads(metrics.read_text()).items():
                before = f"  (before the run {summary.first[name]:.4f})" if name in summary.first else ""
                lines.append(f"{name:<20} {value:.4f}{before}")
        names = ("weights.parquet", "policy", "metrics.json", "responses.jsonl", "checkpoints", "figures")
        lines.append(f"written to {folder}: {', '.join(name for name in names if (folder / name).exists())}")
        lines.append(f"look at it with: lit-bilevel inspect {folder}; tensorboard --logdir {folder}")
        return "\n".join(lines)


def quiet() -> None:
    """Leave out what libraries say to nobody in particular; warnings about a run stay."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for message in OUTDATED:
        warnings.filterwarnings("ignore", message)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logger = logging.getLogger(name)
        if _concerns_users not in logger.filters:
            logger.addFilter(_concerns_users)


def _concerns_users(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(UNTOLD)


def main(args: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    given = locate_configs(sys.argv[1:] if args is None else args)
    return tell_errors(lambda: BilevelCLI(given), "lit-bilevel", "Continue with `--ckpt_path last`.")


def tell_errors(run: Callable[[], object], program: str, again: str) -> int:
    """Run something, its errors in one message; returns the exit status.

    Args:
        run: what is run.
        program: its name in messages.
        again: how to go on when another process has ended.
    """
    quiet()
    try:
        run()
    except (UserError, MisconfigurationException) as error:  # the latter is Lightning's
        sys.stderr.write(f"{program}: {error}\n")
        return 2
    except OSError as error:
        told = write_error(error)
        if told is None:
            raise
        sys.stderr.write(f"lit-bilevel: {told}\n")
        return 2
    except SIGTERMException:  # while no state was at stake, as in a prediction
        return 128 + signal.SIGTERM
    except RuntimeError as error:
        if not any(text in str(error) for text in LOST):
            raise
        sys.stderr.write(
            f"{program}: another process of the run has ended, so this one ends too; its own message stands above, or"
            f" in its log (seen here: {str(error).splitlines()[0]}). {again}\n"
        )
        return 1
    return 0
