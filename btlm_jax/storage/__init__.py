"""Atomic files, and paths that may be URLs."""
