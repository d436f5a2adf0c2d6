"""The mesh and the rules."""

import jax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from support.tiny import tiny_config

from btlm_jax.parallel.make_mesh import make_mesh, make_run_mesh
from btlm_jax.parallel.mesh import MANY_SEQUENCES, RULES, rules_for
from btlm_jax.recipe.config import check_divisible


def test_the_mesh_is_explicit_and_takes_every_device():
    mesh = make_mesh(devices=jax.devices(), tensor=2)
    assert dict(mesh.shape) == {"fsdp": 4, "batch_or_context": 1, "context": 1, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Explicit}
    with pytest.raises(ValueError, match="mesh.tensor=3 does not divide the 8 devices"):
        make_mesh(devices=jax.devices(), tensor=3)
    config = tiny_config(mesh__tensor=2, mesh__context=3)
    with pytest.raises(ValueError, match="mesh.tensor=2 x mesh.context=3 does not divide the 8 devices"):
        make_run_mesh(config.mesh, curriculum=config.curriculum.table, devices=jax.devices())


def test_rules_give_specs():
    assert RULES.spec("layers", "embed", "heads", "head_dim") == P(None, ("fsdp", "tensor"), None, None)
    assert RULES.spec("batch", "length", "act_heads", "head_dim") == P(
        "fsdp", ("batch_or_context", "context"), "tensor", None
    )
    assert MANY_SEQUENCES.spec("batch", "length") == P(("fsdp", "batch_or_context"), "context")
    with pytest.raises(AttributeError):
        RULES.spec("width")


@pytest.mark.parametrize(
    "context, accumulation, batches, shape, phases_of_many",
    [
        (1, 1, (16, 8), (8, 1, 1), (True, True)),  # sequences enough for every device
        (2, 2, (16, 8), (4, 2, 1), (True, False)),  # 16 fill 4 x 2 ways, 8 only 4
        (4, 4, (16, 8), (2, 2, 2), (True, False)),  # even 16 leave 2 ways to positions
        (4, 1, (4, 2), (2, 2, 2), (True, False)),
    ],
)
def test_each_phase_splits_positions_the_fewest_ways_that_its_batch_allows(
    context, accumulation, batches, shape, phases_of_many
):
    tokens = tuple(batch * length for batch, length in zip(batches, (24, 24 * batches[0] // batches[1]), strict=True))
    config = tiny_config(
        mesh__context=context, mesh__accumulation=accumulation, curriculum__batch_size=batches,
        curriculum__num_tokens=tokens, optimizer__warmup_tokens=0, evaluation__batch_size=8,
    )  # fmt: skip
    check_divisible(config, num_devices=8)
    mesh = make_run_mesh(config.mesh, curriculum=config.curriculum.table, devices=jax.devices())
    assert tuple(mesh.shape[axis] for axis in ("fsdp", "batch_or_context", "context")) == shape
    rules = [rules_for(batch, mesh=mesh, config=config.mesh) for batch in batches]
    assert [each == MANY_SEQUENCES for each in rules] == list(phases_of_many)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"curriculum__batch_size": (12, 6), "curriculum__num_tokens": (288, 288), "optimizer__warmup_tokens": 0},
         r"batch_size of phase 1=12 is not divisible by 8 \(mesh fsdp 8 x mesh.accumulation 1\); nearest: 8, 16"),
        ({"mesh__accumulation": 4}, r"not divisible by 32 \(mesh fsdp 8 x mesh.accumulation 4\)"),
        ({"evaluation__batch_size": 4}, "evaluation.batch_size=4 is not divisible by 8"),
        ({"mesh__tensor": 8}, "model.num_heads=4 is not divisible by 8"),
        ({"mesh__tensor": 2, "mesh__context": 4}, r"num_heads=4 is not divisible by 8 \(mesh.tensor 2 x mesh.co"),
        ({"mesh__context": 8, "model__num_heads": 8, "curriculum__seq_len": (20, 40),
          "curriculum__num_tokens": (320, 320), "optimizer__warmup_tokens": 0}, "phase 1=20 is not divisible by 8"),
        ({"model__d_model": 36}, "model.d_model=36 is not divisible by 8"),
        ({"mesh__context": 3}, "mesh.tensor=1 x mesh.context=3 does not divide the 8 devices"),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_named_with_the_nearest_that_do(change, message):
    with pytest.raises(ValueError, match=message):
        check_divisible(tiny_config(**change), num_devices=8)


@pytest.mark.parametrize("tensor, context", [(1, 1), (2, 1), (4, 1), (2, 2), (1, 4)])
def test_the_tiny_config_divides(tensor, context):
    check_divisible(tiny_config(mesh__tensor=tensor, mesh__context=context), num_devices=8)
