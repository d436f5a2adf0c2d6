"""A model on a CPU: few rows at a time, weights of 32, 16 or 4 bits, a cache that keeps only what ALiBi lets count."""
