"""Convert a model to another form and prove that it computes the same: Hugging Face, ours, Jais, GGUF, 4 bits."""
