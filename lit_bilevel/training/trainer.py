"""What a Trainer holds, under its types: the data module, and the callbacks of a class.

    data_of(trainer).sets["pool"]
    find_callbacks(trainer, ModelCheckpoint)

Lightning sets both on a Trainer without declaring them, so a type checker knows neither. Left out: what the callbacks
are for; see `callbacks.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar, cast

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer

    from lit_bilevel.data.module import BilevelDataModule

Kind = TypeVar("Kind", bound="Callback")


def data_of(trainer: Trainer) -> BilevelDataModule:
    """The data module of a run; `begin` has refused a run without one."""
    return cast("BilevelDataModule", trainer.datamodule)  # type: ignore[attr-defined]


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """All callbacks, in the order in which Lightning calls them."""
    return trainer.callbacks  # type: ignore[attr-defined]


def find_callbacks(trainer: Trainer, kind: type[Kind]) -> list[Kind]:
    """The callbacks of a class, or of one made from it, in the same order."""
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, kind)]
