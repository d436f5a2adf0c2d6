"""The train step with data.document_mask: packed documents, and examples, train as each alone."""

import dataclasses
import json

import jax
import numpy as np
import optax
import pytest
from support.initial import params_on
from support.tiny import tiny_config
from support.tiny_tokenizers import tiny_byte_level

from btlm_jax.corpus.engine.workers import LocalWorkers
from btlm_jax.corpus.stages.examples import ExamplesConfig, make_example_store
from btlm_jax.data.loader import document_starts, read_rows
from btlm_jax.data.reader import open_store
from btlm_jax.model import parameter_table
from btlm_jax.parallel.make_mesh import make_run_mesh
from btlm_jax.parallel.mesh import batch_sharding, evaluation_sharding, num_ways, rules_for
from btlm_jax.recipe.config import TAKE_FINITE
from btlm_jax.train.heldout import make_eval_step
from btlm_jax.train.program import make_program
from btlm_jax.train.step import make_state, make_train_step

EOS = 3
NUM_ROWS, ACCUMULATION = 40, 20  # of a batch; rows that are not needed have no weight
PACKED_ERROR = 1e-5


def packed_rows(*, batch: int, length: int, seed: int) -> dict[str, np.ndarray]:
    """Return rows of a stream of documents of 1 to 30 ids, each begun by EOS; the first is begun before the row."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(EOS + 1, 300, (batch, length + 1)).astype(np.int32)
    for row in tokens:
        begins = np.cumsum(rng.integers(1, 30, length))
        row[begins[begins <= length]] = EOS
    inputs = tokens[:, :-1]
    starts = document_starts(inputs, np.full(batch, length), eos_id=EOS, most=length)
    weights = np.ones(inputs.shape, np.float32)
    return {"inputs_BT": inputs, "targets_BT": tokens[:, 1:], "weights_BT": weights, "starts_BT": starts}


def each_alone(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a row for each document, filled up with ids that have no weight."""
    length = rows["inputs_BT"].shape[1]
    parts = [(row, start) for row, starts in enumerate(rows["starts_BT"]) for start in np.unique(starts)]
    alone = {name: np.zeros((len(parts), length), leaf.dtype) for name, leaf in rows.items()}
    for index, (row, start) in enumerate(parts):
        own = rows["starts_BT"][row] == start
        for name in alone.keys() - {"starts_BT"}:
            alone[name][index, : own.sum()] = rows[name][row, own]
    return alone


def make_differentiate(config):
    """Make a function of rows on the host to (metrics of a step, its gradients, sums of the evaluation), there too."""
    mesh = make_run_mesh(config.mesh, curriculum=config.curriculum.table, devices=jax.devices())
    rules = rules_for(NUM_ROWS, mesh=mesh, config=dataclasses.replace(config.mesh, accumulation=ACCUMULATION))
    assert [num_ways(mesh, axes) for axes in (rules.batch, rules.length, rules.act_heads)] == [2, 2, 2]
    model = make_program(config, mesh).model.clone(rules=rules)
    optimizer = optax.with_extra_args_support(optax.trace(decay=0.0))  # its state are the last gradients
    state = make_state(params_on(mesh, model, seed=config.seed), optimizer, mesh)
    loss_chunk = config.model.loss_chunk
    train_step = jax.jit(
        make_train_step(model, optimizer, parameter_table(model, mesh), loss_chunk=loss_chunk, rule=TAKE_FINITE)
    )
    eval_step = jax.jit(make_eval_step(model, loss_chunk=loss_chunk))

    def differentiate(rows: dict[str, np.ndarray]):
        rows = {name: np.pad(leaf, ((0, NUM_ROWS - len(leaf)), (0, 0))) for name, leaf in rows.items()}
        split = {name: leaf.reshape(ACCUMULATION, -1, leaf.shape[-1]) for name, leaf in rows.items()}
        with jax.set_mesh(mesh):
            after, metrics = train_step(state, jax.device_put(split, batch_sharding(mesh, rules)), 0.0)
            sums = eval_step(state.params, jax.device_put(rows, evaluation_sharding(mesh)))
        return jax.device_get((metrics, after.opt_state.trace, sums))

    return differentiate


def assert_close(found, expected) -> None:
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        # The floor is for the key bias, whose true gradient is zero.
        atol = PACKED_ERROR * max(np.abs(b).max(), 1e-2 * largest)
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def differentiate():
    return make_differentiate(
        tiny_config(
            model__attention="cpu", model__remat="full", data__document_mask=True,
            mup__init_std=1.0,  # large enough for attention to matter
            mesh__tensor=2, mesh__context=2,
        )
    )  # fmt: skip


def example_rows(folder, *, length: int) -> dict[str, np.ndarray]:
    """Return the windows of a store of prompts and completions, as training reads them."""
    tiny_byte_level().save(str(folder / "tokenizer.json"))
    rng = np.random.default_rng(4)
    lines = [{"prompt": "a" * rng.integers(0, 20), "completion": "b" * rng.integers(1, 25)} for _ in range(20)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = ExamplesConfig(
        inputs=(folder / "pairs.jsonl",), tokenizer=folder, template="", template_name="", block_len=2 * length,
        window=length, too_long="drop", most_examples=0, heldout=0.1, seed=0, max_bad_rate=0.0, allow_lossy=False,
    )  # fmt: skip
    make_example_store(config, output=folder / "store", workers=LocalWorkers(1), log=print)
    reader = open_store(folder / "store", expected_fingerprint="").split("train")
    places = [(block, start) for block in range(len(reader)) for start in (0, length)]
    return read_rows(reader, places, seq_len=length, most_documents=length)


@pytest.mark.slow
def test_examples_of_a_window_train_as_each_alone(differentiate, tmp_path):
    """Loss and gradients of completions: what is packed with them and padding change nothing."""
    rows = example_rows(tmp_path, length=48)
    alone = each_alone(rows)
    assert len(rows["inputs_BT"]) <= 14 and 18 < len(alone["inputs_BT"]) <= NUM_ROWS
    expected, gradients, _ = differentiate(alone)
    metrics, found, _ = differentiate(rows)
    assert metrics["weight"] == expected["weight"] == rows["weights_BT"].sum() < 0.8 * rows["weights_BT"].size
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=PACKED_ERROR)
    assert_close(found, gradients)
    for name, changed in (
        ("starts_BT", np.zeros_like(rows["starts_BT"])),
        ("weights_BT", np.ones_like(rows["weights_BT"])),
    ):  # otherwise nothing above could tell
        other, *_ = differentiate({**rows, name: changed})
        assert abs(other["loss"] / metrics["loss"] - 1) > 1e-3, name


@pytest.mark.slow
def test_packed_documents_train_as_each_alone(differentiate):
    """On a mesh that splits sequences, positions and heads, with accumulation and remat."""
    rows = packed_rows(batch=8, length=48, seed=1)
    alone = each_alone(rows)
    assert 20 < len(alone["inputs_BT"]) <= NUM_ROWS
    expected, gradients, expected_sums = differentiate(alone)
    metrics, found, sums = differentiate(rows)
    assert metrics["weight"] == expected["weight"] == rows["weights_BT"].sum()
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=PACKED_ERROR)
    assert_close(found, gradients)
    for name in ("loss_T", "weight_T"):  # by position in the document, as each alone has it
        np.testing.assert_allclose(sums[name], expected_sums[name], rtol=PACKED_ERROR, atol=PACKED_ERROR, err_msg=name)
    as_one, *_ = differentiate({**rows, "starts_BT": np.zeros_like(rows["starts_BT"])})
    assert abs(as_one["loss"] / metrics["loss"] - 1) > 1e-2  # otherwise nothing above could tell
