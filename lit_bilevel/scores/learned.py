"""Tells by what a policy has learned since which rows are clean, given how likely each was to be.

    x_i = a + d·clean_i + β·x⁰_i + ε_i        x, x⁰: −ℓ_i under the policy now and before training, as normal scores
    P(clean_i | x) ∝ p_i · N(x_i; a + d + β·x⁰_i, σ²)

A policy that was trained under the weights p knows the task better than when the rows were first judged. Of two rows
that were equally hard before, the one whose answer it now gives more readily agrees more with what it learned. For
example, of two sums that it could not do, the wrong result still surprises it and the right one does not.

a, d, β and σ come from expectation maximisation over the pool alone (Dempster, Laird and Rubin, 1977), in which p_i
stays what was known of row i before. Trusted rows have no part in it: the policy was trained on them. So d has to be
seen in p, too: where x does not rise with p from row to row, beyond chance, the probabilities stay as they are.

Left out: that a row which was trained on looks easier than one that was not; all pool rows were, alike.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

LEAST_T = 3.0
"""Standard errors by which x has to rise with p."""
LIMIT = 3.0
"""Most that one look may change the log odds of a row."""
ROUNDS, SMALL = 200, 1e-4


class Learned(NamedTuple):
    """What a second look says.

    Args:
        probability_N: [N] of every row to be clean.
        shift: d, in standard deviations of x; 0 where nothing was told.
    """

    probability_N: np.ndarray
    shift: float


def learned_since(probability_N: np.ndarray, now_N: np.ndarray, before_N: np.ndarray) -> Learned:
    """Probabilities of rows to be clean after a second look at them.

    Args:
        probability_N: [N] how likely they were to be before.
        now_N: [N] normal scores of −ℓ under the policy now.
        before_N: [N] the same under the policy before training.
    """
    from scipy.special import expit, logit

    known_N = logit(probability_N.clip(SMALL, 1 - SMALL))
    covariates_N2 = np.stack([np.ones_like(now_N), before_N], axis=1)
    if not _rises(probability_N, now_N, covariates_N2):
        return Learned(probability_N, 0.0)
    p_N, rows = probability_N, len(now_N)
    # every row twice, as a clean one and as another, each as much as it is likely to be
    design = np.concatenate([np.insert(covariates_N2, 0, clean, axis=1) for clean in (1.0, 0.0)])
    both = np.tile(now_N, 2)
    for _ in range(ROUNDS):
        root = np.sqrt(np.concatenate([p_N, 1 - p_N]))
        coefficients, *_ = np.linalg.lstsq(design * root[:, None], both * root, rcond=None)
        square = (both - design @ coefficients) ** 2
        variance = max(float((square * root**2).sum() / rows), SMALL)
        told_N = ((square[rows:] - square[:rows]) / (2 * variance)).clip(-LIMIT, LIMIT)
        last_N, p_N = p_N, expit(known_N + told_N)
        if np.abs(p_N - last_N).max() < SMALL:
            break
    shift = float(coefficients[0])
    return Learned(p_N, shift) if shift > 0 else Learned(probability_N, 0.0)


def _rises(probability_N: np.ndarray, now_N: np.ndarray, covariates_N2: np.ndarray) -> bool:
    """Whether x rises with p, at equal covariates, by more than chance."""
    design = np.insert(covariates_N2, 0, probability_N, axis=1)
    inverse = np.linalg.pinv(design.T @ design)
    coefficients = inverse @ design.T @ now_N
    rest_N = now_N - design @ coefficients
    error = np.sqrt(rest_N @ rest_N / max(len(now_N) - 3, 1) * inverse[0, 0])
    return bool(coefficients[0] > LEAST_T * error > 0)
