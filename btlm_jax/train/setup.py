"""Before the first step: join the other processes, check the workdir, make or open the store, compile every step."""

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

from btlm_jax import notices
from btlm_jax.data.reader import TokenStore, open_store
from btlm_jax.data.store import MANIFEST_FILE, Manifest
from btlm_jax.display.progress import print_line
from btlm_jax.model import Btlm
from btlm_jax.parallel.mesh import evaluation_sharding
from btlm_jax.recipe.config import CorpusConfig, DataConfig, TrainConfig
from btlm_jax.recipe.optimizer import learning_rate_at
from btlm_jax.storage.files import write_atomically
from btlm_jax.storage.location import resolve_location
from btlm_jax.train import COMPILE_CACHE
from btlm_jax.train.metric_writer import GoodputLedger
from btlm_jax.train.program import Program
from btlm_jax.train.step import abstract_batch, make_eval_step


class BuildStore(Protocol):
    """Make the token store that a config describes."""

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
    """The parts of a run, all fixed before the first step."""

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
    """Print a line, in process 0 only."""
    if jax.process_index() == 0:
        print_line(message)


def start_processes(*, distributed: bool, coordinator: str, num_processes: int, process_id: int) -> None:
    """Join the other processes of this run, if there are any; must come before anything touches a device."""
    if coordinator:
        jax.distributed.initialize(coordinator, num_processes=num_processes, process_id=process_id)
    elif distributed:
        jax.distributed.initialize()
    if (coordinator or distributed) and jax.process_index() != 0:
        notices.mute()


def make_workdir(workdir: Path) -> None:
    """Create the workdir, and write a file to it to see that this works.

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


def prepare_store(
    data: DataConfig,
    *,
    corpus: CorpusConfig,
    vocab_size: int,
    block_len: int,
    workdir: Path,
    expected_fingerprint: str,
    build_store: BuildStore,
) -> TokenStore:
    """Open the run's token store; if there is none and `corpus` names a source, build it first.

    A relative `data.store` is below the workdir; a store behind a URL is never built. `expected_fingerprint` is the one
    that the checkpoint recorded, or "" without a checkpoint.

    Raises:
      FileNotFoundError: there is no store, and corpus.source is "prepared" or data.store is a URL.
      OSError: the URL cannot be reached.
      ValueError: the store does not fit the model or is not the checkpoint's.
    """
    directory = resolve_location(workdir, data.store)
    if isinstance(directory, Path) and not (directory / MANIFEST_FILE).is_file():
        if corpus.source == "prepared" or directory.exists():
            raise FileNotFoundError(
                f"there is no token store in {directory}: it has no {MANIFEST_FILE}; point --config.data.store to one, "
                "or let the run make one (--config.corpus.source=installed_python) where nothing is yet"
            )
        if jax.process_index() == 0:
            directory.parent.mkdir(parents=True, exist_ok=True)
            build_store(
                corpus,
                vocab_size=vocab_size,
                block_len=block_len,
                seed=data.seed,
                directory=directory,
                log=log,
            )
        multihost_utils.sync_global_devices("token store made")
    token_store = open_store(directory, expected_fingerprint=expected_fingerprint)
    num_ids = token_store.manifest.tokenizer.vocab_size
    if num_ids > vocab_size:
        raise ValueError(f"token store {directory} has {num_ids:,} ids, but model.vocab_size={vocab_size:,}")
    return token_store


def make_run(program: Program, *, workdir: Path, token_store: TokenStore, ledger: GoodputLedger) -> Run:
    """Compile the train step of every phase and the evaluation step.

    All before the first step, so that a change of phase costs nothing and cannot fail.
    """
    config, mesh = program.config, program.mesh
    eval_step = make_eval_step(program.model, loss_chunk=config.model.loss_chunk)
    jax.config.update("jax_compilation_cache_dir", str(workdir.resolve() / COMPILE_CACHE))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # With XLA's own caches the directory is part of the executables' keys, and a moved workdir would find none of them.
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
