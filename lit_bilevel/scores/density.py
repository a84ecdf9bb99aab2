"""Estimates how much more likely a row is among trusted rows than in the pool, from what a pass says of both.

    w(x) = p_trusted(x) / p_pool(x) = odds of `trusted`, classes balanced      scaled to mean 1 over the pool

Under covariate shift these are the weights that make the pool's expectation the trusted one (Shimodaira, 2000). The
odds come from a logistic regression on the features, each standardised on the rows it is fitted on; of what was
measured also on their squares, cut at 5 standard deviations. It is cross-fitted: rows of pool and validation are dealt
out to folds alike, and a row's odds come from the fit without its fold, so no row is told apart because its own label
was learned.

The strength of the penalty is chosen for every fold, by log loss with balanced classes on further folds of the rows
fitted on: how well membership is told. Nothing else is looked at, a truth file least of all.
Of a larger pool 20,000 rows drawn by lot are fitted on (5,000 with hidden states); all are scored.

Left out: interactions of features, and trees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lit_bilevel.errors import UserError
from lit_bilevel.scores.columns import FEATURES

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import Pipeline


@dataclass(frozen=True)
class Regression:
    """How membership is told.

    Args:
        squares: whether the squares of the features count, too.
        most: pool rows that are fitted on at most.
        folds: of the cross-fitting.
        inner_folds: in which the strength of the penalty is chosen.
        strengths: values of C, the inverse of the penalty, that are tried.
    """

    squares: bool
    most: int
    folds: int
    inner_folds: int
    strengths: tuple[float, ...]


MEASURED = Regression(True, 20_000, 10, 5, (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0))
HIDDEN = Regression(False, 5_000, 5, 5, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1))
"""Of many features: without squares, which would be as many again, and on fewer rows, for each fit takes longer."""
LEAST_TRUSTED = 10
LIMIT = 5.0


def density_features(table_NF: np.ndarray) -> np.ndarray:
    """[N, F] what the regression looks at: the measured features, numbers of tokens by their logarithms."""
    features_NF = table_NF.astype(np.float64)
    for name in ("length", "prompt_length"):
        features_NF[:, FEATURES.index(name)] = np.log(features_NF[:, FEATURES.index(name)])
    return features_NF


def density_ratios(pool_NF: np.ndarray, trusted_MF: np.ndarray, how: Regression, seed: int = 0) -> np.ndarray:
    """[N + M] the ratio of the pool rows, whose mean is 1, and then of the trusted rows, on the same scale.

    Args:
        pool_NF: features of the pool rows; NaN for a feature that a row does not have.
        trusted_MF: the same of trusted rows.
        how: of the regression.
        seed: of the folds.

    Raises:
        UserError: if there are too few trusted rows.
    """
    if len(trusted_MF) < LEAST_TRUSTED:
        raise UserError(
            f"a density ratio needs at least {LEAST_TRUSTED} trusted rows and there are {len(trusted_MF)}; give more"
            " validation rows, or a smaller `data.monitor_fraction`."
        )
    features_nF = np.concatenate([pool_NF, trusted_MF])
    trusted_n = np.arange(len(features_nF)) >= len(pool_NF)
    log_odds_n = cross_fit_log_odds(features_nF, trusted_n, how, seed)
    ratio_n = np.exp(log_odds_n - log_odds_n[: len(pool_NF)].max())
    return ratio_n / ratio_n[: len(pool_NF)].mean()


def cross_fit_log_odds(
    features_nF: np.ndarray, trusted_n: np.ndarray, how: Regression = MEASURED, seed: int = 0
) -> np.ndarray:
    """[n] log odds of being trusted with balanced classes; no row's own label counts in its own odds.

    Args:
        features_nF: features of all rows.
        trusted_n: whether each row is trusted.
        how: of the regression.
        seed: of the folds.
    """
    log_odds_n = np.empty(len(features_nF))
    for fitted, held in _folds(len(features_nF), how.folds, seed):
        fitted = _draw(fitted, trusted_n, how.most, seed)
        features, trusted = features_nF[fitted], trusted_n[fitted]
        basis = _basis(how.squares).fit(features)
        model = _regression(_choose_strength(features, trusted, how, seed)).fit(basis.transform(features), trusted)
        log_odds_n[held] = model.decision_function(basis.transform(features_nF[held]))
    return log_odds_n


def _folds(rows: int, count: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions to fit on and positions held out, whatever the labels."""
    fold_n = np.random.default_rng(seed).permutation(rows) % count
    for fold in range(count):
        yield (fold_n != fold).nonzero()[0], (fold_n == fold).nonzero()[0]


def _draw(rows: np.ndarray, trusted_n: np.ndarray, most: int, seed: int) -> np.ndarray:
    """The trusted ones of some rows, and at most so many of the others."""
    others = rows[~trusted_n[rows]]
    if len(others) <= most:
        return rows
    others = np.random.default_rng(seed).choice(others, most, replace=False)
    return np.sort(np.concatenate([rows[trusted_n[rows]], others]))


def _choose_strength(features_nF: np.ndarray, trusted_n: np.ndarray, how: Regression, seed: int) -> float:
    """C with the lowest log loss on held-out rows, classes balanced; of equal ones the smallest."""
    loss = np.zeros(len(how.strengths))
    for fitted, held in _folds(len(features_nF), how.inner_folds, seed + 1):
        basis = _basis(how.squares)
        fitted_nF, held_nF = basis.fit_transform(features_nF[fitted]), basis.transform(features_nF[held])
        for number, strength in enumerate(how.strengths):
            model = _regression(strength).fit(fitted_nF, trusted_n[fitted])
            wrong = model.decision_function(held_nF) * np.where(trusted_n[held], -1, 1)
            nll = np.logaddexp(0, wrong)
            loss[number] += sum(nll[trusted_n[held] == kind].mean() for kind in np.unique(trusted_n[held]))
    return how.strengths[int(loss.argmin())]


def _basis(squares: bool) -> Pipeline:
    """Features and perhaps their squares, standardised on the rows that it is fitted on."""
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    more = [FunctionTransformer(_with_squares), StandardScaler()]  # or the penalty would weigh squares otherwise
    return make_pipeline(
        SimpleImputer(keep_empty_features=True),  # a feature that a row does not have is as in the mean of rows
        StandardScaler(),
        *(more if squares else ()),
    )


def _regression(strength: float) -> LogisticRegression:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, class_weight="balanced", max_iter=2000)


def _with_squares(scaled_nF: np.ndarray) -> np.ndarray:
    cut_nF = scaled_nF.clip(-LIMIT, LIMIT)
    return np.concatenate([cut_nF, cut_nF**2], axis=1)
