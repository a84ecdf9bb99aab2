"""Turns files into tables of token ids, kept on disk so that the next run starts at once.

A prepared set is a folder, named by a digest of everything that its contents depend on: the bytes of the files, their
names, the settings of their reading, the tokenizer with its chat template, those of the encoding, and this program. It
is made beside its place, under a lock, and renamed when it is complete and on disk: a run that is interrupted leaves a
folder `….partial`, which the next one throws away. Other processes wait for the lock and then read.

The folders lie in `$XDG_CACHE_HOME/lit_bilevel` (`~/.cache/lit_bilevel`), and may be deleted whenever no run uses them.
Left out: throwing away old ones.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import datasets
import filelock
import tokenizers
import transformers
from datasets import Dataset, concatenate_datasets
from lightning.pytorch.utilities import rank_zero_info
from tqdm import tqdm

from lit_bilevel.data.announce import notices, tell
from lit_bilevel.data.encode import Encoder
from lit_bilevel.data.files import list_files
from lit_bilevel.data.rows import Source
from lit_bilevel.data.table import column, encode_rows, write_rows
from lit_bilevel.errors import UserError, gather
from lit_bilevel.files import sync
from lit_bilevel.types import Row
from lit_bilevel.version import __version__

if TYPE_CHECKING:
    import numpy as np
    import pyarrow
    from transformers import PreTrainedTokenizerBase

SHOWN_FROM = 20_000
"""Rows from which on progress is shown."""


class Prepared(NamedTuple):
    """A set that is ready: its table, what is wrong with the rows left out, and the format of each file."""

    table: Dataset
    problems: list[str]
    formats: dict[str, str]
    renamed: list[str]


@dataclass
class Preparation:
    """Turns sources into tables.

    Args:
        encoder: for the policy's tokenizer.
        folder: where prepared sets lie; by default one that is removed together with this object.
        on_bad_row: `error` stops at bad rows and names them; `skip` leaves them out.
        num_proc: processes that tokenize.
        progress: whether to show a bar for large sets.
    """

    encoder: Encoder
    folder: Path | None
    on_bad_row: Literal["error", "skip"] = "error"
    num_proc: int = 1
    progress: bool = False

    def __post_init__(self) -> None:
        if self.folder is None:
            self._temporary = Path(tempfile.mkdtemp(prefix="lit_bilevel-"))
            weakref.finalize(self, shutil.rmtree, self._temporary, ignore_errors=True)

    def __call__(self, name: str, source: Source) -> Prepared:
        """The table of a set, made now or earlier.

        Args:
            name: of the set, for messages.
            source: its files.

        Raises:
            UserError: for files and rows that cannot be used, or a folder that cannot be written.
        """
        folder = self.folder or self._temporary
        target = folder / self.key(source)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(f"{target}.lock"):
                about = _about(target)
                if about is None:
                    self._make(name, source, target)
                    about = _about(target)
        except OSError as error:
            raise UserError(
                f"the prepared {name} set could not be written to {folder} ({error}); make room there, or name"
                " another folder with `data.cache`."
            ) from error
        assert about is not None
        self._refuse(name, source, about["problems"], about["lost"])
        tell(name, about["unread"], about["notices"])
        parts = [Dataset.from_file(str(target / file)) for file in about["files"]]
        table = concatenate_datasets(parts)
        if about["lost"]:
            table = table.select(_positions(column(table, "problem").is_null()))
        if not len(table):
            raise UserError(f"{source.name} has no usable row (the first: {about['lost'][0]}).")
        return Prepared(table, about["problems"] + about["lost"], about["formats"], about["renamed"])

    @functools.cached_property
    def _example(self) -> str:
        return repr(self.encoder.rows([Row(0, "", "one?", "two!", "")]))

    def key(self, source: Source) -> str:
        """The name of the folder of a source's table: a digest of all that its contents depend on."""
        encoder = self.encoder
        settings = {
            "paths": source.paths,
            "format": source.format,
            "columns": dict(source.columns),
            "pairs": source.pairs,
            "encoding": [encoder.max_length, encoder.truncation, encoder.train_on],
            "example": self._example,  # a template may write the date
            "versions": [__version__, transformers.__version__, tokenizers.__version__],
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for path in source.paths:
            try:
                for file in list_files(path):
                    _add_file(digest, file)
            except OSError as error:
                raise UserError(f"{path} cannot be read ({error}).") from error
        with tempfile.TemporaryDirectory() as folder:
            _save_tokenizer(encoder.tokenizer, Path(folder))
            for file in (*sorted(Path(folder).rglob("*")), *sorted(Path(__file__).parent.glob("*.py"))):
                if file.is_file():
                    digest.update(file.name.encode())
                    _add_file(digest, file)
        return digest.hexdigest()[:32]

    def _refuse(self, name: str, source: Source, problems: list[str], lost: list[str]) -> None:
        if self.on_bad_row == "error" and problems:
            remedy = "mend it, or leave it out with `data.on_bad_row: skip`"
            raise gather(f"bad data in {source.name} ({remedy})", problems)
        if self.on_bad_row == "error" and lost:
            raise gather(f"the {name} set has rows that cannot be used (or set `data.on_bad_row: skip`)", lost)

    def _make(self, name: str, source: Source, target: Path) -> None:
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            with tqdm(desc=f"reading {name}", unit=" rows", disable=not self.progress, leave=False) as bar:
                rows, problems = write_rows(source, partial / "rows.arrow", bar.update)
            self._refuse(name, source, problems, [])
            if not len(rows):
                raise UserError(f"{source.name} has no usable record (the first: {problems[0]}).")
            large = len(rows) >= SHOWN_FROM
            if large:
                rank_zero_info(f"{name}: {len(rows):,} rows are tokenized now, to be kept in {target.parent}")
            with _bars(self.progress and large):
                table = encode_rows(rows, self.encoder, partial / "tokens.arrow", self.num_proc)
            if self.key(source) != target.name:
                raise UserError(f"{source.name} changed while it was read; start again.")
            wrong = column(table, "problem")
            files = [Path(file["filename"]) for file in table.cache_files]
            about = {
                "files": {file.name: file.stat().st_size for file in files},
                "formats": source.formats,
                "problems": problems,
                "lost": wrong.drop_null().to_pylist(),
                "unread": sorted(source.unread),
                "renamed": sorted(source.renamed),
                "notices": notices(table),
            }
            (partial / "rows.arrow").unlink()
            (partial / "about.json").write_text(json.dumps(about))
            for file in partial.iterdir():
                sync(file)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def cache_folder(setting: bool | str) -> Path | None:
    """Where prepared sets are kept: the folder that is named, the default one, or `None` for `False`."""
    if setting is False:
        return None
    if setting is True:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_bilevel"
    return Path(setting).expanduser()


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or of a hub id.

    Raises:
        UserError: if there is none.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no tokenizer could be loaded from `data.tokenizer` {path!r} ({type(error).__name__})."
        ) from error


def _about(target: Path) -> dict[str, Any] | None:
    """What a prepared set says of itself; `None` where it is not there whole."""
    try:
        about = json.loads((target / "about.json").read_text())
        whole = all((target / file).stat().st_size == size for file, size in about["files"].items())
    except (OSError, ValueError):
        return None
    return about if whole else None


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Its files, without what they say of how it was loaded."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    kept = {name: value for name, value in settings.items() if name not in ("is_local", "local_files_only")}
    path.write_text(json.dumps(kept, sort_keys=True))


def _add_file(digest: Any, path: Path) -> None:
    digest.update(path.stat().st_size.to_bytes(8, "little"))
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)


def _positions(mask: pyarrow.ChunkedArray) -> np.ndarray:
    return mask.to_numpy().nonzero()[0]


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Whether `datasets` shows its progress bars."""
    before = datasets.are_progress_bars_disabled()
    (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
    try:
        yield
    finally:
        (datasets.disable_progress_bars if before else datasets.enable_progress_bars)()
