"""The PyTorch files that every exported Hugging Face directory carries; copied as they are."""
