"""What must stand before the first step: a workdir that can be written, the token store, and every executable."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import jax
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from btlm_jax.data.reader import TokenStore, open_store
from btlm_jax.data.store import MANIFEST_FILE, Manifest
from btlm_jax.display.progress import print_line
from btlm_jax.model import Btlm
from btlm_jax.parallel.mesh import evaluation_sharding
from btlm_jax.recipe.config import CorpusConfig, TrainConfig
from btlm_jax.recipe.optimizer import learning_rate_at
from btlm_jax.storage.files import write_atomically
from btlm_jax.storage.location import resolve_location
from btlm_jax.train.metrics import GoodputLedger
from btlm_jax.train.program import Program
from btlm_jax.train.step import abstract_batch, make_eval_step


class BuildStore(Protocol):
    """Makes the token store that a config describes."""

    def __call__(
        self,
        config: CorpusConfig,
        *,
        vocab_size: int,
        block_len: int,
        seed: int,
        directory: Path,
        log: Callable[[str], None],
    ) -> Manifest: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What a run is made of, all of it fixed before the first step."""

    config: TrainConfig
    workdir: Path
    mesh: Mesh
    model: Btlm
    table: dict  # the parameters' tree of ParameterInfo
    optimizer: optax.GradientTransformationExtraArgs
    token_store: TokenStore
    train_steps: tuple[Callable, ...]  # one executable a phase
    eval_step: Callable
    ledger: GoodputLedger

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the update that completes `step` steps."""
        curriculum = self.config.curriculum.table
        return learning_rate_at(
            self.config.optimizer, tokens=curriculum.tokens_seen(step), total_tokens=curriculum.num_tokens
        )


def log(message: str) -> None:
    """Print a line of the run's story, from process 0."""
    if jax.process_index() == 0:
        print_line(message)


def make_workdir(workdir: Path) -> None:
    """Create the workdir and prove that it can be written to.

    Raises:
      OSError: it cannot be created or written; names it.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".writable-{jax.process_index()}"
        write_atomically(probe, "")
        probe.unlink()
    except OSError as error:
        raise OSError(f"workdir {workdir} cannot be written: {error}; choose another --workdir") from error


def prepare_store(config: TrainConfig, *, workdir: Path, expected: str, build_store: BuildStore) -> TokenStore:
    """Open the run's token store, making it first when nothing is there and the config says from what.

    data.store is taken from the workdir when it is relative; behind a URL nothing is made. `expected` is what the
    checkpoint recorded as fingerprint, or "" without one. `build_store` makes a store.

    Raises:
      FileNotFoundError: there is no store and corpus.source is "prepared", or it should be behind a URL.
      OSError: the URL cannot be reached.
      ValueError: the store does not fit the model or is not the checkpoint's.
    """
    directory = resolve_location(workdir, config.data.store)
    if isinstance(directory, Path) and not (directory / MANIFEST_FILE).is_file():
        if config.corpus.source == "prepared" or directory.exists():
            raise FileNotFoundError(
                f"there is no token store in {directory}: it has no {MANIFEST_FILE}; point --config.data.store to one, "
                "or let the run make one (--config.corpus.source=installed_python) where nothing is yet"
            )
        if jax.process_index() == 0:
            directory.parent.mkdir(parents=True, exist_ok=True)
            build_store(
                config.corpus,
                vocab_size=config.model.vocab_size,
                block_len=config.curriculum.table.block_len,
                seed=config.data.seed,
                directory=directory,
                log=log,
            )
        multihost_utils.sync_global_devices("token store made")
    token_store = open_store(directory, expected_fingerprint=expected)
    vocab_size = token_store.manifest.tokenizer.vocab_size
    if vocab_size > config.model.vocab_size:
        raise ValueError(
            f"token store {directory} has {vocab_size:,} ids, but model.vocab_size={config.model.vocab_size:,}"
        )
    return token_store


def make_run(program: Program, *, workdir: Path, token_store: TokenStore, ledger: GoodputLedger) -> Run:
    """Compile the train step of every phase and the evaluation.

    They exist before the first step, so that the switch of phases costs nothing and cannot fail.
    """
    config, mesh = program.config, program.mesh
    eval_step = make_eval_step(program.model, loss_chunk=config.model.loss_chunk)
    jax.config.update("jax_compilation_cache_dir", str(workdir.resolve() / "compile_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # XLA's own caches put the directory into the executables' keys, so that a moved workdir would find none of them.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    began = time.monotonic()
    with ledger.measure("compile"), jax.set_mesh(mesh):
        train_steps = tuple(
            program.compile(program.trace_train_step(phase)) for phase in config.curriculum.table.phases
        )
        rows = (config.evaluation.batch_size, token_store.manifest.block_len)
        heldout = abstract_batch(rows, evaluation_sharding(mesh))
        compiled_eval_step = jax.jit(eval_step).lower(program.state.params, heldout).compile()
    log(f"Compiled {len(train_steps)} phases and the evaluation in {time.monotonic() - began:.1f} s")
    return Run(
        config=config,
        workdir=workdir,
        mesh=mesh,
        model=program.model,
        table=program.table,
        optimizer=program.optimizer,
        token_store=token_store,
        train_steps=train_steps,
        eval_step=compiled_eval_step,
        ledger=ledger,
    )
