"""Near-duplicate detection: normalisation, MinHash signatures, locality-sensitive hashing."""
