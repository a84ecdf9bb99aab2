"""What the scoring pass says of a row: names, units, and which end of a column speaks for a row.

    loss                  mean NLL of the response's tokens, end token included, nats
    loss_without_prompt   the same with the prompt taken away; NaN for a row that has none
    pmi                   loss_without_prompt − loss: what the prompt tells about a token of the response, nats
    ifd                   loss / loss_without_prompt: Instruction-Following Difficulty (arXiv 2308.12032)
    end_loss              NLL of the end token; NaN where the response was cut
    entropy               mean entropy of the predictions, nats
    length                tokens of the response
    compressed            size of the response, compressed by zlib, over its size in bytes
    density_ratio         how much more likely the row is among trusted rows than in the pool, mean 1 over the pool:
                          from numbers such as those above
    hidden_ratio          the same, from the policy's last hidden states
    combined              `ifd` and both ratios added by their ranks (`combination.py`), standard deviation 1

`ifd` is the published ratio. The paper keeps rows with a *high* one, below 1, to find hard examples in clean data; in
unclean data a row whose prompt does not help is mostly a wrong one, so a *low* one is kept. Left out: other sums; the
`columns` of `ScoredPrior` name them.
"""

from __future__ import annotations

COLUMNS = (
    *("loss", "loss_without_prompt", "pmi", "ifd", "end_loss", "entropy", "length", "compressed"),
    *("density_ratio", "hidden_ratio", "combined"),
)
"""The numbers of a row in the file of scores, after its `id`."""

FEATURES = (
    *("loss", "loss_without_prompt", "end_loss", "entropy", "length", "compressed"),
    *("loss_before_end", "loss_before_end_without_prompt", "first_loss", "largest_loss", "prompt_length"),
)
"""What is measured of a row. Those that are not columns of the file: both losses without the end token, the mean NLL of
the first three tokens, the largest NLL of a token, and the tokens of the prompt."""

DIRECTION = {
    "loss": -1,
    "loss_without_prompt": -1,
    "pmi": 1,
    "ifd": -1,
    "end_loss": -1,
    "entropy": -1,
    "length": 1,
    "compressed": 1,
    "density_ratio": 1,
    "hidden_ratio": 1,
    "combined": 1,
    "weight": 1,
}
"""1 where high values speak for a row, −1 where low ones do."""

RATIOS = ("density_ratio", "hidden_ratio")
"""Columns that are weights already; they compare with trusted rows."""

COMBINED = ("ifd", *RATIOS)
"""What `combined` adds, and where `ScoredPrior` begins the weights."""
