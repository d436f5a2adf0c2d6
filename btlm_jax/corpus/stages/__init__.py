"""The stages from raw text to tokens: clean, dedup, split, train_tokenizer, tokenize."""
