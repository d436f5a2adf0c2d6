"""The corpus of the local run: text that Python installations carry, deduplicated, as a token store."""
