"""Making a token store: documents -> deduplicated -> split -> tokenizer -> packed blocks. Never imports the model."""
