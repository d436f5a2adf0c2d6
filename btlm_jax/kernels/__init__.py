"""C++ kernels for CPUs: their sources, their build, and weights laid out as they read them."""
