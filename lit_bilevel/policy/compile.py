"""Compiles the policy (torch.compile), decoder layer by decoder layer.

Layers are compiled in place, so parameters keep their names, and one after the other, so that all of them share their
code and a deep model takes no longer to compile than a shallow one. Passes that compiled code cannot make run as they
are written: forward-mode differentiation, Hessian-vector products, and generation with its growing cache.

Left out: the embedding and the output layer, a compiled optimizer, and CUDA graphs.
"""

from __future__ import annotations

import os
import shutil

from lit_bilevel.errors import UserError
from lit_bilevel.policy.policy import Policy

COMPILERS = ("g++", "clang++", "cl")


def compile_layers(policy: Policy, on_cpu: bool) -> None:
    """Compile every decoder layer, in place; the work is done when each kind of pass is first made.

    Args:
        policy: on its device or not.
        on_cpu: whether it will run on a CPU, where a C++ compiler has to be there.

    Raises:
        UserError: if there is no compiler, or the model does not say what its layers are.
    """
    given = os.environ.get("CXX")
    if on_cpu and not any(map(shutil.which, [given] if given else COMPILERS)):
        raise UserError(
            "`model.policy.compile` is true, which needs a C++ compiler on a CPU, and there is none"
            f" ({given or ', '.join(COMPILERS)}); install one, name it in the environment variable CXX, or leave the"
            " flag out."
        )
    layers = policy.layers()
    if not layers:
        raise UserError(
            f"`model.policy.compile` is true, but `{type(policy.causal_lm).__name__}` does not say which of its parts"
            " are layers (`_no_split_modules`); leave the flag out."
        )
    for layer in layers:
        layer.compile()
    policy.compiled = True
