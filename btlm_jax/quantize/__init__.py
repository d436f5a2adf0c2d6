"""4-bit weights: quantized matrices, four published methods, a whole model block by block, and its directory."""
