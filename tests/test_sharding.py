"""The mesh and the rules."""

import jax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from tiny import tiny_config

from btlm_jax.sharding import RULES, check_divisible, make_mesh


def test_the_mesh_is_explicit_and_takes_every_device():
    mesh = make_mesh(devices=jax.devices(), tensor=2)
    assert dict(mesh.shape) == {"fsdp": 4, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Explicit}
    with pytest.raises(ValueError, match="mesh.tensor=3 does not divide the 8 devices"):
        make_mesh(devices=jax.devices(), tensor=3)


def test_rules_give_specs_and_gathering_drops_fsdp_only():
    assert RULES.spec("layers", "embed", "heads", "head_dim") == P(None, "fsdp", "tensor", None)
    assert RULES.gathered_spec("layers", "embed", "heads", "head_dim") == P(None, None, "tensor", None)
    assert RULES.spec("batch", "length", "act_embed") == P("fsdp", None, None)
    with pytest.raises(AttributeError):
        RULES.spec("width")


@pytest.mark.parametrize(
    "tensor, change, message",
    [
        (1, {"curriculum__batch_size": (12, 6), "curriculum__num_tokens": (288, 288), "optimizer__warmup_tokens": 0},
         r"batch_size of phase 1=12 is not divisible by 8 \(mesh fsdp 8 x mesh.accumulation 1\); nearest: 8, 16"),
        (1, {"mesh__accumulation": 4}, r"not divisible by 32 \(mesh fsdp 8 x mesh.accumulation 4\)"),
        (1, {"evaluation__batch_size": 4}, "evaluation.batch_size=4 is not divisible by 8"),
        (8, {}, "model.num_heads=4 is not divisible by 8"),
        (4, {"model__d_ff": 54}, "model.d_ff=54 is not divisible by 4 .*; nearest: 52, 56"),
        (1, {"model__d_model": 36}, "model.d_model=36 is not divisible by 8"),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_named_with_the_nearest_that_do(tensor, change, message):
    mesh = make_mesh(devices=jax.devices(), tensor=tensor)
    with pytest.raises(ValueError, match=message):
        check_divisible(tiny_config(**change), mesh)


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_the_tiny_config_divides(tensor):
    check_divisible(tiny_config(), make_mesh(devices=jax.devices(), tensor=tensor))
