"""Looking at a corpus: documents, statistics, plots."""
