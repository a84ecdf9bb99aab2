"""Finds what a Trainer and a module hold in a run, under its type: data, policy, the callbacks of a class.

    data_of(trainer).sets["pool"]
    find_callbacks(trainer, ModelCheckpoint)

Lightning sets data and callbacks on a Trainer without declaring them, and a module has no policy before it is set up;
here it is said once what they are in a run. Left out: what the callbacks are for; see `callbacks.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar, cast

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer

    from lit_bilevel.data.module import BilevelDataModule
    from lit_bilevel.module import LitBilevel
    from lit_bilevel.policy.policy import Policy

Kind = TypeVar("Kind", bound="Callback")


def data_of(trainer: Trainer) -> BilevelDataModule:
    """The data module of a run; `begin` has refused a run without one."""
    return cast("BilevelDataModule", trainer.datamodule)  # type: ignore[attr-defined]


def policy_of(module: LitBilevel) -> Policy:
    """The policy of a module that was set up: Lightning calls `configure_model` before any hook that asks for it."""
    assert module.policy is not None
    return module.policy


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """All callbacks, in the order in which Lightning calls them."""
    return trainer.callbacks  # type: ignore[attr-defined]


def find_callbacks(trainer: Trainer, kind: type[Kind]) -> list[Kind]:
    """The callbacks of a class, or of one made from it, in the same order."""
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, kind)]
