"""The corpus of the local run: the documentation in this Python installation, deduplicated, as a token store."""
