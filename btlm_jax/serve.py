"""A model at the terminal: load its weights and its tokenizer, write a continuation as it is made."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from btlm_jax.convert.native import NativeModel
from btlm_jax.convert.source import load_native
from btlm_jax.generate import Sampling, generate

PARTIAL = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer decodes the first bytes of a longer character to


def load_for_text(directory: Path) -> NativeModel:
    """Load a model with its tokenizer: a run's last checkpoint, a model directory, a Hugging Face directory.

    Raises:
      FileNotFoundError: there is no model or no tokenizer.
      ValueError: one of them is damaged.
    """
    native = load_native(directory)
    if native.tokenizer is None:
        raise FileNotFoundError(f"{directory} holds no tokenizer, which text needs; put its files beside the weights")
    return native


def stream_continuation(directory: Path, *, prompt: str, num_tokens: int, sampling: Sampling, seed: int) -> None:
    """Print the prompt and its continuation as it is made, and the speed to the error stream."""
    native = load_for_text(directory)
    model, tokenizer = native.facts.network(), native.tokenizer
    ids = [tokenizer.eos_id, *tokenizer.encode(prompt)]  # a document begins after the end of another
    print(prompt, end="", flush=True)
    made, shown = [], ""
    start = time.perf_counter()
    first = start
    for tokens in generate(
        model,
        native.params,
        native.mesh,
        prompts=[ids],
        num_tokens=num_tokens,
        sampling=sampling,
        seed=seed,
        stop_id=tokenizer.eos_id,
        cache_dtype=model.config.dtype,
    ):
        first = time.perf_counter() if not made else first
        made.append(tokens[0])
        whole = tokenizer.decode(made)
        ready = whole.rstrip(PARTIAL)
        print(printable(ready[len(shown) :]), end="", flush=True)
        shown = ready
    print(printable(tokenizer.decode(made)[len(shown) :]))
    end = time.perf_counter()
    print(
        f"{len(made)} tokens after a prompt of {len(ids)}: first token after "
        f"{first - start:.2f} s with compilation, then {max(len(made) - 1, 0) / max(end - first, 1e-9):.1f} tokens/s",
        file=sys.stderr,
    )


def printable(text: str) -> str:
    """Return the text with control characters replaced: a young model makes them, and a terminal would obey them."""
    return "".join(c if c.isprintable() or c == "\n" else PARTIAL for c in text)
