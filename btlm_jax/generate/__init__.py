"""Text in, text out: prompts, loading a model of any form, streaming."""
