"""Inspection: what a run wrote about its weights, read back, counted and shown."""
