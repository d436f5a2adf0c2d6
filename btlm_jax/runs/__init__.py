"""A run from outside: what its workdir says of it, while it runs or afterwards. Nothing is written or locked there."""
