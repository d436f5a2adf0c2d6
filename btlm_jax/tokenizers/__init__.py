"""Tokenizers: SentencePiece, byte-level BPE, GPT-2; and text from tokens as they are generated."""
