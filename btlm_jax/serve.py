"""A run's last checkpoint at the terminal: load the weights and the tokenizer, write a continuation as it is made."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

import jax
from jax.sharding import Mesh

from btlm_jax.checkpoint import CheckpointReader
from btlm_jax.config import TrainConfig
from btlm_jax.corpus.tokenizer import SentencePieceTokenizer, load_tokenizer
from btlm_jax.generate import Sampling, generate
from btlm_jax.model import Btlm, make_model, parameter_table
from btlm_jax.mup import make_parametrization
from btlm_jax.optimizer import make_optimizer
from btlm_jax.sharding import make_mesh
from btlm_jax.step import abstract_state
from btlm_jax.store import read_manifest

PARTIAL = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer decodes the first bytes of a longer character to


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained model, ready to run on one device."""

    model: Btlm
    params: dict
    mesh: Mesh
    tokenizer: SentencePieceTokenizer
    step: int


def load_trained(workdir: Path) -> Trained:
    """Load the last checkpoint of a run, also while the run goes on.

    Raises:
      FileNotFoundError: there is no checkpoint, or the run's token store, which holds the tokenizer, is not there.
      ValueError: the checkpoint or the tokenizer is damaged.
    """
    reader = CheckpointReader(workdir)
    try:
        step = reader.steps()[-1]
        _, config = reader.read_facts(step)
        tokenizer = _load_tokenizer(workdir, config)
        mesh = make_mesh(devices=jax.devices()[:1], tensor=1)
        model = make_model(config.model, make_parametrization(config.mup, config.model))
        table = parameter_table(model, mesh)
        state = reader.restore_state(
            step, abstract=abstract_state(table, make_optimizer(config.optimizer, table), mesh)
        )
    finally:
        reader.close()
    return Trained(model=model, params=state.params, mesh=mesh, tokenizer=tokenizer, step=step)


def stream_continuation(workdir: Path, *, prompt: str, num_tokens: int, sampling: Sampling, seed: int) -> None:
    """Print the prompt and its continuation as it is made, and the speed to the error stream."""
    trained = load_trained(workdir)
    tokenizer = trained.tokenizer
    ids = [tokenizer.eos_id, *tokenizer.encode(prompt)]  # a document begins after the end of another
    print(prompt, end="", flush=True)
    made, shown = [], ""
    start = time.perf_counter()
    first = start
    for tokens in generate(
        trained.model,
        trained.params,
        trained.mesh,
        prompts=[ids],
        num_tokens=num_tokens,
        sampling=sampling,
        seed=seed,
        stop_id=tokenizer.eos_id,
        cache_dtype=trained.model.config.dtype,
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
        f"{len(made)} tokens after a prompt of {len(ids)}, checkpoint at step {trained.step:,}: first token after "
        f"{first - start:.2f} s with compilation, then {max(len(made) - 1, 0) / max(end - first, 1e-9):.1f} tokens/s",
        file=sys.stderr,
    )


def printable(text: str) -> str:
    """Return the text with control characters replaced: a young model makes them, and a terminal would obey them."""
    return "".join(c if c.isprintable() or c == "\n" else PARTIAL for c in text)


def _load_tokenizer(workdir: Path, config: TrainConfig) -> SentencePieceTokenizer:
    directory = workdir / config.data.store
    return load_tokenizer(directory, read_manifest(directory).tokenizer)
