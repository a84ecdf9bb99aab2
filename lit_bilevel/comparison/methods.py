"""Turns a method's name into flags for the shared configuration and a filter of rows.

    mixing             both sets, with the configuration's schedule of λ;  mixing@0.25: λ = 0.25 from the first step on
    constant_mixing    both sets from the first step on, with the configuration's λ
    best_mixing        of `mixing` and three constant shares, the one with the best monitor loss;  best:A,B,C: of any
    pool_only, validation_only, oracle
    random, lowest_loss, highest_loss, perplexity_difference, ngram_importance, gradient_similarity
    bmo, SOLVER[@WEIGHTS]                   weights and policy learned together: one_step, penalty@softmax, …
    curate             `configs/curate.yaml`, at this configuration's rates, with as many steps in its last phase; what
                       comes before is counted in the seconds
    two_stage:METHOD, seal                  rows selected by METHOD's weights, then a fresh policy trained on them
    weighted:METHOD                         a fresh policy trained on all rows under METHOD's weights, which stay
    score:COLUMN, weights:COLUMN            rows kept, or weighted, by a score from one pass of the policy before
                                            training: ifd, pmi, loss, density_ratio, … (`lit-bilevel score`)
    …+refine[:RULE]                         with `SelfRefine`: one_step@sigmoid+refine:token

A solver, weights, a filter and a RULE may also be a class of one's own, by its path: my_package.Newton@softmax.
A file of `--variants` gives further names to methods with settings of their own; a method that is built on a variant
sees the variant's rows, and has none of its settings. Left out: tuning.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lit_bilevel.comparison.filters import Filter, LearnedWeights, PassScore
from lit_bilevel.comparison.names import (
    BASELINES,
    CONSTANT,
    CONSTANT_SHARE,
    EARLY_STOPPING,
    FILTERS,
    FIXED,
    REFINE,
    RULES,
    SEAL,
    SHARES,
    SOLVERS,
    STOPWATCH,
    UNIFORM,
    WEIGHTS,
    check_name,
    find_class,
    flag_of,
    share,
)
from lit_bilevel.comparison.recipe import Settings, callbacks_of, is_one_of, other_flags, recipe_flags
from lit_bilevel.comparison.variants import Variant
from lit_bilevel.errors import UserError
from lit_bilevel.refinement.response_weights import ResponseWeights
from lit_bilevel.scores.columns import COLUMNS
from lit_bilevel.solvers import BilevelSolver
from lit_bilevel.weights import ExampleWeights


@dataclass(frozen=True)
class Method:
    """What is done under one name.

    Args:
        flags: for the command line of `lit-bilevel fit`.
        filter: leaves rows of the pool out before the policy is trained.
        needs: the method whose finished run, of the same seed, the filter reads.
        best_of: methods of which the one with the best monitor loss is this one; then nothing else is set.
        refine: whether `SelfRefine` runs, as the configuration has it or with the settings of `REFINE`.
        stopped_early: whether it ends when the monitor loss has not fallen for 15 looks. For methods that memorise the
            validation rows and never recover.
        constant: whether λ is the module's (or the method's) in every phase.
        recipe: a configuration whose phases, weights, solver and callbacks are this method's.
        weighted: whether every row keeps the weight that it has after the run that the method needs.
        weights: the score that every row has a weight by, which it keeps.
        variant: what the method is a variant of, and the rows that it sees, which may be those of the run it needs.
    """

    flags: tuple[str, ...] = ()
    filter: Filter | None = None
    needs: str = ""
    best_of: tuple[str, ...] = ()
    refine: bool = False
    stopped_early: bool = False
    weighted: bool = False
    constant: bool = False
    recipe: str = ""
    weights: PassScore | None = None
    variant: Variant | None = None

    @classmethod
    def parse(cls, name: str, variants: Mapping[str, Variant] | None = None) -> Method:
        """The method of a name.

        Args:
            name: see above.
            variants: further names.

        Raises:
            UserError: naming the part that is not known and the parts that are.
        """
        variants = variants or {}
        if name in variants:
            return cls._variant(name, variants[name], {k: v for k, v in variants.items() if k != name})
        kind, _, rest = name.partition(":")
        if name == "best_mixing":
            return cls(best_of=SHARES)
        if kind == "best" and rest:
            for part in rest.split(","):
                cls.parse(part, variants)
            return cls(best_of=tuple(rest.split(",")))
        if kind in ("score", "weights") and rest:
            score = PassScore(check_name(rest, COLUMNS, "score"))
            return cls(UNIFORM, score) if kind == "score" else cls(FIXED, weights=score)
        if name == "seal" or (kind in ("two_stage", "weighted") and rest):
            return cls._second_stage(name, SEAL if name == "seal" else rest, kind == "weighted", variants)
        return cls._parse_trained(name)

    @classmethod
    def _variant(cls, name: str, variant: Variant, others: Mapping[str, Variant]) -> Method:
        method = cls.parse(variant.method, others)
        if means(name, others):
            raise UserError(
                f"the variant {name!r} has the name of a method, whose place it would take; give it another."
            )
        if method.best_of or method.variant:
            raise UserError(f"the variant {name!r} is one of {variant.method!r}; it can only be one of a method.")
        if variant.rows and method.needs:
            raise UserError(
                f"the variant {name!r} has rows of its own, and {variant.method!r} needs a run of {method.needs!r},"
                " which sees all; leave `pool_rows` and `validation_rows` out, or give them to a variant that learns"
                " weights and name `two_stage:` or `weighted:` of it."
            )
        if variant.refine and not method.refine:
            raise UserError(f"the variant {name!r} has `refine` and {variant.method!r} no `+refine`; add it.")
        return replace(method, flags=(*method.flags, *variant.options()), variant=variant)

    @classmethod
    def _second_stage(cls, name: str, first: str, weighted: bool, variants: Mapping[str, Variant]) -> Method:
        method = cls.parse(first, variants)
        if not method.learns:
            raise UserError(f"{name!r}: {first!r} learns no weights; name a solver, or bmo.")
        rows = method.variant.rows if method.variant else None
        if not weighted:
            return cls(UNIFORM, LearnedWeights(), needs=first, variant=rows)
        return cls(FIXED, needs=first, weighted=True, variant=rows)

    @classmethod
    def _parse_trained(cls, name: str) -> Method:
        parts = re.fullmatch(r"([^+:]*)(\+refine)?(?::(.*))?", name)
        if parts is None:
            raise unknown(name)
        base, refine, rule = parts.groups()
        filter, flags, stopped_early, recipe = None, list(UNIFORM), False, ""
        constant = base in CONSTANT_SHARE or base.startswith("mixing@")
        if base in BASELINES:
            flags += BASELINES[base]
            stopped_early = base in ("constant_mixing", "validation_only")
        elif base.startswith("mixing@"):
            flags += [f"--model.upper_weight={share(base)}", *CONSTANT]
            stopped_early = True
        elif base == "curate":
            # no phase learns weights when answers come, so groups of them have weights in closed form
            flags, recipe = ["--model.refined_weights=BMOWeights"] if refine else [], "configs/curate.yaml"
        elif base == "bmo":
            flags = ["--model.weights=BMOWeights", *UNIFORM[1:], *CONSTANT]
        else:
            first, _, weights = base.partition("@")
            if not ("." in first or first in SOLVERS or (first in FILTERS and not weights)):
                raise unknown(name)
            kind = find_class(first, SOLVERS | FILTERS, (BilevelSolver, Filter), "method")
            if issubclass(kind, Filter):
                filter = kind()
            else:
                constant = kind.needs_upper_weight  # its scores have no meaning where λ is 0
                flags = [f"--model.solver={flag_of(kind)}", *(CONSTANT if constant else ())]
            if weights:
                flags.append(f"--model.weights={flag_of(find_class(weights, WEIGHTS, (ExampleWeights,), 'weights'))}")
        if rule is not None:
            if not refine:
                raise UserError(f"{name!r}: `:{rule}` names the weights of generated responses, which need `+refine`.")
            kind = find_class(rule, RULES, (ResponseWeights,), "response weights")
            flags.append(f"--model.response_weights={flag_of(kind)}")
        needs = filter.needs if filter is not None else ""
        return cls(
            tuple(flags),
            filter,
            needs,
            refine=bool(refine),
            stopped_early=stopped_early,
            constant=constant,
            recipe=recipe,
        )

    def phases(self, configured: Settings | None, steps: int) -> list[str]:
        """Flags for the phases of the run, to stand before those of the method; see `recipe`.

        Args:
            configured: the configuration's own.
            steps: policy steps of a run.
        """
        return recipe_flags(self.recipe, configured, steps) if self.recipe else other_flags(configured, self.constant)

    @property
    def learns(self) -> bool:
        """Whether a run leaves learned weights."""
        fixed = self.best_of or self.filter or self.weighted or self.weights
        return not fixed and self.flags[: len(UNIFORM)] != UNIFORM

    def callbacks(self, configured: Sequence[Mapping[str, Any]], earlier: Path | None = None) -> str:
        """The flag for the run's callbacks: `SelfRefine` put in or taken out, the configuration's others left.

        Args:
            configured: the configuration's own, as `class_path` and `init_args`.
            earlier: folder of the run that the method needs, or of the weights that it was given.
        """
        mine = [callback for callback in configured if is_one_of(callback, "SelfRefine")]
        chosen = callbacks_of(self.recipe, [callback for callback in configured if callback not in mine])
        if self.refine:
            callback = (mine or [REFINE])[0]
            own = (self.variant.refine if self.variant else None) or {}
            chosen.append({**callback, "init_args": {**callback.get("init_args", {}), **own}})
        chosen += [EARLY_STOPPING] if self.stopped_early else []
        if self.weighted or self.weights:
            assert earlier is not None
            chosen.append({"class_path": "WarmStart", "init_args": {"weights": str(earlier / "weights.parquet")}})
        return f"--trainer.callbacks={json.dumps([*chosen, STOPWATCH])}"


def means(name: str, variants: Mapping[str, Variant]) -> bool:
    """Whether a name is a method's."""
    try:
        Method.parse(name, variants)
    except UserError:
        return False
    return True


def unknown(name: str) -> UserError:
    """The error for a name that is no method's."""
    names = [*BASELINES, "mixing@SHARE", "best_mixing", *FILTERS, "bmo", "curate"]
    names += [*(f"{solver}[@WEIGHTS]" for solver in SOLVERS), "score:COLUMN", "weights:COLUMN", "two_stage:METHOD"]
    names += ["weighted:METHOD", "best:METHOD,METHOD", "seal", "METHOD+refine[:RULE]"]
    return UserError(f"unknown method {name!r}; there are: {', '.join(names)}.")


def runs_behind(name: str, variants: Mapping[str, Variant] | None = None) -> dict[str, str]:
    """The runs behind a row of the table, in their order, each with the one that it needs or an empty string."""
    method = Method.parse(name, variants)
    if method.best_of:
        return {run: needs for other in method.best_of for run, needs in runs_behind(other, variants).items()}
    earlier = runs_behind(method.needs, variants) if method.needs else {}
    return {**earlier, name: method.needs}
