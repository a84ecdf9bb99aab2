"""Filters: scores of pool rows from before training, by which rows are kept or left out."""
