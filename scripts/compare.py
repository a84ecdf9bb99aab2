"""Compare methods on the same data, model and policy steps, each at its monitor-best checkpoint.

    python scripts/compare.py --config configs/quickstart.yaml --methods mixing one_step --seeds 0 1 2 --output DIR

A method is mixing, constant_mixing, pool_only, validation_only, oracle, bmo or SOLVER[@WEIGHTS], with [+refine[:RULE]]:
one_step, penalty@softmax, one_step@sigmoid+refine:token, … Other flags (`--data.pool P`, `--model.policy.path M`, …) go
to every run. Finished runs are kept in DIR/results.csv, so a second call goes on where the first one stopped.

Left out: tuning. Every method runs with the settings it is given.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import math
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BASELINES = {
    "mixing": [],  # with the configuration's schedule of λ
    "constant_mixing": ["--model.upper_weight_start=0"],  # both sets from the first step on
    "pool_only": ["--model.upper_weight=0"],
    "validation_only": ["--model.upper_weight=1", "--model.upper_weight_start=0", "--trainer.val_check_interval=10"],
    "oracle": [],
}
STOPPED_EARLY = ("constant_mixing", "validation_only")  # they memorise the validation rows and never recover
EARLY_STOPPING: dict[str, Any] = {
    "class_path": "lightning.pytorch.callbacks.EarlyStopping",
    "init_args": {"monitor": "monitor/loss", "patience": 15},
}
SOLVERS = {
    "one_step": "OneStep",
    "penalty": "Penalty",
    "value_function": "ValueFunction",
    "implicit": "Implicit",
}
WEIGHTS = {
    "softmax": "SoftmaxWeights",
    "sigmoid": "SigmoidWeights",
    "source": "SourceWeights",
    "network": "NetworkWeights",
}
RATIOS = {
    "uniform": "Uniform",
    "token": "Token",
    "sequence": "Sequence",
    "length_normalised": "LengthNormalised",
    "self_normalised": "SelfNormalised",
    "aligned": "Aligned",
}
REFINE: dict[str, Any] = {
    "class_path": "SelfRefine",
    "init_args": {
        "choose": {"class_path": "LowestFraction", "init_args": {"fraction": 0.4}},
        "responses": 4,
        "sampling": {"max_new_tokens": 64},
    },
}


@dataclass(frozen=True)
class Method:
    """A method is the flags that turn the shared configuration into it.

    Args:
        flags: for the command line.
        refine: whether `SelfRefine` runs, as the configuration has it or with the settings of `REFINE`.
        stopped_early: whether it ends when the monitor loss has not fallen for 15 looks.
        clean_pool: whether it sees the clean rows of the pool alone.
    """

    flags: tuple[str, ...]
    refine: bool = False
    stopped_early: bool = False
    clean_pool: bool = False

    @classmethod
    def parse(cls, name: str) -> Method:
        """SOLVER[@WEIGHTS][+refine[:RATIO]], `bmo`, or a baseline; weights that are not named are the configuration's.

        Raises:
            UserError: naming the part that is not known and the parts that are.
        """
        base, refine, ratio = re.fullmatch(r"([^+]*)(\+refine)?(?::(.*))?", name).groups()  # type: ignore[union-attr]
        if base in BASELINES:
            flags = ["--model.weights=UniformWeights", "--model.solver=Mixing", *BASELINES[base]]
        elif base == "bmo":
            flags = ["--model.weights=BMOWeights", "--model.solver=Mixing"]
        else:
            solver, _, weights = base.partition("@")
            flags = [f"--model.solver={known(solver, SOLVERS | dict.fromkeys([*BASELINES, 'bmo'], ''), 'method')}"]
            flags += [f"--model.weights={known(weights, WEIGHTS, 'weights')}"] if weights else []
        if ratio:
            flags.append(f"--model.response_weights={known(ratio, RATIOS, 'response weights')}")
        return cls(tuple(flags), bool(refine), base in STOPPED_EARLY, base == "oracle")

    def callbacks(self, config: str) -> list[str]:
        """Flags that put `SelfRefine` in or take it out, leaving the configuration's other callbacks."""
        import yaml

        listed = (yaml.safe_load(Path(config).read_text()).get("trainer") or {}).get("callbacks") or []
        mine = [callback for callback in listed if str(callback.get("class_path", "")).endswith("SelfRefine")]
        others = [callback for callback in listed if callback not in mine]
        chosen = others + ((mine or [REFINE]) if self.refine else [])
        chosen += [EARLY_STOPPING] if self.stopped_early else []
        return [f"--trainer.callbacks={json.dumps(chosen)}"] if chosen or listed else []


def known(name: str, table: dict[str, str], what: str) -> str:
    """Look a name up.

    Raises:
        UserError: with the names there are.
    """
    from lit_bilevel.errors import UserError

    if name not in table:
        raise UserError(f"unknown {what} {name!r}; there are: {', '.join(table)}.")
    return table[name]


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, then write `results.csv` and `results.md`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="configuration that all methods share")
    parser.add_argument("--methods", nargs="+", required=True, metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--output", required=True, help="folder of the results and of the runs")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results in the folder")
    parser.add_argument(
        "--exact_match", action="store_true", help="also answer the test prompts, where answers are short"
    )
    options, shared = parser.parse_known_args(arguments)
    methods = {name: Method.parse(name) for name in options.methods}
    output = Path(options.output)
    if options.fresh and output.exists():
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    done = read_results(output)
    for seed in options.seeds:
        for name in options.methods:
            if (name, str(seed)) in {(row["method"], str(row["seed"])) for row in done}:
                continue
            say(f"{name}, seed {seed} …", end=" ")
            row = run(name, methods[name], seed, options, shared, output)
            done.append(row)
            write_csv(output, done)
            say(f"test loss {row['test_loss']:.4f}, {row['seconds']:.0f} s")
    table = markdown(done)
    (output / "results.md").write_text(table)
    say("\n" + table)
    return 0


def run(
    name: str, method: Method, seed: int, options: argparse.Namespace, shared: list[str], output: Path
) -> dict[str, Any]:
    """Train one method with one seed and score it."""
    from lit_bilevel.cli import BilevelCLI

    folder = output / name.replace(":", "-") / f"seed{seed}"
    if folder.exists():
        shutil.rmtree(folder)  # an unfinished run
    folder.mkdir(parents=True)
    flags = [
        *shared,
        *method.flags,
        *method.callbacks(options.config),
        f"--seed_everything={seed}",
        f"--trainer.default_root_dir={folder}",
    ]
    if method.clean_pool:
        with quiet(folder / "settings.txt"):
            flags += clean_pool_flags(options.config, shared, folder)
    started = time.perf_counter()
    with quiet(folder / "log.txt"):
        cli = BilevelCLI(["fit", f"--config={options.config}", *flags])
    seconds = time.perf_counter() - started
    row: dict[str, Any] = {"method": name, "seed": seed, "seconds": seconds}
    metrics = json.loads((folder / "metrics.json").read_text())
    row |= {key.replace("test/", "test_"): value for key, value in metrics.items() if key.startswith("test/")}
    if cli.model.learns_weights:
        row |= {key: value for key, value in metrics.items() if key.startswith("auroc/")}
    if options.exact_match:
        with quiet(folder / "answers.txt"):
            row["exact_match"] = exact_match(cli)
    return row


def clean_pool_flags(config: str, shared: list[str], folder: Path) -> list[str]:
    """Flags for a pool without its corrupted rows, and for as many policy steps as the others take."""
    from lit_bilevel.cli import BilevelCLI
    from lit_bilevel.data.rows import Source
    from lit_bilevel.scoring import read_truth

    settings = BilevelCLI([f"--config={config}", *shared], run=False).config
    rows = Source(settings.data.pool, settings.data.format, settings.data.columns or {}).read()
    kinds = read_truth(settings.data.truth, [row.id for row in rows])
    path = folder / "clean.jsonl"
    with path.open("w") as file:
        for row, kind in zip(rows, kinds, strict=True):
            if not kind:
                record = {"id": row.id, "prompt": row.prompt, "response": row.response, "source": row.source}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    flags = [f"--data.pool={path}", "--data.truth=null"]
    if settings.trainer.max_steps < 0:
        window = settings.data.batch_size * settings.model.accumulate_grad_batches
        steps = math.ceil(len(rows) / window) * settings.trainer.max_epochs
        flags += [f"--trainer.max_steps={steps}", "--trainer.max_epochs=-1"]
    return flags


def exact_match(cli: Any) -> float:
    """Share of test prompts whose greedy answer is the reference, at the monitor-best checkpoint (already loaded)."""
    references = dict(
        zip(cli.datamodule.sets["test"]["id"][:], cli.datamodule.sets["test"]["response"][:], strict=True)
    )
    cli.trainer.callbacks = [c for c in cli.trainer.callbacks if "Progress" not in type(c).__name__]
    batches = cli.trainer.predict(cli.model, datamodule=cli.datamodule, return_predictions=True)
    answers = [answer for batch in batches for answer in batch]
    return sum(answer["response"].strip() == references[answer["id"]].strip() for answer in answers) / len(answers)


# ---- results ----


def read_results(output: Path) -> list[dict[str, Any]]:
    """Rows of an earlier call."""
    path = output / "results.csv"
    if not path.is_file():
        return []
    with path.open() as file:
        return [{k: number(v) for k, v in row.items() if v != ""} for row in csv.DictReader(file)]


def number(text: str) -> Any:
    """A CSV cell as a number where it is one."""
    try:
        return float(text) if "." in text or "e" in text or text == "nan" else int(text)
    except ValueError:
        return text


def write_csv(output: Path, rows: list[dict[str, Any]]) -> None:
    """All rows, written aside and moved into place."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    partial = output / "results.partial"
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, output / "results.csv")


def markdown(rows: list[dict[str, Any]]) -> str:
    """Mean over seeds (± standard error where there are several), best test loss first; share of the gap closed."""
    measures = [name for name in dict.fromkeys(n for row in rows for n in row) if name not in ("method", "seed")]
    methods = {
        name: [row for row in rows if row["method"] == name] for name in dict.fromkeys(r["method"] for r in rows)
    }
    mean = {name: mean_of(part, "test_loss")[0] for name, part in methods.items()}
    gap = mean["mixing"] - mean["oracle"] if {"mixing", "oracle"} <= mean.keys() else 0.0
    shown = [*measures, "gap closed"] if gap > 0 else measures
    lines = ["| method | " + " | ".join(shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for name in sorted(methods, key=lambda name: mean[name]):
        cells = [cell(methods[name], measure) for measure in measures]
        if gap > 0:
            cells.append(f"{(mean['mixing'] - mean[name]) / gap:.2f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def mean_of(rows: list[dict[str, Any]], measure: str) -> tuple[float, float]:
    """Mean and standard error."""
    values = [float(row[measure]) for row in rows if measure in row]
    if not values:
        return math.nan, math.nan
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1) / len(values))
    return mean, spread


def cell(rows: list[dict[str, Any]], measure: str) -> str:
    """A table cell."""
    mean, error = mean_of(rows, measure)
    digits = 0 if measure == "seconds" else 4 if "loss" in measure else 3
    if math.isnan(mean):
        return "–"
    return f"{mean:.{digits}f}" if len(rows) < 2 else f"{mean:.{digits}f} ± {error:.{digits}f}"


# ---- output ----


def say(text: str, end: str = "\n") -> None:
    """Show progress at once."""
    print(text, end=end, flush=True)


@contextlib.contextmanager
def quiet(path: Path) -> Any:
    """Send everything a run prints to a file, native code included; show the file's place if the run fails."""
    sys.stdout.flush(), sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with path.open("w") as log:
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(kept[0], 1), os.dup2(kept[1], 2)
            say(f"failed; its output is in {path}")
            raise
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os.dup2(kept[0], 1), os.dup2(kept[1], 2)
            os.close(kept[0]), os.close(kept[1])


if __name__ == "__main__":
    import lit_bilevel.errors

    try:
        sys.exit(main())
    except lit_bilevel.errors.UserError as error:
        sys.stderr.write(f"compare: {error}\n")
        sys.exit(2)
