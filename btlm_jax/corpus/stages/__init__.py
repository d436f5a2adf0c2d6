"""The stages from raw text to tokens: clean, dedup, split, tokenizer, tokenize."""
