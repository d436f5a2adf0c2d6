"""What a run that stops on bad numbers leaves behind for whoever looks for the reason."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from btlm_jax.data.loader import TrainLoader
from btlm_jax.data.store import TRAIN
from btlm_jax.parallel.mesh import rules_for
from btlm_jax.storage.files import write_atomically
from btlm_jax.tokenizers.tokenizer import load_tokenizer
from btlm_jax.train import CONFIG_FILE, EVIDENCE, METRICS_FILE
from btlm_jax.train.setup import Run
from btlm_jax.train.step import TrainState, make_gradients

LAST_LINES = 200  # of the metrics
_STACKED = "blocks/"  # parameters whose first dim is the layer


def write_evidence(run: Run, state: TrainState, *, step: int, loader: TrainLoader) -> Path:
    """Write a step's batch, with its texts, norms by class and layer, the config and the last metrics; return where.

    `state` is the one that the step was computed from. Every process calls it; process 0 writes.

    Raises:
      OSError: a file cannot be written.
    """
    folder = run.workdir / EVIDENCE / f"step-{step}"
    norms = _norms(run, state, step=step, loader=loader)
    if jax.process_index() != 0:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(run.token_store.directory, run.token_store.manifest.tokenizer)
    rows = []
    for window, ids in _windows(run, loader, step=step):
        known = [token for token in ids if 0 <= token < tokenizer.vocab_size]
        unknown = sorted(set(ids) - set(known))
        rows.append({**window, "text": tokenizer.decode(known), "ids": ids, "ids_without_token": unknown})
    write_atomically(folder / "batch.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_atomically(folder / "norms.json", json.dumps(norms, indent=1))
    write_atomically(folder / CONFIG_FILE, run.config.to_json())
    lines = (run.workdir / METRICS_FILE).read_bytes().splitlines(keepends=True)
    write_atomically(folder / METRICS_FILE, b"".join(lines[-LAST_LINES:]))
    return folder


def _windows(run: Run, loader: TrainLoader, *, step: int) -> list[tuple[dict[str, int], list[int]]]:
    """Return, of each row of a step's batch, where in the store it is, and its ids."""
    phase = run.config.curriculum.table.phase_at(step - 1)
    first = (step - 1 - phase.first_step) * phase.batch_size
    windows = loader.order.windows(phase, sequences=range(first, first + phase.batch_size))
    reader = run.token_store.split(TRAIN)
    found = []
    for row, window in enumerate(windows):
        (block,) = reader.read_many([window.block])
        begin = window.window * phase.seq_len
        ids = [int(token) for token in block.tokens[begin : begin + phase.seq_len + 1]]
        found.append(({"row": row, "block": int(window.block), "begin": begin}, ids))
    return found


def _norms(run: Run, state: TrainState, *, step: int, loader: TrainLoader) -> dict[str, Any]:
    """Return a step's loss, and norms of parameters, gradients and moments: by class, and by parameter and layer."""
    config = run.config
    phase = config.curriculum.table.phase_at(step - 1)
    with contextlib.closing(loader.batches(first_step=step - 1)) as batches:
        _, batch = next(batches)
    model = run.model.clone(rules=rules_for(phase.batch_size, mesh=run.mesh, config=config.mesh))
    gradients = make_gradients(model, run.table, loss_chunk=config.model.loss_chunk, z_loss=config.optimizer.z_loss)
    with jax.set_mesh(run.mesh):
        loss, weight, grads = jax.jit(gradients)(state.params, batch)
        trees = {"parameter": state.params, "gradient": grads}
        trees |= {name: optax.tree.get(state.opt_state, name) for name in ("mu", "nu")}
        norms = {name: _norms_of(tree) for name, tree in trees.items()}
    parameters, classes = {}, {}
    for info in jax.tree.leaves(run.table):
        rows = {name: found[info.path] for name, found in norms.items() if info.path in found}
        parameters[info.path] = {name: [_shown(value) for value in values] for name, values in rows.items()}
        sums = classes.setdefault(info.rule.parameter_class, dict.fromkeys(norms, 0.0))
        for name, values in rows.items():
            sums[name] += sum(value**2 for value in values)
    return {
        "step": step,
        "loss": _shown(float(loss)),
        "targets": float(weight),
        "classes": {name: {key: _shown(math.sqrt(sums[key])) for key in sums} for name, sums in classes.items()},
        "parameters": parameters,
    }


def _norms_of(tree: Any) -> dict[str, list[float]]:
    """Return, by path, the norm of each layer's part of a parameter, or the one of a parameter of no layer."""

    def norms(path: tuple, leaf: jax.Array) -> jax.Array:
        is_stacked = jax.tree_util.keystr(path, simple=True, separator="/").startswith(_STACKED)
        return jnp.sqrt(jnp.square(leaf).sum(tuple(range(int(is_stacked), leaf.ndim)))).reshape(-1)

    found = jax.device_get(jax.jit(lambda tree: jax.tree_util.tree_map_with_path(norms, tree))(tree))
    pairs = jax.tree_util.tree_leaves_with_path(found)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf).tolist() for path, leaf in pairs}


def _shown(value: float) -> float | str:
    """Return a number, as a text where JSON has none such."""
    return value if math.isfinite(value) else str(value)
