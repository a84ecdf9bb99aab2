"""One policy step of a real policy as a bilevel problem: computes each quantity that a solver asks for, once.

    gradient left on the parameters:  λ·∇f + (1−λ)·∇ mean_i w_i·ℓ_i          (lit_bilevel/README.md 7)

The lower pass that a solver sees is the policy's own training pass, so `Penalty` costs nothing extra. Where ∇f is
asked for by itself, the upper level gets its own backward pass first; otherwise its gradient is left to accumulate.

What f and ℓ_i are is said by the objective of each level; a reference that one needs is computed once a step.

Dropout: all passes of a step over the rows of a level have the same masks, so differences compare like with like, and
the next step has others.
Left out: gradients of ∇f with respect to anything but θ.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.optim import Optimizer

from lit_bilevel.objectives.base import Objective
from lit_bilevel.policy.engine import Engine
from lit_bilevel.policy.moments import precondition
from lit_bilevel.policy.policy import Policy
from lit_bilevel.policy.randomness import Masks
from lit_bilevel.policy.shard import carrying
from lit_bilevel.problem import BilevelProblem, Values, norm, scale_values
from lit_bilevel.types import Batch, Features


class PolicyProblem(BilevelProblem):
    """One policy step as a bilevel problem.

    Args:
        policy: the policy, in training mode, with no gradients on its parameters.
        lower: micro-batches of pool rows.
        upper: micro-batches of validation rows.
        weigh: gives the weights [B] of rows from their features, with losses where `needs_loss`.
        needs_loss: whether the weights depend on the rows' losses in this step.
        upper_weight: λ.
        optimizer: the policy's optimizer.
        engine: the machinery around the step.
        objectives: of the lower and of the upper level.
    """

    def __init__(
        self,
        policy: Policy,
        lower: list[Batch],
        upper: list[Batch],
        weigh: Callable[[Features], Tensor],
        needs_loss: bool,
        upper_weight: float,
        optimizer: Optimizer,
        engine: Engine,
        objectives: tuple[Objective, Objective],
    ):
        super().__init__(upper_weight, optimizer.param_groups[0]["lr"], engine.differences)
        self.policy, self.lower, self.upper = policy, lower, upper
        self.weigh, self.needs_loss = weigh, needs_loss
        self.optimizer, self.engine = optimizer, engine
        self.lower_objective, self.upper_objective = objectives
        self.parameters = policy.trainable()
        self._weights: Tensor | None = None
        self._lower_losses: Tensor | None = None
        self._graph: Tensor | None = None
        self._done = False
        self._upper_gradient: Values | None = None
        self._waiting: Tensor | None = None
        self._lower_masks, self._upper_masks = self._masks(), self._masks()
        self.upper_loss: Tensor | None = None
        """This process's part of f, detached; the mean over processes is f."""

    def _masks(self) -> Masks:
        return Masks(self.parameters[0].device, self.policy.has_dropout)

    def at_rows(self, lower: list[Batch]) -> PolicyProblem:
        """The same step over other lower rows, for passes at any values; these rows have masks of their own."""
        other = copy.copy(self)
        other.lower, other._lower_masks = lower, self._masks()
        other._weights = other._lower_losses = other._graph = None
        return other

    def fold(self, number: int, folds: int) -> PolicyProblem:
        return self.at_rows(self.lower[number::folds])  # the data module makes the batches in this order

    # ---- values and weights ----

    def values(self) -> Values:
        return [parameter.data for parameter in self.parameters]

    def weights(self) -> Tensor:
        if self._weights is None:
            features = [batch.features for batch in self.lower]
            if self.needs_loss:
                losses = self.lower_losses().split([batch.size for batch in self.lower])
                features = [known.with_loss(loss_B) for known, loss_B in zip(features, losses, strict=True)]
            self._weights = torch.cat([self.weigh(known) for known in features])
        return self._weights

    def _prepare(self, objective: Objective, batches: list[Batch]) -> None:
        """Put into the batches what their losses need and does not change within the step; once."""
        batches[:] = [self.policy.prepare(objective, batch) for batch in batches]

    @contextmanager
    def _lower_pass(self) -> Iterator[None]:
        """Around every pass over the lower rows; over the upper ones the next."""
        self._prepare(self.lower_objective, self.lower)
        with self._lower_masks.same():
            yield

    @contextmanager
    def _upper_pass(self) -> Iterator[None]:
        self._prepare(self.upper_objective, self.upper)
        with self._upper_masks.same():
            yield

    def _lower_losses_of(self, batch: Batch) -> Tensor:
        return self.policy.losses(self.lower_objective, batch)

    # ---- the upper level ----

    def upper_gradient(self) -> Values:
        if self._upper_gradient is None:
            assert self.upper_loss is None, "∇f has to be asked for before the lower losses"
            self._backward_upper(1.0, last=True)
            scale = self.engine.loss_scale
            gradients = [_gradient(parameter) for parameter in self.parameters]
            self._upper_gradient = gradients if scale == 1 else scale_values(gradients, 1 / scale)
            for parameter in self.parameters:  # the lower pass begins at none; `backward` adds λ·∇f again
                parameter.grad = None
        return self._upper_gradient

    def _backward_upper(self, factor: float, last: bool) -> None:
        losses = []
        with self._upper_pass():
            for index, batch in enumerate(self.upper):
                final = last and index == len(self.upper) - 1
                with nullcontext() if final else self.engine.unsynchronised():
                    loss_B = self.policy.losses(self.upper_objective, batch)
                    # gradients are averaged over processes, of which each has a share of the window's rows
                    loss = loss_B.sum() * (self.engine.world_size / batch.window_rows)
                    if self.engine.one_backward and not last:
                        self._waiting = loss * factor
                    else:
                        self.engine.backward(loss * factor)
                losses.append(loss.detach())
        self.upper_loss = torch.stack(losses).sum()

    # ---- the lower level ----

    def lower_losses(self) -> Tensor:
        if self._lower_losses is None:
            self._finish_upper()
            # its graph waits for `backward`; the graphs of several would not fit, so their losses are computed twice
            single = len(self.lower) == 1 and self.upper_weight < 1
            with self._lower_pass(), nullcontext() if single else torch.no_grad():
                losses = [self._lower_losses_of(batch) for batch in self.lower]
            if not single:  # or autocast gives its casts, which know no gradient, to the passes that follow
                torch.clear_autocast_cache()
            self._graph = losses[0] if single else None
            self._lower_losses = torch.cat(losses).detach()
        return self._lower_losses

    def _finish_upper(self) -> None:
        """Let λ·∇f accumulate, where the solver did not ask for ∇f by itself."""
        if self._upper_gradient is None and self.upper_loss is None and self.upper_weight > 0:
            self._backward_upper(self.upper_weight, last=self.upper_weight == 1)

    def _backward_lower(self) -> None:
        """(1−λ)·∇ mean_i w_i·ℓ_i, with the weights as they are now."""
        losses = []
        with self._lower_pass():
            for index, batch in enumerate(self.lower):
                final = index == len(self.lower) - 1
                with nullcontext() if final else self.engine.unsynchronised():
                    loss_B = self._graph if self._graph is not None else self._lower_losses_of(batch)
                    weight_B = self.weigh(batch.features.with_loss(loss_B.detach())).to(loss_B.dtype)
                    factor = (1 - self.upper_weight) * self.engine.world_size / batch.window_rows
                    objective = (weight_B * loss_B).sum() * factor
                    self.engine.backward(objective if self._waiting is None else objective + self._waiting)
                losses.append(loss_B.detach())
        self._graph, self._waiting, self._lower_losses = None, None, torch.cat(losses)

    def lower_losses_at(self, values: Values) -> Tensor:
        with self._lower_pass(), self.policy.substituted(values), torch.no_grad():
            return torch.cat([self._lower_losses_of(batch) for batch in self.lower])

    def lower_gradient_at(self, values: Values, weighted: bool = True) -> tuple[Tensor, Values]:
        weights_B = self.weights() if weighted else torch.cat([batch.row_B >= 0 for batch in self.lower])
        losses, totals, start = [], [torch.zeros_like(value) for value in values], 0
        with self._lower_pass(), self.policy.substituted(values):
            for batch in self.lower:
                loss_B = self._lower_losses_of(batch)
                weight_B = weights_B[start : start + batch.size].to(loss_B.dtype)
                objective = (weight_B * loss_B).sum() * (self.engine.world_size / batch.window_rows)
                torch._foreach_add_(totals, self._derivative(objective))
                losses.append(loss_B.detach())
                start += batch.size
        # by hand, for no strategy knows of values that are no parameters
        return torch.cat(losses), self.engine.average(totals)

    def lower_jvp(self, direction: Values) -> Tensor:
        tangents = []
        length: Tensor | float = 1.0
        if self.engine.loss_scale != 1:  # float16: entries far from 1 would vanish in the tangents
            size = norm(direction) / sum(value.numel() for value in direction) ** 0.5
            length = size.clamp_min(torch.finfo(torch.float32).tiny)  # after an overflow the direction is 0
            direction = scale_values(direction, 1 / length)
        as_written = self.policy.as_written()
        with self._lower_pass(), torch.no_grad(), forward_ad.dual_level(), as_written, carrying(self.policy, direction):
            for batch in self.lower:
                dual_B = self._lower_losses_of(batch)
                tangents.append(forward_ad.unpack_dual(dual_B).tangent)
        torch.clear_autocast_cache()
        return torch.cat(tangents) * length

    def hessian_vector_product(self, vector: Values) -> Values:
        weights_B = self.weights()
        totals, start = [torch.zeros_like(value) for value in vector], 0
        # the same operator at every call, and that of the f and the ℓ_i whose gradients the step takes
        with self._upper_pass(), self.policy.as_written():
            for batch in self.upper:
                loss = self.policy.losses(self.upper_objective, batch).sum()
                loss = loss * (self.upper_weight / batch.window_rows)
                torch._foreach_add_(totals, self._second_order(loss, vector))
        with self._lower_pass(), self.policy.as_written():
            for batch in self.lower:
                weight_B = weights_B[start : start + batch.size]
                loss_B = self._lower_losses_of(batch)
                loss = (weight_B.to(loss_B.dtype) * loss_B).sum() * ((1 - self.upper_weight) / batch.window_rows)
                torch._foreach_add_(totals, self._second_order(loss, vector))
                start += batch.size
        return self.engine.average(scale_values(totals, float(self.engine.world_size)))

    def _second_order(self, loss: Tensor, vector: Values) -> Values:
        gradient = self._derivative(loss, create_graph=True)
        product = torch.stack([(g * v).sum() for g, v in zip(gradient, vector, strict=True)]).sum()
        return self._derivative(product)

    def _derivative(self, scalar: Tensor, create_graph: bool = False) -> Values:
        """Gradient of a scalar; zeros for parameters that it does not depend on."""
        if self.engine.sharded:
            return self._derivative_by_backward(scalar)
        scale = self.engine.loss_scale
        gradients = torch.autograd.grad(
            scalar if scale == 1 else scalar * scale,
            self.parameters,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
        return list(gradients) if scale == 1 else [gradient / scale for gradient in gradients]

    def _derivative_by_backward(self, scalar: Tensor) -> Values:
        """The same, averaged over processes, where only a backward pass gathers parameters and reduces gradients."""
        kept = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        try:
            self.engine.backward(scalar)
            return scale_values([_gradient(parameter) for parameter in self.parameters], 1 / self.engine.loss_scale)
        finally:
            for parameter, gradient in zip(self.parameters, kept, strict=True):
                parameter.grad = gradient

    # ---- the policy's step ----

    def backward(self) -> None:
        """Leave the policy's gradient on its parameters, with the weights as they are now; once."""
        if self._done:
            return
        self._finish_upper()
        if self.upper_weight == 1:
            self.lower_losses()
        else:
            self._backward_lower()
        if self._upper_gradient is not None and self.upper_weight > 0:
            gradients = [_gradient(parameter) for parameter in self.parameters]  # which carry the loss scale
            torch._foreach_add_(gradients, self._upper_gradient, alpha=self.upper_weight * self.engine.loss_scale)
        self._done = True

    def precondition(self, direction: Values) -> Values:
        return precondition(self.optimizer, self.parameters, direction)


def _gradient(parameter: Tensor) -> Tensor:
    """The gradient of a parameter; zeros where no response token depends on it."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
