"""Every tokenizer (SentencePiece, byte-level BPE, GPT-2), and text from tokens as they arrive."""
