"""Reading training data: token store -> order of windows -> global, sharded batches."""
