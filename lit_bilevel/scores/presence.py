"""Tells what share of the pool is like the trusted rows, and how likely each row is to be of that share.

    p_pool = c·p_trusted + (1−c)·p_other           p_trusted(x) / p_pool(x) = σ(t(x)) / c           t(x) = a + b·x

σ(t(x)) is the probability that a pool row x is a clean one. For a given c, a and b are those under which it is told
best which rows are trusted and which are of the pool, whose odds (classes balanced) are σ(t)/c: a logistic regression
whose odds cannot exceed 1/c, however good a row is. A plain one would take half of the pool to be bad wherever scores
differ.

The share c itself is told by little: a hundred trusted rows often allow shares that are 0.5 apart, and scores that say
nothing allow all. So it is not picked. Probabilities are means over a grid of c, each weighed by its likelihood, and
the share has an interval. Weights depend on it little: a wrong c scales all probabilities but the highest alike.

Source: presence-only logistic regression (Ward et al., Biometrics 2009), learning from positive and unlabelled examples
(Elkan and Noto, KDD 2008). Left out: how uncertain b is.
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
        share: c, the mean over what is likely.
        least: c is above it with a probability of 0.95.
        most: c is below it with a probability of 0.95.
        probability_N: [N] of every pool row to be clean.
        slopes: [F] b, what each score counts, at the likeliest c.
    """

    share: float
    least: float
    most: float
    probability_N: np.ndarray
    slopes: np.ndarray


def presence(pool_NF: np.ndarray, trusted_MF: np.ndarray) -> Presence:
    """The share of clean rows in a pool, and every row's probability.

    Args:
        pool_NF: [N, F] scores of pool rows, each of about standard deviation 1.
        trusted_MF: [M, F] the same of trusted rows.
    """
    from scipy.optimize import minimize
    from scipy.special import expit, log_expit, softmax

    fitted_NF = pool_NF
    if len(pool_NF) > MOST:
        fitted_NF = pool_NF[np.random.default_rng(0).choice(len(pool_NF), MOST, replace=False)]
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
    fits = [minimize(loss, start, (share,), method="L-BFGS-B", jac=True) for share in SHARES]
    # a mean over two balanced classes, so M trusted rows and as many of the pool count in the likelihood
    likelihood_C = softmax([-2 * len(trusted_MF) * fit.fun for fit in fits])
    probability_N = np.zeros(len(pool_NF))
    for likelihood, fit in zip(likelihood_C, fits, strict=True):
        probability_N += likelihood * expit(fit.x[0] + pool_NF @ fit.x[1:])
    below_C = likelihood_C.cumsum()
    least, most = (float(SHARES[min(below_C.searchsorted(level), len(SHARES) - 1)]) for level in (0.05, 0.95))
    best = fits[int(likelihood_C.argmax())]
    return Presence(float(likelihood_C @ SHARES), least, most, probability_N, best.x[1:])
