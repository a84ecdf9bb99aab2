"""Writes the model card `policy/README.md`: data, method, settings, results.

Written with the policy at the end of fit, and once more with the results after the test that ends a run. Left out:
what a card cannot know, such as intended use and licence.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from lit_bilevel.callbacks.run import is_rehearsal, module_of, run_checkpoint, run_folder
from lit_bilevel.callbacks.summary import Summary
from lit_bilevel.files import replace_text
from lit_bilevel.inspection.settings import Plain, run_settings
from lit_bilevel.module import LitBilevel
from lit_bilevel.policy.origin import adapter_of, base_of, origin, tunes_adapter
from lit_bilevel.training.trainer import data_of, find_callbacks
from lit_bilevel.version import __version__

SETTINGS = (
    "`generate` then answers as `lit-bilevel predict` does: greedily, and ending where training taught it to.",
    "peft keeps the generation settings of the base; for those of this folder, which end answers where training taught"
    " it to, set `model.generation_config = GenerationConfig.from_pretrained(…)`.",
)
"""What is said of `generation_config.json`, of a model and of an adapter."""


class ModelCard(Callback):
    """Says in `policy/README.md` how the policy came to be."""

    def __init__(self) -> None:
        self._settings: dict[str, Plain] = {}

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settings = run_settings(trainer, module_of(pl_module))

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module, {})

    @rank_zero_only
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = run_folder(trainer) / "metrics.json"
        if self._settings and path.is_file():
            self._write(trainer, pl_module, json.loads(path.read_text()))

    def _write(self, trainer: Trainer, pl_module: LightningModule, metrics: dict[str, float]) -> None:
        folder = run_folder(trainer) / "policy"
        if is_rehearsal(trainer) or not folder.is_dir():
            return
        replace_text(folder / "README.md", card(trainer, module_of(pl_module), self._settings, metrics))


def card(trainer: Trainer, module: LitBilevel, settings: dict[str, Plain], metrics: dict[str, float]) -> str:
    """The text of the card."""
    data = data_of(trainer)
    given, held = module.policy_settings, adapter_of(module.policy_settings)
    base, adapter = file_name(base_of(given)), tunes_adapter(given)
    loader = "PeftModel.from_pretrained(base, …)" if adapter else "AutoModelForCausalLM.from_pretrained(…)"
    sets = {"pool": ("pool",), "validation": ("upper", "monitor"), "test": ("test",)}
    rows = [
        (name, file_name(path), sum(len(data.sets[part]) for part in sets[name]))
        for name, path in data.paths.items()
        if path
    ]
    weighted = "every row of the pool has a learned weight"
    method = f"The solver is `{settings['solver']}`, the weights are `{settings['weights']}`."
    if not module.learns_weights:
        weighted = "no weight of a row was learned in this run"
        method = f"The solver is `{settings['solver']}`, which learns no weights."
    if "refine" in settings:
        method += " Answers of badly weighted rows were replaced by the policy's own (self-refining generation)."
    best = getattr(run_checkpoint(trainer), "best_model_score", None)
    results = {"monitor/loss (chose the checkpoint)": float(best)} if best is not None else {}
    for summary in find_callbacks(trainer, Summary):
        results |= {f"{name} before the run": value for name, value in summary.first.items()}
    results |= metrics
    settings = settings | {"policy": file_name(given.path)}
    if held is not None:
        settings["policy.base"] = base
        method += f" Before the run, {origin(replace(given, path=file_name(given.path)), replace(held, base=base))}."
    parts = [
        "---",
        f"base_model: {json.dumps(base)}",
        f"library_name: {'peft' if adapter else 'transformers'}",
        "pipeline_tag: text-generation",
        "tags: [lit-bilevel, bilevel-data-selection]",
        "---",
        f"# {base}, tuned with lit-bilevel {__version__}",
        "",
        f"{'An adapter for' if adapter else 'Tuned from'} `{base}` on data that is not trusted, guided by a small"
        f" trusted validation set (arXiv 2511.21056); {weighted}. {method}",
        f"Load it with `{loader}`. {SETTINGS[adapter]}",
        *("", "## Data", "", "| set | file | rows |", "|---|---|---|"),
        *(f"| {name} | `{path}` | {count:,} |" for name, path, count in rows),
        *("", "## Results", "", "| metric | value |", "|---|---|"),
        *(f"| {name} | {value:.4f} |" for name, value in results.items()),
        *("", "## Settings", "", "| setting | value |", "|---|---|"),
        *(f"| {name} | `{value}` |" for name, value in settings.items()),
        "",
    ]
    return "\n".join(parts)


def file_name(path: str | list[str]) -> str:
    """The names of local files or folders without their folders; a hub id as it is."""
    paths = [path] if isinstance(path, str) else path
    return ", ".join(Path(one).name if Path(one).exists() else one for one in paths)
