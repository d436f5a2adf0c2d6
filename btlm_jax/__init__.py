"""Train BTLM-3B-8K style language models in JAX. See docs/internals/map.md for the map of the files."""

__version__ = "0.1.0"
