"""Says which settings hold in which policy steps: the phases of a run.

    phases:
      - {name: weights, share: 0.4, upper_weight: 0.95, learning_rate: 0.02}
      - {name: policy, share: 0.6, upper_weight: 0.25, learning_rate: 1.0, learn_weights: false}

Of 1,000 steps, 0 to 399 are of the first phase: weights are learned while the policy moves at a fiftieth of its rate.
Then the policy is trained under the weights, which stay, without a pass of the solver.

    phases:
      - {name: pool, share: 0.4, learning_rate: 0, learn_weights: false, prepare_solver: true}

In these steps the policy rests: the solver's own state learns from the pool rows and nothing else is computed, which
for `CrossFit` is half of what a step of `Mixing` costs. `CleanProbability` sets the weights at their end.

The phase of a step follows from its number and the run's length alone, so a resumed run needs nothing to know it.
Left out: phases of another solver, another policy or other data; those are runs of their own.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lit_bilevel.errors import UserError

if TYPE_CHECKING:
    from lit_bilevel.module import LitBilevel

ROUNDING = 1e-6
"""What the shares may miss of 1, and a border of a whole step."""


@dataclass(frozen=True)
class Phase:
    """A part of a run.

    Args:
        name: of the phase.
        share: of the run's policy steps; the shares of all phases come to 1.
        upper_weight: λ in this phase; by default that of the module, with its decay.
        learn_weights: whether weights are learned; without, a step costs what one of `Mixing` does.
        prepare_solver: where no weights are learned, run the solver all the same and drop its scores, so that its pool
            model or its mean direction is ready for the next phase, or for `CleanProbability` or `ClosingSweep` at the
            end of this one.
        learning_rate: factor of the policy's learning rate, whose schedule (warm-up and decay) begins anew with this
            phase; by default the schedule of the phase before goes on through this one. At 0 the policy rests, and a
            phase that only prepares the solver has no pass of the policy's own.
    """

    name: str
    share: float
    upper_weight: float | None = None
    learn_weights: bool = True
    prepare_solver: bool = False
    learning_rate: float | None = None

    @property
    def runs_solver(self) -> bool:
        """Whether the solver is asked in its steps."""
        return self.learn_weights or self.prepare_solver

    @property
    def rests(self) -> bool:
        """Whether nothing moves in its steps but the solver's own state."""
        return self.prepare_solver and self.learning_rate == 0

    def problems(self) -> list[str]:
        """What is wrong with its settings."""
        problems = []
        if not self.name:
            problems.append("a phase of `model.phases` has no `name`; give one")
        if not 0 < self.share <= 1:
            problems.append(f"`share` of the phase {self.name!r} is {self.share}; it must be in (0, 1]")
        if self.upper_weight is not None and not (
            0 <= self.upper_weight < 1 or (self.upper_weight == 1 and not self.runs_solver)
        ):
            problems.append(
                f"`upper_weight` of the phase {self.name!r} is {self.upper_weight}; it must be in [0, 1), or 1 where"
                " the solver does not run"
            )
        if self.learning_rate is not None and not 0 <= self.learning_rate < math.inf:
            problems.append(
                f"`learning_rate` of the phase {self.name!r} is {self.learning_rate}; it must be at least 0"
            )
        return problems


WHOLE = Phase("fit", 1.0)
"""The one phase of a run that names none."""


def problems_of(phases: Sequence[Phase]) -> list[str]:
    """What is wrong with the phases of a run, by themselves and together."""
    problems = [problem for phase in phases for problem in phase.problems()]
    names = [phase.name for phase in phases]
    if again := sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"`model.phases` has {', '.join(map(repr, again))} more than once; give each a name of its own")
    for phase in phases:
        if phase.prepare_solver and phase.learn_weights:
            problems.append(
                f"`prepare_solver` of the phase {phase.name!r} is for one that learns no weights; leave it out"
            )
    total = sum(phase.share for phase in phases)
    if not abs(total - 1) <= ROUNDING:
        problems.append(f"the shares of `model.phases` come to {total:g}; they must come to 1")
    return problems


def borders(phases: Sequence[Phase], steps: float) -> list[float]:
    """The number of policy steps after which each phase is over.

    Args:
        phases: of the run.
        steps: its length; infinite where it has no end.
    """
    if math.isinf(steps):
        return [math.inf] * len(phases)
    # of sums and not of single shares, or their rounding would add up over the phases
    shares = itertools.accumulate(phase.share for phase in phases)
    return [min(steps, math.ceil(steps * share - ROUNDING)) for share in shares]


def index_at(phases: Sequence[Phase], step: float, steps: float) -> int:
    """Which of the phases a step is in; after the last step, the last one."""
    return min(bisect.bisect_right(borders(phases, steps), step), len(phases) - 1)


def current_index(module: LitBilevel) -> int:
    """Which of its phases the step of a `LitBilevel` is in."""
    return index_at(module.phases, module.global_step, module.trainer.estimated_stepping_batches)


def index_of(phases: Sequence[Phase], name: str) -> int:
    """Which of the phases has a name.

    Raises:
        UserError: if none has.
    """
    names = [phase.name for phase in phases]
    if name not in names:
        raise UserError(f"there is no phase {name!r} in `model.phases`; there are: {', '.join(names)}.")
    return names.index(name)


def unused_preparation(phases: Sequence[Phase]) -> str | None:
    """The name of the last phase that prepares a solver which no later one learns weights from, if there is such."""
    for phase in reversed(phases):
        if phase.learn_weights:
            return None
        if phase.prepare_solver:
            return phase.name
    return None


def learns_after(phases: Sequence[Phase], step: float, steps: float) -> bool:
    """Whether any phase from that of a step on learns weights."""
    return any(phase.learn_weights for phase in phases[index_at(phases, step, steps) :])


def enter_phase(module: LitBilevel) -> None:
    """Begin a policy step of a `LitBilevel`: log its phase, and free what the solver keeps where it runs no more."""
    index = current_index(module)
    module.log("phase", float(index))
    if not any(phase.runs_solver for phase in module.phases[index:]):
        module.solver.release()
