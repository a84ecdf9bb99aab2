"""Scores of rows that one pass of a policy tells, before anything is trained on them."""
