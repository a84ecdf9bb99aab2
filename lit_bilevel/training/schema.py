"""What a checkpoint must be to continue from: written by this schema, for the data at hand.

Left out: migrating checkpoints of other schemas; a run is continued with the version it was started with.
"""

from __future__ import annotations

from typing import Any

from lit_bilevel.errors import UserError

VERSION = 6


def check_checkpoint(checkpoint: dict[str, Any], trainer: Any) -> dict[str, Any]:
    """The project's part of a checkpoint, if it fits.

    Args:
        checkpoint: as Lightning loaded it.
        trainer: Lightning's, or `None`; when it fits, its data must be that of the checkpoint.

    Raises:
        UserError: for a checkpoint of something else, of another schema, or of other data.
    """
    own = checkpoint.get("lit_bilevel")
    if own is None:
        raise UserError("lit_bilevel did not write this checkpoint; give one from a run's `checkpoints/` folder.")
    found = own.get("schema", 1)
    if found != VERSION:
        raise UserError(
            f"the checkpoint has schema {found} and this version of lit_bilevel reads schema {VERSION}; continue with"
            f" the {'older' if found < VERSION else 'newer'} version that wrote it, or start a new run"
            " (`WarmStart` takes over its weights)."
        )
    data = getattr(trainer, "datamodule", None)
    if data is not None and trainer.state.fn == "fit" and type(data).__qualname__ in checkpoint:
        data.refuse_changes(checkpoint[type(data).__qualname__])
    return own
