"""`python -m btlm_jax <verb> ...` is the same as `btlm <verb> ...`."""

from btlm_jax.cli import entry

if __name__ == "__main__":
    entry()
