"""4-bit weights: what a rounded matrix is, four published methods to round one, and the walk over a whole model."""
