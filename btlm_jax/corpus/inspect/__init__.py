"""Inspect a corpus: documents, statistics, charts."""
