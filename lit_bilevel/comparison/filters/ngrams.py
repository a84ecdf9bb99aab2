"""Hashed n-gram importance resampling: rows whose words look like those of the validation rows.

    log w_i = Σ_{n-grams of row i} log p(h) − log q(h)          h the bucket of an n-gram, n = 1, 2
    rows with the largest log w_i + Gumbel noise are a sample in proportion to w, without replacement

p and q are bucket frequencies among validation and pool rows, with one count added to each bucket. The idea is that of
DSIR (Xie et al., arXiv 2302.03169). Left out: its quality filter.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from lit_bilevel.comparison.filters.base import Filter
from lit_bilevel.comparison.filters.evidence import Evidence

BUCKETS = 10_000
WORD = re.compile(r"\w+|[^\w\s]")


class NgramImportance(Filter):
    """Draws rows by the ratio of n-gram frequencies in validation and pool."""

    def scores(self, evidence: Evidence) -> np.ndarray:
        log_weight_N = log_importance(evidence.texts("pool"), evidence.texts("upper"))
        return log_weight_N + np.random.default_rng(evidence.seed).gumbel(size=len(log_weight_N))


def log_importance(pool: Sequence[str], target: Sequence[str]) -> np.ndarray:
    """[N] log w_i of the texts of a pool.

    Args:
        pool: N texts.
        target: texts that the pool should look like.
    """
    hashed = [buckets(text) for text in pool]
    ratio = np.log(_frequencies(buckets(text) for text in target)) - np.log(_frequencies(hashed))
    row = np.repeat(np.arange(len(hashed)), [len(part) for part in hashed])
    return np.bincount(row, ratio[np.concatenate(hashed)], minlength=len(hashed))


def buckets(text: str) -> np.ndarray:
    """Buckets of the words and pairs of words of a text."""
    words = WORD.findall(text.lower())
    pairs = (f"{a} {b}" for a, b in itertools.pairwise(words))
    return np.array([zlib.crc32(gram.encode()) % BUCKETS for gram in (*words, *pairs)], dtype=np.int64)


def _frequencies(texts: Iterable[np.ndarray]) -> np.ndarray:
    counts = np.ones(BUCKETS)
    for part in texts:
        counts += np.bincount(part, minlength=BUCKETS)
    return counts / counts.sum()
