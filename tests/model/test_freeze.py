"""optimizer.freeze: which parameters a pattern names, and that these stay as they are to the bit."""

import jax
import numpy as np
import pytest
from support.tiny import tiny_config

from btlm_jax.model import freeze
from btlm_jax.parallel.mesh import batch_sharding, make_mesh
from btlm_jax.train.checkpoint import Checkpointer, Position
from btlm_jax.train.program import make_program
from btlm_jax.train.run_summary import describe_run
from btlm_jax.train.step import init_state

FROZEN = "embedding, ln_*,mlp/*/bias"


def program_of(freeze: str):
    return make_program(tiny_config(optimizer__freeze=freeze), make_mesh(devices=jax.devices()[:1], tensor=1))


@pytest.fixture(scope="module")
def table():
    return program_of("").table


def frozen_paths(table) -> set[str]:
    return {info.path for info in jax.tree.leaves(table) if info.rule.is_frozen}


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("embedding", {"embedding/embedding"}),
        ("ln_[12]", {f"blocks/ln_{n}/{leaf}" for n in (1, 2) for leaf in ("scale", "bias")}),
        ("norm_scale", {"blocks/ln_1/scale", "blocks/ln_2/scale", "ln_f/scale"}),
        ("mlp/*/bias", {f"blocks/mlp/{name}/bias" for name in ("up", "gate", "down")}),
        ("blocks/mlp/up", {"blocks/mlp/up/kernel", "blocks/mlp/up/bias"}),
        ("attention_out", {"blocks/attention/out/kernel"}),
        ("key_bias", {"blocks/attention/key/bias"}),
    ],
)
def test_a_pattern_names_a_class_or_part_of_a_path(table, pattern, paths):
    assert frozen_paths(freeze(table, [pattern])) == paths


def test_frozen_parameters_have_no_rate_and_no_decay_and_the_others_their_own(table):
    for info, before in zip(jax.tree.leaves(freeze(table, ["mlp"])), jax.tree.leaves(table), strict=True):
        if info.rule.is_frozen:
            assert (info.rule.learning_rate, info.rule.weight_decay) == (0, 0)
        else:
            assert info == before


@pytest.mark.parametrize("pattern", ["norms", "mlp/up/kernel/x", "blocks/0", "EMBEDDING", "emb"])
def test_a_pattern_that_names_nothing_is_refused(table, pattern):
    with pytest.raises(
        ValueError, match=f"'{pattern}' matches no parameter; there are the classes embedding, .*ln_f/scale"
    ):
        freeze(table, ["mlp", pattern])


def test_freezing_all_is_refused(table):
    for patterns in (["*"], ["blocks", "embedding", "ln_f"], ["[!k]*"]):  # the last leaves key_bias, which never moves
        with pytest.raises(ValueError, match="nothing to train"):
            freeze(table, patterns)


def test_an_empty_pattern_is_refused():
    with pytest.raises(ValueError, match="has a part that is empty"):
        tiny_config(optimizer__freeze="embedding,,ln_*")


def with_negative_zeros(p):
    values = np.array(p)
    values[..., 0] = -0.0
    return jax.device_put(values, p.sharding)


def bits(tree) -> dict[str, bytes]:
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in jax.tree.leaves_with_path(tree)}


@pytest.mark.slow
def test_frozen_parameters_keep_their_bits_and_the_others_learn(tmp_path):
    """A frozen parameter has no gradient, no part in the norm that is clipped, and no moments."""
    program = program_of(FROZEN)
    state = init_state(program.model, program.optimizer, program.mesh, seed=3)
    state = state.replace(params=jax.tree.map(with_negative_zeros, state.params))
    before = bits(state.params)
    ids_BT = np.random.default_rng(0).integers(0, program.config.model.vocab_size, (1, 16, 25)).astype(np.int32)
    batch = {"inputs_BT": ids_BT[..., :-1], "targets_BT": ids_BT[..., 1:]}
    batch["weights_BT"] = np.ones(batch["inputs_BT"].shape, np.float32)
    phase = program.config.curriculum.table.phases[0]
    with jax.set_mesh(program.mesh):
        step = program.compile(program.trace_train_step(phase))
        batch = jax.device_put(batch, batch_sharding(program.mesh, program.rules_for(phase)))
        for each in (batch, batch | {"weights_BT": 0 * batch["weights_BT"]}, batch):
            state, metrics = step(state, each, np.float32(0.01))
    after, frozen = bits(state.params), frozen_paths(program.table)
    assert len(frozen) == 10
    for path in before:
        name = "/".join(path.strip("[']").split("']['"))
        if not name.endswith("key/bias"):
            assert (before[path] == after[path]) == (name in frozen), path
    assert not metrics["grad_norm/embedding"] and not metrics["update_norm/embedding"]
    of_classes = [float(value) for name, value in metrics.items() if name.startswith("grad_norm/")]
    assert metrics["grad_norm/mlp_in"] > 0
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(of_classes), rtol=1e-5)
    assert len(jax.tree.leaves(state.opt_state)) == 2 * (len(before) - len(frozen)) + 1
    said = describe_run(program.config, program.table)
    count = sum(np.prod(info.shape) for info in jax.tree.leaves(program.table) if info.path in frozen)
    assert f"frozen, to stay as they are: {count:,} parameters of" in said and "ln_f/scale" in said

    checkpointer = Checkpointer(tmp_path, config=program.config.checkpoint)
    position = Position(step=3, tokens_seen=3 * 384, store_fingerprint="abc")
    checkpointer.save(state, position=position, config=program.config)
    checkpointer.wait()
    assert bits(checkpointer.restore_state(3, abstract=program.state)) == bits(state)
    checkpointer.close()
