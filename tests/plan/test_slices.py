"""Several slices: what their mesh divides, what crosses between them, and what the plan says of it."""

import dataclasses
import math
import re

import jax
import pytest
from support.hlo import device_groups
from support.tiny import tiny_config
from support.tpu import needs_libtpu, quickly_compiled  # noqa: F401

from btlm_jax.parallel.make_mesh import make_run_mesh, num_slices
from btlm_jax.parallel.mesh import rules_for
from btlm_jax.plan.chips import CHIPS, slice_devices
from btlm_jax.plan.executable import Collective, read_executable
from btlm_jax.plan.slice_plan import layout_problems
from btlm_jax.plan.torus import Torus, time_collective
from btlm_jax.train.program import make_program

ATTRIBUTES = (
    'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
    '_xla_host_transfer_rendezvous="psum.7_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",'
    '_xla_megascale_transfer_type="ALL_REDUCE"}'
)
PROGRAM = f"""
ENTRY %main (p.7: s32[]) -> f32[] {{
  %p.7 = s32[]{{:T(128)}} parameter(0)
  %send = (f32[10,8,128]{{2,1,0:T(8,128)}}, u32[], token[]) send(%p.7, %after-all), channel_id=2, {ATTRIBUTES}
  %recv = (f32[10,8,128]{{2,1,0:T(8,128)}}, u32[], token[]) recv(%after-all), channel_id=1, {ATTRIBUTES}
  %send.1 = (f32[7]{{0}}, u32[], token[]) send(%p.7, %after-all), channel_id=3, is_host_transfer=true
  ROOT %fusion.5 = f32[] fusion(%p.7), kind=kLoop, calls=%other
}}

%other (p.8: s32[]) -> f32[] {{
  ROOT %p.8 = f32[] parameter(0)
}}
"""


def test_what_crosses_is_read_once_and_takes_the_network():
    (crossing,) = read_executable(PROGRAM, num_devices=8).collectives
    assert dataclasses.astuple(crossing) == ("slice-all-reduce", 4 * 10 * 8 * 128, 2, 1, True, ())
    chip = CHIPS["v5e"]
    # Two slices: each chip sends its bytes once, by an eighth of its host's 2 x 100 Gbit/s.
    torus = Torus(chip=chip, coordinates=((0, 0, 0), (1, 0, 0)), sides=(2, 1, 1), wraps=(False,) * 3)
    assert time_collective(crossing, torus).seconds == pytest.approx(4 * 10 * 8 * 128 / (200e9 / 8 / 8))
    within = Collective(
        kind="all-reduce", num_bytes=4 * 10 * 8 * 128, num_devices=2, count=1, is_asynchronous=True, groups=((0, 1),)
    )
    # A pair has one link: half to the other and the sum back.
    assert time_collective(within, torus).seconds == pytest.approx(4 * 10 * 8 * 128 / 45e9)


def test_sequences_are_split_between_slices_and_parameters_are_not():
    config, chip = tiny_config(), CHIPS["v5e"]  # batches of 16 and 8
    assert config.curriculum.batch_size == (16, 8)
    assert layout_problems(config, num_devices=8, chip=chip, slices=2) == ()
    first, *_ = layout_problems(config, num_devices=16, chip=chip, slices=2)
    assert first.startswith("curriculum.batch_size of phase 2=8 is not divisible by 16 (mesh slice 2 x fsdp 8")
    (said,) = layout_problems(config, num_devices=6, chip=chip, slices=4)[:1]
    assert said == "mesh.tensor=1 x mesh.context=1 x 4 slices does not divide the 6 devices"


def test_devices_of_a_cpu_are_one_slice():
    assert num_slices(jax.devices()) == 1


@pytest.fixture(scope="module")
def compiled(quickly_compiled):  # noqa: F811
    config = tiny_config(
        model__num_layers=2, model__d_model=128, model__num_heads=2, model__d_ff=256, model__dtype="bfloat16",
        model__vocab_size=256, model__attention="auto", mup__base_d_model=128.0, mup__base_d_ff=256.0,
        curriculum__seq_len=(128, 256), curriculum__batch_size=(16, 8), curriculum__num_tokens=(32 * 128, 16 * 256),
        optimizer__warmup_tokens=0, mesh__context=2,
    )  # fmt: skip
    devices = slice_devices("v5e:2x2", slices=2)
    assert num_slices(devices) == 2
    program = make_program(config, make_run_mesh(config.mesh, curriculum=config.curriculum.table, devices=devices))
    return program, program.compile(program.trace_train_step(config.curriculum.table.phases[0])).as_text()


@needs_libtpu
@pytest.mark.slow
def test_the_step_of_two_slices_sends_gradients_alone_over_the_network(compiled):
    program, text = compiled
    assert dict(program.mesh.shape) == {"slice": 2, "fsdp": 2, "batch_or_context": 2, "context": 1, "tensor": 1}
    rules = rules_for(16, mesh=program.mesh, config=program.config.mesh)
    assert rules.batch == ("slice", "fsdp", "batch_or_context") and rules.embed == ("fsdp", "tensor")
    exchanged = read_executable(text, num_devices=8).collectives
    crossing = [each for each in exchanged if each.kind.startswith("slice-")]
    assert {each.kind for each in crossing} == {"slice-all-reduce"}
    # Each device sends its own part of every gradient, in float32, and a few numbers of the whole batch.
    sent = sum(each.count * each.num_bytes for each in crossing)
    parameters = jax.tree.leaves(program.state.params)
    stored = sum(4 * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in parameters)
    assert 0.9 * stored < sent < 2.5 * stored
    # All else has groups within a slice: devices 0 to 3, or 4 to 7.
    within = re.findall(r" (all-[a-z-]+|reduce-scatter)(?:-start)?\((.*replica_groups=.*)", text)
    assert {"all-gather", "all-reduce"} <= {kind for kind, _ in within}
    for _, attributes in within:
        slices_of_groups = device_groups(attributes) // 4
        assert (slices_of_groups == slices_of_groups[:, :1]).all(), attributes
