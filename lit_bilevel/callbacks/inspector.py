"""Shows the weights after every epoch: in every logger what it can show, and as files in `inspection/`.

    scalars     weights/rank_correlation (Spearman's, with the epoch before), weights_quantile/05 … 95,
                weights_share/<source> (of all weight), auroc/<kind> where `data.truth` is given
    TensorBoard also a histogram (the highest 1 % of the weights in its last bar), quantile bands (tab Custom scalars),
                tables of the rows at both ends and how they moved, a PR curve (finding the corrupted rows by low
                weight), and the tab HParams after the final test

Work that grows with N is done once an epoch, never in a step. Left out: scalars of a step; the module logs those.
"""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lit_bilevel.callbacks.run import boards, is_rehearsal, module_of, run_folder
from lit_bilevel.inspection.folder import Inspection
from lit_bilevel.inspection.settings import Plain, run_settings
from lit_bilevel.inspection.statistics import (
    correlation,
    histogram,
    precision_recall,
    quantile,
    quantiles,
    ranks,
    source_mass,
)
from lit_bilevel.inspection.text import arrow, table_cell
from lit_bilevel.inspection.truth import aurocs, flat, read_truth
from lit_bilevel.training.trainer import data_of

if TYPE_CHECKING:
    from lit_bilevel.data.module import BilevelDataModule

BANDS = {"median, middle half of the rows": ("25", "75"), "median, middle 90 % of the rows": ("05", "95")}
LAYOUT: dict[str, dict[str, list[Any]]] = {
    "losses": {"upper, lower and monitor loss": ["Multiline", ["upper/loss", "lower/loss", "monitor/loss"]]},
    "weights": {
        name: ["Margin", [f"weights_quantile/{q}" for q in ("50", low, high)]] for name, (low, high) in BANDS.items()
    }
    | {"share of each source": ["Multiline", ["weights_share/.*"]]},
}


class WeightInspector(Callback):
    """Shows the distribution of the weights, the rows at both ends, and how they moved.

    Args:
        rows: rows in each of the two tables.
        characters: longest text shown in a cell.
        sampled: rows whose weight is followed over the epochs.
    """

    def __init__(self, rows: int = 20, characters: int = 300, sampled: int = 100):
        self.rows = rows
        self.characters = characters
        self.sampled = sampled
        self._before: Tensor | None = None
        self._settings: dict[str, Plain] = {}
        self._auroc: dict[str, float] = {}
        self._kinds: list[str] = []
        """Kind of corruption of every row; empty where no truth is given."""

    _data: BilevelDataModule
    """That of the fit."""

    # ---- when ----

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._before, self._auroc = None, {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what the run is, also where nothing is left to train; every process reads, and refuses, the truth."""
        module = module_of(pl_module)
        self._data = data_of(trainer)
        for name in ("_source_N", "_corrupted", "_sample"):  # of an earlier fit
            self.__dict__.pop(name, None)
        self._kinds = read_truth(self._data.truth, self._data.sets["pool"]["id"][:]) if self._data.truth else []
        self._settings = run_settings(trainer, module)

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = module_of(pl_module)
        if not is_rehearsal(trainer):
            text = json.dumps(self._settings, indent=2, ensure_ascii=False)
            Inspection(run_folder(trainer) / "inspection").write_text("settings.json", text + "\n")
        for logger in boards(trainer):
            logger.experiment.add_custom_scalars(LAYOUT)
        table = module.weights.table().detach().cpu().double()
        if trainer.global_step == 0 and table.max() > table.min():  # the weights of an earlier run
            if not is_rehearsal(trainer):
                records = self._ends(table, module.weights.visits.cpu())
                self._write(trainer, table, {"step": 0, "epoch": -1, **self._scalars(table)}, records)
            self._before = table.float()

    @rank_zero_only
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = module_of(pl_module)
        module.weights.recount()  # as the module does after this, so what is shown here is what is exported
        table = module.weights.table().detach().cpu().double()
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        scalars = self._scalars(table)
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step)
        records = self._ends(table, module.weights.visits.cpu())
        for logger in boards(trainer):
            logger.experiment.add_histogram("weights/distribution", table.clamp(max=quantile(table, 0.99)), step)
            self._add_pr_curve(logger, table, step)
            for end in ("lowest", "highest"):
                logger.experiment.add_text(f"weights/{end}", self._markdown(records, end), step)
        if not is_rehearsal(trainer):
            self._write(trainer, table, {"step": step, "epoch": trainer.current_epoch, **scalars}, records)
        self._before = table.float()

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look once more: the export may have scored the rows under the final policy."""
        module = module_of(pl_module)
        table = module.weights.table().detach().cpu().double()
        self._score(table)
        if module.weights.needs_scoring and not is_rehearsal(trainer):
            records = self._ends(table, module.weights.visits.cpu())
            Inspection(run_folder(trainer) / "inspection").write("rows.jsonl", records)

    @rank_zero_only
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After a fit: its settings with the metrics they led to, for comparing runs."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("test/")}
        if not self._settings or is_rehearsal(trainer):
            return
        metrics |= self._auroc
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(self._settings, metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
            else:
                logger.log_hyperparams(dict(self._settings))
            logger.save()

    def state_dict(self) -> dict[str, Any]:
        return {} if self._before is None else {"before": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict.get("before")

    # ---- what ----

    @functools.cached_property
    def _source_N(self) -> Tensor:
        return self._data.pool_sources

    @functools.cached_property
    def _sample(self) -> list[int]:
        rows = len(self._data.sets["pool"])
        return torch.randperm(rows, generator=torch.Generator().manual_seed(0))[: self.sampled].sort().values.tolist()

    def _scalars(self, table: Tensor) -> dict[str, float]:
        scalars = {f"weights_quantile/{name}": value for name, value in quantiles(table).items()}
        mass = source_mass(table, self._source_N, self._data.source_names)
        scalars |= {f"weights_share/{name}": value for name, value in mass.items()}
        if self._before is not None and len(self._before) == len(table):
            rho = correlation(ranks(table), ranks(self._before))
            scalars |= {} if rho is None else {"weights/rank_correlation": rho}
        return scalars | self._score(table)

    def _score(self, table: Tensor) -> dict[str, float]:
        """AUROC, of which that of all rows is kept for the tab HParams."""
        scores = flat(aurocs(table, self._kinds)) if self._kinds else {}
        self._auroc = {name: value for name, value in scores.items() if name == "auroc/all"}
        return scores

    def _ends(self, table: Tensor, visits: Tensor) -> list[dict[str, Any]]:
        """Records of the rows at both ends; equal weights in the order of the pool."""
        count = min(self.rows, len(table))
        order = table.argsort(stable=True)
        rank_N = ranks(table)
        before = self._before if self._before is not None else torch.ones(len(table))
        moved = rank_N - ranks(before) if self._before is not None else torch.zeros(len(table))
        records = []
        for end, rows in (("lowest", order[:count]), ("highest", order.flip(0)[:count])):
            for row in rows.tolist():
                record = self._data.sets["pool"][row]
                shown = {name: record[name] for name in ("id", "row", "prompt", "response", "source")}
                shown |= {"weight": float(table[row]), "visits": int(visits[row])}
                shown |= {"end": end, "before": float(before[row]), "moved": int(moved[row])}
                records.append(shown | ({"kind": self._kinds[row] or "clean"} if self._kinds else {}))
        return records

    @functools.cached_property
    def _corrupted(self) -> Tensor:
        return torch.tensor([bool(kind) for kind in self._kinds])

    def _add_pr_curve(self, logger: TensorBoardLogger, table: Tensor, step: int) -> None:
        if self._corrupted.any() and not self._corrupted.all():
            suspicion = 1 - ranks(table) / max(1, len(table) - 1)
            logger.experiment.add_pr_curve("weights/finds_corrupted", self._corrupted, suspicion, step)

    def _markdown(self, records: list[dict[str, Any]], end: str) -> str:
        truth = ["truth"] if self._kinds else []
        names = ["weight", "epoch before", "places moved", "visits", "source", *truth, "id", "prompt", "response"]
        lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        for record in records:
            if record["end"] == end:
                cells = [f"{record['weight']:.3g}", f"{record['before']:.3g}", arrow(record["moved"])]
                texts = [record["source"], *([record["kind"]] if truth else [])]
                texts += [record[name] for name in ("id", "prompt", "response")]
                cells += [str(record["visits"]), *(table_cell(text, self.characters) for text in texts)]
                lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def _write(self, trainer: Trainer, table: Tensor, record: dict[str, Any], records: list[dict[str, Any]]) -> None:
        files = Inspection(run_folder(trainer) / "inspection")
        record |= {"histogram": histogram(table), "rows": self._sample}
        record |= {"weights": [float(table[row]) for row in self._sample]}
        if self._kinds:
            record |= {"kinds": [self._kinds[row] for row in self._sample]}
            record |= {"precision_recall": precision_recall(table, self._corrupted)}
        files.add_epoch(record)
        files.write("rows.jsonl", records)
        for end in ("lowest", "highest"):
            files.write_text(f"{end}.md", self._markdown(records, end) + "\n")
