"""Reading: token store -> order -> global, sharded batches."""
