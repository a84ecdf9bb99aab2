"""Reads back, counts and shows what a run wrote about its weights."""
