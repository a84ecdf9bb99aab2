"""Checks, on short sequences, that those that share a row are kept apart.

Transformers tells packed sequences from positions that start again, where there is neither an attention mask nor a
cache; which models and attention functions heed that differs. A sequence b is put after a and after c, with positions
that start again (a|b) and without (ab), and before a, where by causality it is right in any case (ba):

    |b in a|b  −  b in c|b|  ≤  10⁻⁴·|b in ab  −  b in ba|       nothing of the other sequence gets through
    |b in a|b  −  b in ba|   ≤  10⁻¹·|b in ab  −  b in ba|       and the positions are its own

In exact arithmetic both left sides are 0, and the first is so in any: the same sums of the same numbers. The second
compares different kernels, in bfloat16 perhaps. Where the right sides are 0 nothing is found out, which is no yes. Left
out: models that would keep apart short sequences only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_bilevel.errors import UserError

LEAK, NOISE = 1e-4, 0.1
BEFORE, OWN = 7, 5


def is_isolated(outputs: Callable[..., Tensor], vocabulary: int, rows: int, device: torch.device) -> bool:
    """Whether a sequence gives the same after others in its row as at the start.

    Args:
        outputs: from ids, and offsets or none, [S, T] to [S, T, …]; dropout off.
        vocabulary: ids are below it.
        rows: how many rows, all alike.
        device: of the ids.
    """
    ids = torch.arange(1, 1 + 2 * BEFORE + OWN, device=device) % vocabulary
    a, c, b = ids.split([BEFORE, BEFORE, OWN])
    offsets = torch.cat([torch.arange(length, device=device) for length in (BEFORE, OWN)]).expand(rows, -1)

    def run(*sequences: Tensor, **given: Tensor) -> Tensor:
        return outputs(torch.cat(sequences).expand(rows, -1), **given).float()

    try:
        after_a, after_c = (run(other, b, offset_ST=offsets)[:, BEFORE:] for other in (a, c))
    except TypeError:  # the model takes no positions
        return False
    first, joined = run(b, a)[:, :OWN], run(a, b)[:, BEFORE:]
    effect, leak, noise = (x.norm() for x in (joined - first, after_a - after_c, after_a - first))
    return bool((effect > 0) & (leak <= LEAK * effect) & (noise <= NOISE * effect))


def refusal(model: str, attention: str) -> UserError:
    """The error that says what to do where sequences are not kept apart."""
    import transformers

    return UserError(
        f"`data.packing` is true, but `{model}` with `{attention}` attention under transformers"
        f" {transformers.__version__} was not found to keep packed sequences apart: rows might see each other; set"
        " `data.packing: false`, or try `model.policy.attn_implementation: sdpa` or a newer transformers."
    )
