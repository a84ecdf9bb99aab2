"""Refinement: which rows are answered anew, how their responses share the weight of the row, the file of responses."""
