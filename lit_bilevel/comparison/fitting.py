"""Runs one fit in a folder of its own, and continues one that was interrupted under the same flags.

Left out: calling the program anew for every fit; importing it takes longer than a small run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from lit_bilevel.cli import BilevelCLI
from lit_bilevel.data.fingerprint import rows_digest
from lit_bilevel.files import replace_text
from lit_bilevel.policy.origin import tokenizer_path
from lit_bilevel.resources import locate


def build(config: str, flags: Sequence[str]) -> BilevelCLI:
    """A `BilevelCLI` with its module and its data, set up and not run."""
    cli = BilevelCLI([f"--config={locate(config)}", *flags], run=False)
    if cli.datamodule.tokenizer is None:
        cli.datamodule.tokenizer = tokenizer_path(cli.model.policy_settings)
    cli.datamodule.setup()
    return cli


def data_digests(cli: BilevelCLI) -> dict[str, str]:
    """A digest of the rows of every set of a `BilevelCLI` that was built, for telling whether they changed."""
    return {name: rows_digest(table) for name, table in cli.datamodule.sets.items()}


def prepare(folder: Path, flags: Sequence[str]) -> None:
    """Make the folder, without what a run under other flags (or whatever else is listed with them) left there."""
    settings, known = json.dumps(list(flags), indent=2), folder / "flags.json"
    if folder.exists() and not (known.is_file() and known.read_text() == settings):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(known, settings)


def fit(folder: Path, config: str, flags: Sequence[str]) -> BilevelCLI:
    """Fit, from the folder's last checkpoint where there is one; the module then holds the monitor-best policy."""
    further = ["--ckpt_path=last"] if (folder / "checkpoints" / "last.ckpt").exists() else []
    own_folder = f"--trainer.default_root_dir={folder}"  # after the flags, which may name the folder of another fit
    return BilevelCLI(["fit", f"--config={locate(config)}", *flags, own_folder, *further])


def data_flag(name: str, files: str | Sequence[str]) -> str:
    """The flag for a file, or a list of files, of a set."""
    return f"--data.{name}={files if isinstance(files, str) else json.dumps(files)}"
