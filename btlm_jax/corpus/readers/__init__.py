"""Read documents from files: JSON lines, Parquet, Arrow, TFDS, plain text; compressed or not."""
