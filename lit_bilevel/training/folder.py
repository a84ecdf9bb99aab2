"""Tries whether a run folder can be made and written, before anything is read.

Example: `trainer.default_root_dir: runs/a` where `runs` is a file, or lies where nothing can be written, ends at once,
and not at the first checkpoint. Left out: remote storage.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

from lit_bilevel.errors import UserError

WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR)
"""Errors of the folder, and not of the program."""


def try_folder(folder: str | Path, what: str = "trainer.default_root_dir") -> None:
    """Write a file in the folder, or in the nearest one above it that exists.

    Nothing is made that stays, so a run that is refused later leaves no empty folder.

    Args:
        folder: which one.
        what: the setting that names it.

    Raises:
        UserError: if it cannot be made, or nothing can be written there.
    """
    path = Path(folder).absolute()
    try:
        # Nothing is made and taken away again: the processes of a run come here at different times, and one would
        # remove what another has begun to use.
        with tempfile.NamedTemporaryFile(dir=_nearest(path), prefix=".tried-") as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"`{what}` is {folder}, where nothing can be written ({error.strerror or error}); give another folder, or"
            " make it one that can."
        ) from error


def _nearest(path: Path) -> Path:
    """The path itself, or the nearest one above it that exists; other errors than its absence are raised."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return _nearest(path.parent)
    return path


def check_room(folder: str | Path, needed: int) -> None:
    """Refuse a folder without room for what a run writes at least.

    Args:
        folder: of the run.
        needed: bytes.

    Raises:
        UserError: with both numbers.
    """
    free = shutil.disk_usage(_nearest(Path(folder).absolute())).free
    if free < needed:
        raise UserError(
            f"`trainer.default_root_dir` is {folder}, where {free / 1e9:.2f} GB are free, and the checkpoints and the"
            f" policy of this run need about {needed / 1e9:.2f} GB; make room, or give another folder."
        )


def write_error(error: OSError) -> UserError | None:
    """The message for a write that failed in the middle of a run; `None` where something else was wrong."""
    if error.errno not in WRITING:
        return None
    name = f" ({error.filename})" if error.filename else ""
    return UserError(
        f"a file could not be written{name}: {error.strerror}; make room there or mend its permissions, and continue"
        " with `--ckpt_path last`."
    )
