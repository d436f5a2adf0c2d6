"""Tokens in, tokens out: caches, sampling, decoders for meshes and for CPUs."""
