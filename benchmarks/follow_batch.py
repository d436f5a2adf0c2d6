"""Count the files and lines that one batch passes on its way from the token store to the updated weights.

Command: python benchmarks/follow_batch.py
Trains one step of a tiny model with the settings of configs/local_cpu.py on a store that it packs in a temporary
directory. Between asking the loader for a batch and holding the new state, every function of the package that runs is
recorded, on all threads, while the step is traced and not taken from a cache; a file of which one ran counts with all
its lines. A second table says the same of one matrix product, forward and backward. Exits with 1 when a count is over
its limit.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import runpy
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

import btlm_jax
from btlm_jax.corpus.pack import pack, write_shards
from btlm_jax.data import store
from btlm_jax.data.loader import TrainLoader
from btlm_jax.data.reader import open_store
from btlm_jax.model.projection import make_projection, project_scheduled
from btlm_jax.parallel.make_mesh import make_run_mesh
from btlm_jax.parallel.mesh import RULES, batch_sharding
from btlm_jax.recipe.config import TrainConfig, train_config_from
from btlm_jax.recipe.optimizer import rates_of_steps
from btlm_jax.train.program import make_program
from btlm_jax.train.step import init_state

PACKAGE = Path(btlm_jax.__file__).parent
CONFIG = Path(__file__).parent.parent / "configs" / "local_cpu.py"
MAX_FILES, MAX_LINES = 20, 2_950  # of a batch; what a CPU's kernels need are some 120 lines
MAX_PRODUCT_FILES, MAX_PRODUCT_FUNCTIONS = 3, 12
B, T, D, F, N, V = 4, 32, 64, 170, 4, 300
_PARTS = ("<module>", "<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>")  # of what is around them


class Calls:
    """The functions of the package that ran, by file, both in the order of their first calls."""

    def __init__(self) -> None:
        self.functions: dict[Path, list[str]] = {}

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the functions that run inside, in this thread and in those that start meanwhile."""
        threading.settrace(self._record)
        sys.settrace(self._record)
        try:
            yield
        finally:
            sys.settrace(None)
            threading.settrace(None)

    @property
    def num_functions(self) -> int:
        return sum(map(len, self.functions.values()))

    @property
    def num_lines(self) -> int:
        return sum(map(_num_lines, self.functions))

    def table(self) -> str:
        """Return a row a file and one of totals."""
        rows = [("file", "lines", "functions")]
        for path, names in self.functions.items():
            rows.append((str(path.relative_to(PACKAGE)), f"{_num_lines(path):,}", ", ".join(names)))
        rows.append((f"{len(self.functions)} files", f"{self.num_lines:,}", f"{self.num_functions} functions"))
        return "\n".join(f"{file:<28}{lines:>7}  {names}" for file, lines, names in rows)

    def _record(self, frame, event, argument) -> None:
        del event, argument
        code = frame.f_code
        if code.co_filename.startswith(str(PACKAGE)) and code.co_name not in _PARTS:
            names = self.functions.setdefault(Path(code.co_filename), [])
            if code.co_qualname not in names:
                names.append(code.co_qualname)


def follow_batch(directory: Path) -> Calls:
    """Record one training step on a store that is packed in `directory`."""
    config = _config()
    _pack_store(directory, block_len=config.curriculum.table.block_len)
    curriculum = config.curriculum.table
    mesh = make_run_mesh(config.mesh, curriculum=config.curriculum.table, devices=jax.devices()[:1])
    program = make_program(config, mesh)
    state = init_state(program.model, program.optimizer, mesh, seed=config.seed)
    loader = TrainLoader(
        open_store(directory, expected_fingerprint=""),
        curriculum=curriculum,
        data=config.data,
        accumulation=config.mesh.accumulation,
        shardings=[batch_sharding(mesh, program.rules_for(phase)) for phase in curriculum.phases],
    )
    rates = rates_of_steps(config.optimizer, curriculum)  # as a run does, before its first step
    jax.clear_caches()  # making the program traced the model
    before, calls = jax.device_get(state.params), Calls()
    with jax.set_mesh(mesh), contextlib.closing(loader.batches(first_step=0)) as batches, calls.recorded():
        step, batch = next(batches)
        train_step = program.compile(program.trace_train_step(curriculum.phase_at(step)))
        state, _ = train_step(state, batch, np.float32(rates[step]))
    assert any(
        np.any(old != new) for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True)
    )
    return calls


def follow_product() -> Calls:
    """Record the product of one layer's projection `up`, forward and backward."""
    config = _config()
    mesh = make_run_mesh(config.mesh, curriculum=config.curriculum.table, devices=jax.devices()[:1])
    calls = Calls()
    with jax.set_mesh(mesh):
        projection = make_projection(in_shape=(D,), in_axes=("embed",), out_shape=(F,), out_axes=("mlp",), rules=RULES)
        x_BTD = jax.device_put(jnp.ones((B, T, D)), jax.NamedSharding(mesh, projection.x_spec))
        kernel_DF = jax.device_put(jnp.ones((D, F)), jax.NamedSharding(mesh, projection.kernel_spec))
        bias_F = jax.device_put(jnp.ones(F), jax.NamedSharding(mesh, projection.bias_spec))
        with calls.recorded():
            y_BTF, pull = jax.vjp(functools.partial(project_scheduled, projection), x_BTD, kernel_DF, bias_F)
            pull(y_BTF)
    return calls


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        batch = follow_batch(Path(directory) / "store")
    product = follow_product()
    print(f"One batch, from the store to the updated weights:\n\n{batch.table()}\n")
    print(f"One matrix product, forward and backward:\n\n{product.table()}\n")
    problems = [
        f"{number:,} {what} are more than {limit:,}"
        for what, number, limit in (
            ("files of a batch", len(batch.functions), MAX_FILES),
            ("lines of a batch", batch.num_lines, MAX_LINES),
            ("files of a product", len(product.functions), MAX_PRODUCT_FILES),
            ("functions of a product", product.num_functions, MAX_PRODUCT_FUNCTIONS),
        )
        if number > limit
    ]
    print("\n".join(problems) or "Within the limits")
    return 1 if problems else 0


def _config() -> TrainConfig:
    values = runpy.run_path(str(CONFIG))["get_config"]().to_dict()
    values["model"] |= dict(vocab_size=V, num_layers=2, d_model=D, num_heads=N, d_ff=F)
    values["curriculum"] = dict(seq_len=(T,), batch_size=(B,), num_tokens=(10 * B * T,))
    values["optimizer"]["warmup_tokens"] = 2 * B * T
    return train_config_from(values)


def _pack_store(directory: Path, *, block_len: int) -> None:
    """Pack documents of random tokens."""
    directory.mkdir()
    rng, eos_id, dtype = np.random.default_rng(0), 0, store.token_dtype(V)
    documents = [rng.integers(1, V, rng.integers(5, 100)).tolist() for _ in range(100)]
    blocks = list(pack(documents, block_len=block_len, eos_id=eos_id, dtype=dtype))
    splits = {
        name: store.Split(
            num_blocks=len(blocks),
            num_tokens=sum(block.num_targets for block in blocks),
            shards=tuple(write_shards(directory, split=name, blocks=blocks)),
            sources={},
        )
        for name in (store.TRAIN, store.HELDOUT)
    }
    (directory / "tokenizer.model").write_bytes(b"")  # nothing here reads it
    tokenizer = store.TokenizerInfo(
        kind="sentencepiece", file="tokenizer.model", sha256="", vocab_size=V, eos_id=eos_id
    )
    store.write_manifest(
        directory,
        store.Manifest(block_len=block_len, dtype=dtype, tokenizer=tokenizer, splits=splits, features=(), made_by={}),
    )


def _num_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


if __name__ == "__main__":
    sys.exit(main())
