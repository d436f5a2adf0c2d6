"""optimizer.freeze: which parameters a pattern names, and that these stay as they are to the bit."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.tiny import tiny_config

from btlm_jax.model import freeze
from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.parallel.mesh import RULES
from btlm_jax.recipe.config import TAKE_FINITE
from btlm_jax.recipe.mup import ParameterRule
from btlm_jax.recipe.optimizer import make_optimizer
from btlm_jax.train.checkpoint import check_same_run
from btlm_jax.train.program import make_program
from btlm_jax.train.setup import describe_run
from btlm_jax.train.step import make_state, make_train_step

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


@dataclasses.dataclass(frozen=True)
class Info:
    """As much of ParameterInfo as a step reads."""

    rule: ParameterRule


class Lookup:
    """A model of two parameters."""

    rules = RULES
    parametrization = types.SimpleNamespace(output_scale=1.0)

    def apply(self, variables, ids_BT, starts_BT):
        params = variables["params"]
        return (
            params["embedding"]["embedding"].at[ids_BT].get(out_sharding=P(("fsdp", "context"), None, None))
            * params["ln_f"]["scale"]
        )


def test_a_frozen_parameter_keeps_its_bits_and_has_no_moments():
    """Also its negative zeros, where a batch has no targets; and it has no part in the norm that is clipped."""
    rule = ParameterRule(
        parameter_class="embedding", init_mean=0.0, init_std=0.0, learning_rate=1.0, weight_decay=1.0, eps=1.0
    )
    frozen = dataclasses.replace(rule, learning_rate=0.0, weight_decay=0.0, is_frozen=True)
    norm = dataclasses.replace(rule, parameter_class="norm_scale")
    table = {"embedding": {"embedding": Info(frozen)}, "ln_f": {"scale": Info(norm)}}
    optimizer = make_optimizer(tiny_config().optimizer, table)
    mesh = make_mesh(devices=jax.devices()[:1], tensor=1)
    table_VD = np.random.default_rng(0).normal(size=(11, 8)).astype(np.float32)
    table_VD[:, 0] = -0.0
    params = {"embedding": {"embedding": table_VD}, "ln_f": {"scale": np.ones(8, np.float32)}}
    ids_ABT = np.arange(2 * 3 * 4, dtype=np.int32).reshape(2, 3, 4) % 11
    batch = {"inputs_BT": ids_ABT, "targets_BT": (ids_ABT + 1) % 11, "weights_BT": np.ones((2, 3, 4), np.float32)}
    with jax.set_mesh(mesh):
        state = make_state(jax.device_put(params, NamedSharding(mesh, P())), optimizer, mesh)
        step = jax.jit(make_train_step(Lookup(), optimizer, table, loss_chunk=4, rule=TAKE_FINITE))
        after, metrics = step(state, jax.device_put(batch, NamedSharding(mesh, P())), 0.01)
        padding, _ = step(
            state, jax.device_put({**batch, "weights_BT": 0 * batch["weights_BT"]}, NamedSharding(mesh, P())), 0.01
        )
    for each in (after, padding):
        assert np.asarray(each.params["embedding"]["embedding"]).tobytes() == table_VD.tobytes()
    assert (np.asarray(after.params["ln_f"]["scale"]) != 1).all()
    assert metrics["grad_norm"] == metrics["grad_norm/norm_scale"] > 0 and not metrics["update_norm/embedding"]
    assert [leaf.shape for leaf in jax.tree.leaves(after.opt_state)] == [(), (8,), (8,)]


def test_the_plan_names_what_is_frozen():
    program = program_of(FROZEN)
    infos = jax.tree.leaves(program.table)
    counts = [sum(np.prod(info.shape) for info in infos if info.rule.is_frozen in which) for which in ([True], [False])]
    said = describe_run(program.config, program.table)
    assert (
        f"frozen, to stay as they are: {counts[0]:,} parameters of {sum(counts):,}, {counts[1]:,} are trained" in said
    )
    paths = "embedding/embedding, ln_f/bias, ln_f/scale"
    assert all(f" {path}," in f"{said.splitlines()[4]}," for path in paths.split(", "))
    size = 4 * (counts[0] + 3 * counts[1])
    assert f"(parameters + 2 AdamW moments of those that are trained): {size / 1e9:.4g} GB in all" in said


def test_a_run_goes_on_with_what_it_froze():
    before = tiny_config(optimizer__freeze="mlp")
    check_same_run(before, before, where="run")
    with pytest.raises(ValueError, match="optimizer.freeze: checkpoint 'mlp', config ''"):
        check_same_run(before, tiny_config(), where="run")
