"""Methods × seeds on the same data, model and policy steps: `scripts/compare.py`, and what it is made of."""
