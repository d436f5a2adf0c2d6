"""Near-duplicate detection: normalisation, MinHash signatures, locality-sensitive hashing."""

MIN_CHARACTERS = 200  # SlimPajama drops documents that have fewer, normalised
