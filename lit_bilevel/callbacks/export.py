"""Writes the results of a run: `weights.parquet`, `policy/` and `metrics.json`.

Every file is written beside its place and then moved there, so a file that exists is complete; files of an earlier run
in the same folder are removed when a new one starts. `policy/` is the monitor-best state, `weights.parquet` is from the
end of fit. Left out: merging adapters into the base model.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed.tensor import DTensor

from lit_bilevel.callbacks.passes import score_pool
from lit_bilevel.callbacks.run import is_rehearsal, module_of, run_checkpoint, run_folder
from lit_bilevel.data.table import column
from lit_bilevel.errors import UserError
from lit_bilevel.files import replace_text, replacing
from lit_bilevel.generation.ending import settings_to_export
from lit_bilevel.inspection.truth import aurocs, flat, read_truth
from lit_bilevel.module import LitBilevel
from lit_bilevel.policy.adapter import BASE
from lit_bilevel.policy.load import load_model
from lit_bilevel.policy.origin import adapter_of
from lit_bilevel.policy.shard import whole_state
from lit_bilevel.resources import locate
from lit_bilevel.training.trainer import data_of, policy_of


class Export(Callback):
    """Writes the results of a run as files that other tools read.

    Args:
        policy: whether to write `policy/`, a `save_pretrained` folder.
    """

    FILES = (
        *("weights.parquet", "metrics.json", "policy", "responses.jsonl", "predictions.jsonl"),
        *("inspection", "figures", "inspect.html"),
    )

    def __init__(self, policy: bool = True):
        self.policy = policy
        self._resumed = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew, and refuse a policy from the folder that the run would write its own into.

        Raises:
            UserError: naming both.
        """
        module = module_of(pl_module)
        if stage != "fit":
            return
        self._resumed = False
        own, given = run_folder(trainer).resolve() / "policy", Path(locate(module.policy_settings.path)).resolve()
        if self.policy and (given == own or own in given.parents):
            raise UserError(
                f"`model.policy.path` is {module.policy_settings.path}, which this run would replace by its own"
                " policy; give it another `trainer.default_root_dir`."
            )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._resumed = True

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # by now a checkpoint is loaded
        if not is_rehearsal(trainer) and not self._resumed:
            folder = run_folder(trainer)
            for name in self.FILES:
                _remove(folder / name)
            boards = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
            own = {Path(board._get_file_writer().event_writer._file_name).name for board in boards}
            for path in folder.glob("events.out.tfevents.*"):  # or TensorBoard draws both runs into one curve
                if path.name not in own:
                    _remove(path)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_rehearsal(trainer):
            return
        module = module_of(pl_module)
        if module.weights.needs_scoring:
            score_pool(trainer, module)
        own = run_checkpoint(trainer)
        best = Path(own.best_model_path if own is not None else "")
        # the first process says what is there, for a file system may show a new file to others later
        saved = trainer.strategy.broadcast(best.name != "" and best.exists())
        policy = policy_of(module)
        state = None if saved or not self.policy else whole_state(policy.model)  # on every process
        self._write(trainer, module, best if saved else None, state)

    @rank_zero_only
    def _write(self, trainer: Trainer, module: LitBilevel, best: Path | None, state: dict[str, Any] | None) -> None:
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        self._write_weights(trainer, module, folder / "weights.parquet")
        if self.policy:
            policy = policy_of(module)
            if best is not None:
                state = add_untrained(policy.model, read_saved_state(best))
            self._write_policy(module, folder / "policy", state)

    @rank_zero_only
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_rehearsal(trainer):
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("test/")}
        metrics |= self._scores(trainer)
        replace_text(run_folder(trainer) / "metrics.json", json.dumps(metrics, indent=2) + "\n")

    def _scores(self, trainer: Trainer) -> dict[str, float]:
        """AUROC of the exported weights, where there is a truth file to score them."""
        import pyarrow.parquet

        truth, path = data_of(trainer).truth, run_folder(trainer) / "weights.parquet"
        if truth is None or not path.is_file():
            return {}
        table = pyarrow.parquet.read_table(path, columns=["id", "weight"])
        kinds = read_truth(truth, table["id"].to_pylist())
        return flat(aurocs(torch.tensor(table["weight"].to_numpy()), kinds))

    def _write_weights(self, trainer: Trainer, module: LitBilevel, path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        data = data_of(trainer).sets["pool"]
        weights = module.weights
        rows_M, weight_M = module.refinement.table()
        groups = dict(zip(rows_M.tolist(), weight_M.tolist(), strict=True))
        refined = [groups.get(row) for row in range(len(data))]
        table = pyarrow.table(
            {
                "id": column(data, "id"),
                "row": column(data, "row"),
                "source": column(data, "source"),
                "weight": pyarrow.array(weights.table().cpu().numpy(), pyarrow.float64()),
                "weight_refined": pyarrow.array(refined, pyarrow.float64()),
                "visits": pyarrow.array(weights.visits.cpu().numpy(), pyarrow.int32()),
            }
        )
        with replacing(path) as partial:
            pyarrow.parquet.write_table(table, partial)

    def _write_policy(self, module: LitBilevel, path: Path, state: dict[str, Any] | None) -> None:
        partial = path.with_name("policy.partial")
        _remove(partial)
        policy = policy_of(module)
        policy.model.save_pretrained(str(partial), state_dict=state)
        settings = settings_to_export(policy, module.tokenizer, module.max_new_tokens)
        settings.save_pretrained(partial)
        module.tokenizer.save_pretrained(partial)
        if policy.merged and module.policy_settings.lora is not None:
            _add_base(module, partial, path)
        _remove(path)
        os.replace(partial, path)


def _add_base(module: LitBilevel, partial: Path, target: Path) -> None:
    """Put the base of an adapter beside it, where it was made by merging another adapter and is nowhere else.

    It is loaded and merged once more, for the parameters of the policy may be spread over processes.
    """
    policy = policy_of(module)
    settings = module.policy_settings
    base = load_model(settings, adapter_of(settings), policy.causal_lm.dtype)
    base.save_pretrained(str(partial / BASE))
    path = partial / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": str((target / BASE).resolve())}
    path.write_text(json.dumps(config, indent=2, sort_keys=True))


def read_saved_state(checkpoint: Path) -> dict[str, Any]:
    """The policy's entries in a checkpoint: a file, DeepSpeed's folder, or one with a part from every process."""
    whole = checkpoint / "checkpoint" / "mp_rank_00_model_states.pt"  # DeepSpeed's, up to stage 2
    if whole.is_file():
        saved = torch.load(whole, map_location="cpu", weights_only=True)["module"]
    elif checkpoint.is_dir():
        saved = _load_distributed_checkpoint(checkpoint)["state_dict"]
    else:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    prefix = "policy.model."
    return {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}


def add_untrained(model: Any, saved: dict[str, Any]) -> dict[str, Any]:
    """A model's state with the entries of a checkpoint, which holds what was trained; the rest is as it was loaded."""
    # parameters that are spread over processes are trained, or belong to the base of an adapter, which is not written
    rest = {name: value for name, value in model.state_dict().items() if not isinstance(value, DTensor)}
    return rest | saved


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
