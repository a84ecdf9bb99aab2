"""`lit-bilevel diagnose`: tells whether the validation set is large and clean enough to learn weights from.

    halves   rank correlation of the weights learned from the two halves of the validation file, same seed (they share
             the order of the pool, and with it some noise)
    seeds    rank correlation of the weights learned from the whole file with two seeds
    whole    2r / (1 + r) with r that of the halves: what two files of the whole size would agree (Spearman and Brown)
    rise     policy steps after which the monitor loss rises, in the run as configured and on validation rows alone
    monitor  the lowest monitor loss of the run as configured, its standard error, and over how many rows

Five fits with the configuration's own method; finished ones are kept. Left out: finding single bad validation rows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lit_bilevel.comparison.fitting import build, data_digests, data_flag, fit, prepare
from lit_bilevel.comparison.names import BASELINES, UNIFORM
from lit_bilevel.comparison.output import quiet, say
from lit_bilevel.comparison.recipe import callbacks_of, other_flags, read_parts
from lit_bilevel.comparison.rows import copy_records
from lit_bilevel.errors import UserError
from lit_bilevel.files import replace_text
from lit_bilevel.inspection.curves import Curve, read_curves
from lit_bilevel.inspection.statistics import correlation, ranks
from lit_bilevel.resources import locate

if TYPE_CHECKING:
    from jsonargparse import Namespace

GOOD, SOME = 0.6, 0.3
"""Rank correlations from which weights are called stable, and from which they say something."""
SURE = 0.02
"""Standard error of the monitor loss, as a share of it, above which it is called a bad judge."""
RISE = 0.01
"""How much above its lowest value, as a share of it, a monitor loss counts as risen."""


def main(arguments: list[str]) -> int:
    """Run the command; `arguments[0]` is its name. Returns the exit status."""
    options, shared = parser().parse_known_args(arguments[1:])
    try:
        diagnosis = Diagnosis(options.config, shared, Path(options.output), options.seeds).run()
    except UserError as error:
        sys.stderr.write(f"lit-bilevel diagnose: {error}\n")
        return 2
    text = "\n".join(advice(diagnosis)) + "\n"
    replace_text(Path(options.output) / "diagnosis.md", text)
    replace_text(Path(options.output) / "diagnosis.json", json.dumps(diagnosis, indent=2) + "\n")
    say(f"\n{text}\nwritten to {options.output}: diagnosis.md, diagnosis.json")
    return 0


def parser() -> argparse.ArgumentParser:
    """Of the command's own options."""
    own = argparse.ArgumentParser(
        prog="lit-bilevel diagnose",
        description="Tell whether the validation set is large and clean enough: five fits, then advice. Flags that are"
        " not listed (`--data.pool P`, `--model.policy.path M`, …) go to every fit.",
        allow_abbrev=False,
    )
    own.add_argument("--config", required=True, help="configuration of the method that will be used")
    own.add_argument("--output", required=True, help="folder of the fits and of diagnosis.md")
    own.add_argument("--seeds", nargs=2, type=int, default=[0, 1], metavar="SEED")
    return own


class Diagnosis:
    """The fits, and the figures that come of them.

    Args:
        config: the configuration.
        shared: more flags for every fit.
        output: folder of the fits.
        seeds: two seeds.
    """

    def __init__(self, config: str, shared: list[str], output: Path, seeds: list[int]):
        if seeds[0] == seeds[1]:
            raise UserError(f"`--seeds` are {seeds[0]} and {seeds[1]}; give two different ones, or their fits are one.")
        self.config, self.output, self.seeds = config, output, seeds
        self.shared = ["--checkpoint.every_minutes=5", *shared, "--export.policy=false", "--data.test=null"]
        output.mkdir(parents=True, exist_ok=True)
        with quiet(output / "settings.txt"):
            cli = build(config, self.shared)
        if not cli.model.learns_weights:
            raise UserError(f"the method of {config} learns no weights; diagnose one that does: `configs/curate.yaml`.")
        self.data: Namespace = cli.config.data
        self.phases, self.callbacks = read_parts(cli.config)
        self.sets = cli.datamodule.sets
        digest = hashlib.sha256(Path(locate(config)).read_bytes()).hexdigest()
        self.made_of = [f"config {digest}", *(f"{name} {rows}" for name, rows in data_digests(cli).items())]

    def run(self) -> dict[str, Any]:
        """Fit what is missing; returns rank correlations and steps by the names of the module's docstring."""
        first, second = self.seeds
        a, b = self._halves()
        alone = [*other_flags(self.phases, constant=True), *UNIFORM, *BASELINES["validation_only"]]
        alone += [f"--trainer.callbacks={json.dumps(callbacks_of('', self.callbacks))}"]
        runs = {
            "whole": [f"--seed_everything={first}"],
            "other_seed": [f"--seed_everything={second}"],
            "half_a": [f"--seed_everything={first}", data_flag("validation", a)],
            "half_b": [f"--seed_everything={first}", data_flag("validation", b)],
            "validation_only": [*alone, f"--seed_everything={first}"],
        }
        for number, (name, flags) in enumerate(runs.items(), start=1):
            say(f"[{number}/{len(runs)}] {name}{': known' if self._fit(name, flags) else ''}")
        weights = {name: self._weights(name) for name in ("whole", "other_seed", "half_a", "half_b")}
        halves = agreement(*join_weights(weights["half_a"], weights["half_b"]))
        return {
            "validation_rows": self.rows,
            "halves": halves,
            "seeds": agreement(*join_weights(weights["whole"], weights["other_seed"])),
            "whole": 2 * halves / (1 + halves) if halves > 0 else halves,
            "rise": {name: rise(self._curve(name, "monitor/loss")) for name in ("whole", "validation_only")},
            "monitor": self._monitor(),
        }

    def _halves(self) -> tuple[str | list[str], str | list[str]]:
        """Files with every other row of the validation file, in the order of a hash of the ids."""
        parts = [self.sets[name] for name in ("upper", "monitor")]
        rows = [pair for part in parts for pair in zip(part["id"][:], part["row"][:], strict=True)]
        rows.sort(key=lambda pair: hashlib.sha256(f"half {pair[0]}".encode()).digest())
        self.rows = len(rows)
        halves = []
        for number in (0, 1):
            chosen = {position: key for key, position in rows[number::2]}
            folder = self.output / f"half_{'ab'[number]}_rows"
            halves.append(copy_records(self.data.validation, self.data.columns or {}, chosen, folder))
        return halves[0], halves[1]

    def _fit(self, name: str, flags: list[str]) -> bool:
        """Fit under a name, unless that is done; returns whether it was."""
        folder = self.output / name
        prepare(folder, [*self.shared, *flags, *self.made_of])
        done = folder / "done"
        if done.exists():
            return True
        with quiet(folder / "log.txt"):
            fit(folder, self.config, [*self.shared, *flags])
        done.touch()
        return False

    def _weights(self, name: str) -> dict[str, float]:
        """Weights by id."""
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(self.output / name / "weights.parquet", columns=["id", "weight"])
        return dict(zip(table["id"].to_pylist(), table["weight"].to_pylist(), strict=True))

    def _curve(self, name: str, tag: str) -> Curve:
        return read_curves(self.output / name, [tag]).get(tag, [])

    def _monitor(self) -> dict[str, float] | None:
        losses = self._curve("whole", "monitor/loss")
        if not losses:
            return None
        step, loss = min(losses, key=lambda point: point[1])
        error = dict(self._curve("whole", "monitor/error"))[step]
        return {"rows": len(self.sets["monitor"]), "loss": loss, "error": error}


def join_weights(a: Mapping[str, float], b: Mapping[str, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of the rows that both runs had: which pool rows are left out depends on the validation file."""
    pairs = [(weight, b[key]) for key, weight in a.items() if key in b]
    first, second = torch.tensor(pairs, dtype=torch.float64).T
    return first, second


def agreement(a_N: torch.Tensor, b_N: torch.Tensor) -> float:
    """Rank correlation of two tables of weights; 0 where one of them does not vary."""
    return correlation(ranks(a_N), ranks(b_N)) or 0.0


def rise(curve: Curve) -> dict[str, float] | None:
    """Where a monitor loss is lowest, where it has risen for good after that, and where it was last looked at.

    Args:
        curve: steps and losses.

    Returns:
        `lowest` and `last`, and `risen` where it rose: steps; `None` for an empty curve.
    """
    if not curve:
        return None
    lowest = min(range(len(curve)), key=lambda i: curve[i][1])
    above = [loss > curve[lowest][1] * (1 + RISE) for _, loss in curve]
    risen = next((i for i in range(lowest + 1, len(curve)) if all(above[i:])), None)
    epochs: dict[str, float] = {"lowest": curve[lowest][0] + 1, "last": curve[-1][0] + 1}
    return epochs if risen is None else epochs | {"risen": curve[risen][0] + 1}


def advice(diagnosis: dict[str, Any]) -> list[str]:
    """The diagnosis in words, as lines of Markdown."""
    halves, seeds, rows = diagnosis["halves"], diagnosis["seeds"], diagnosis["validation_rows"]
    lines = [
        f"Weights learned from the two halves of the {rows:,} validation rows agree with rank correlation"
        f" **{halves:.2f}**; files of the whole size would agree about {diagnosis['whole']:.2f}. Two seeds on the whole"
        f" file agree {seeds:.2f}.",
        "",
    ]
    if halves >= GOOD:
        lines.append(
            "- The validation set is large and clean enough: with the same order of the pool, either half of it gives"
            " about the same weights. `configs/curate.yaml` trains a policy under such weights."
        )
    elif seeds < GOOD:
        lines.append("- What the validation set is worth cannot be told yet, because the run itself is noisy.")
    elif halves >= SOME:
        lines.append(
            f"- The weights say something, and more trusted rows would make them better: with {2 * rows:,} rows expect"
            f" an agreement of the halves of about {diagnosis['whole']:.2f}. Use the weights for selection"
            " (`lit-bilevel select --keep`), not one by one."
        )
    else:
        lines.append(
            "- The halves contradict each other: the set is too small, or the rows in it are of different kinds or not"
            " all trustworthy. Read a sample of it, remove doubtful rows, then add rows like those that you care for."
        )
    if seeds < GOOD:
        lines.append(
            "- Another order of the pool gives other weights. Visit rows more often (more epochs), average the"
            " direction longer (`direction_decay` nearer to 1), lower the learning rate of `weight_optimizer`, or use"
            " the mean of the weights of several seeds; then diagnose again."
        )
    lines += [line for name, where in diagnosis["rise"].items() for line in _about_rise(name, where)]
    return lines if diagnosis["monitor"] is None else [*lines, _about_monitor(**diagnosis["monitor"])]


def _about_monitor(rows: int, loss: float, error: float) -> str:
    text = f"- The lowest monitor loss is {loss:.4f}, with a standard error of {error:.4f} over {rows:,} rows"
    if not error < SURE * loss:
        text += (
            ": they choose badly between methods whose losses are close. Raise `data.monitor_fraction`, or add"
            " validation rows"
        )
    return f"{text}. `lit-bilevel compare` says of each pair of methods whether these rows tell them apart."


def _about_rise(name: str, where: dict[str, float] | None) -> list[str]:
    what = "On validation rows alone" if name == "validation_only" else "In the run as configured"
    if where is None:
        return [f"- {what}, the monitor loss is not known: it was never looked at; lower `trainer.val_check_interval`."]
    if "risen" not in where:
        return [f"- {what}, the monitor loss does not rise in {where['last']:.0f} steps: nothing is memorised."]
    text = f"- {what}, the monitor loss is lowest after {where['lowest']:.0f} steps and has risen by step"
    text += f" {where['risen']:.0f} of {where['last']:.0f}"
    if name == "validation_only":
        return [f"{text}: that is how long these rows last before they are memorised."]
    return [
        f"{text}: lower `model.upper_weight`, or let it start later (`model.phases`, a first one with"
        " `upper_weight: 0`)."
    ]
