"""Saves and restores the project's part of a checkpoint, whole whatever form the parameters have.

Of the policy it holds the parameters that are trained. All else comes with the base model: frozen parameters, buffers,
and what a quantized layer adds to its state. The solver's state may have the shape of the policy's values; where these
are spread over processes it is gathered to be saved, and spread again when it is loaded.

Left out: the position of the data and random states, which the data module and a callback keep; and buffers of a policy
that training would change, such as running means, which causal language models do not have.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lit_bilevel.errors import UserError, misfit
from lit_bilevel.policy.shard import spread
from lit_bilevel.problem import whole
from lit_bilevel.training.trainer import policy_of

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lit_bilevel.module import LitBilevel

SCHEMA = 6
"""Raised whenever an entry changes; a run is continued with the version it was started with."""


def save_own(module: LitBilevel, checkpoint: dict[str, Any]) -> None:
    """Add a `LitBilevel`'s state, and leave out what the base model brings; called on every process."""
    # what is frozen comes with the base model: saving it would cost its size at every checkpoint
    kept = _select_kept(module, checkpoint["state_dict"])
    checkpoint["state_dict"] = {name: checkpoint["state_dict"][name] for name in kept}
    checkpoint["lit_bilevel"] = {
        "schema": SCHEMA,
        "solver": apply_to_collection(module.solver.state_dict(), Tensor, whole),
        "guard": module.guard.state_dict(),
        "refinement": module.refinement.checkpoint(),
    }
    if module.own_optimizer is not None:
        checkpoint["lit_bilevel"]["optimizer"] = module.own_optimizer.state_dict()


def restore_own(module: LitBilevel, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Take over what `save_own` added; returned is what has to wait for `restore_late`.

    Raises:
        UserError: if the checkpoint does not fit the module or its data.
    """
    own = _own_part(checkpoint, module._trainer)
    module.guard.load_state_dict(own["guard"])
    module.refinement.restore(own["refinement"], module.weights.pool_rows)
    if "state_dict" in checkpoint:  # a strategy that shards parameters has loaded it already
        state = module.state_dict()
        expected = {name: state[name].shape for name in _select_kept(module, state)}
        given = {name: value.shape for name, value in checkpoint["state_dict"].items()}
        if expected != given:
            raise misfit(expected, given)
    return {name: own[name] for name in ("solver", "optimizer") if name in own}


def restore_late(module: LitBilevel, own: dict[str, Any]) -> None:
    """Give solver and outer optimizer their states, once the policy is on its device; the solver's as the policy is."""
    if "solver" in own:
        # late, for before the strategy has set it up the policy is not on its device, nor sharded
        parameters: list[Tensor] = list(policy_of(module).trainable())
        state = move_data_to_device(own["solver"], parameters[0].device)
        module.solver.load_state_dict(apply_to_collection(state, Tensor, spread, parameters=parameters))
    if "optimizer" in own and module.own_optimizer is not None:
        module.own_optimizer.load_state_dict(own["optimizer"])


def _own_part(checkpoint: dict[str, Any], trainer: Trainer | None) -> dict[str, Any]:
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
    schema = own.get("schema", 1)
    if schema != SCHEMA:
        raise UserError(
            f"the checkpoint has schema {schema} and this version of lit_bilevel reads schema {SCHEMA}; continue with"
            f" the {'older' if schema < SCHEMA else 'newer'} version that wrote it, or start a new run"
            " (`WarmStart` takes over its weights)."
        )
    data = getattr(trainer, "datamodule", None)
    if trainer is not None and data is not None and trainer.state.fn == "fit" and type(data).__qualname__ in checkpoint:
        data.refuse_changes(checkpoint[type(data).__qualname__])
    return own


def _select_kept(module: LitBilevel, names: Iterable[str]) -> list[str]:
    """Those of the names that a checkpoint keeps; of tied parameters, which have several, all."""
    named = module.named_parameters(remove_duplicate=False)
    trained = {name for name, parameter in named if parameter.requires_grad}
    return [name for name in names if name in trained or not name.startswith("policy.")]
