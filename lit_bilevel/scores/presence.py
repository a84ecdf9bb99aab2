"""Tells what share of the pool is like the trusted rows, and how likely each row is to be of that share.

    p_pool = c·p_trusted + (1−c)·p_other           p_trusted(x) / p_pool(x) = σ(t(x)) / c           t(x) = a + b·x

σ(t(x)) is the probability that a pool row x is a clean one. a, b and the share c are those under which it is told best
which rows are trusted and which are of the pool, whose odds (classes balanced) are σ(t)/c: a logistic regression whose
odds cannot exceed 1/c, however good a row is. A plain one would take half of the pool to be bad wherever scores differ.
For example, where scores say nothing all rows get c; where they tell everything, clean rows get 1 and others 0.

Source: presence-only logistic regression (Ward et al., Biometrics 2009), learning from positive and unlabelled examples
(Elkan and Noto, KDD 2008). c is looked for on a grid, for the likelihood is not concave in it.

Left out: confidence intervals of c; with a hundred trusted rows it is known to a tenth or so.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

SHARES = np.linspace(0.05, 1.0, 20)
"""Values of c that are tried."""
RIDGE = 0.1
"""Penalty of mean b² over the number of trusted rows, so that scores which tell everything get no endless slope."""
MOST = 20_000
"""Pool rows that are fitted on at most."""


class Presence(NamedTuple):
    """Who is clean.

    Args:
        share: c, of the pool.
        probability_N: [N] of every pool row to be clean.
        slopes: [F] b, what each score counts.
    """

    share: float
    probability_N: np.ndarray
    slopes: np.ndarray


def presence(pool_NF: np.ndarray, trusted_MF: np.ndarray, seed: int = 0) -> Presence:
    """The share of clean rows in a pool, and every row's probability.

    Args:
        pool_NF: [N, F] scores of pool rows, each of about standard deviation 1.
        trusted_MF: [M, F] the same of trusted rows.
        seed: of the lot by which a larger pool is fitted on in part.
    """
    from scipy.optimize import minimize
    from scipy.special import expit, log_expit

    fitted_NF = pool_NF
    if len(pool_NF) > MOST:
        fitted_NF = pool_NF[np.random.default_rng(seed).choice(len(pool_NF), MOST, replace=False)]
    x_nF = np.concatenate([fitted_NF, trusted_MF])
    x_nF = np.hstack([np.ones((len(x_nF), 1)), x_nF])
    trusted_n = np.arange(len(x_nF)) >= len(fitted_NF)
    sign_n = np.where(trusted_n, 1.0, -1.0)
    balance_n = np.where(trusted_n, 0.5 / trusted_n.sum(), 0.5 / (~trusted_n).sum())
    ridge = RIDGE / len(trusted_MF) / pool_NF.shape[1]

    def loss(b: np.ndarray, share: float) -> tuple[float, np.ndarray]:
        t_n = x_nF @ b
        odds_n = sign_n * (log_expit(t_n) - np.log(share))
        # of −log σ(odds), by t: odds grow with log σ(t), whose slope is σ(−t)
        slope_n = -balance_n * expit(-odds_n) * sign_n * expit(-t_n)
        gradient = slope_n @ x_nF
        gradient[1:] += 2 * ridge * b[1:]
        return float(-(balance_n * log_expit(odds_n)).sum() + ridge * (b[1:] ** 2).sum()), gradient

    start = np.full(x_nF.shape[1], 0.5)
    fits = [(minimize(loss, start, (share,), method="L-BFGS-B", jac=True), share) for share in SHARES]
    best, share = min(fits, key=lambda fit: fit[0].fun)
    return Presence(float(share), expit(best.x[0] + pool_NF @ best.x[1:]), best.x[1:])
