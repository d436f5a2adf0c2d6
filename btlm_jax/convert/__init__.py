"""Checkpoints in and out: Hugging Face BTLM both ways, the Jais layout, GGUF. Heavy libraries are imported late."""
