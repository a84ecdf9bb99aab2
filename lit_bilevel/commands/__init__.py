"""Commands: what `lit-bilevel` does without training."""
