"""Planning: what is read out of a compiled program, what is counted, what is refused, and the command end to end."""

import dataclasses
import functools
import itertools
import json
import math
import sys
from unittest import mock

import jax
import numpy as np
import pytest
from support.tiny import REPOSITORY, config_dict, tiny_config
from support.tpu import needs_libtpu, quickly_compiled  # noqa: F401

from btlm_jax.attention.tpu import BACKWARD, FORWARD
from btlm_jax.cli import main
from btlm_jax.parallel.make_mesh import make_run_mesh
from btlm_jax.plan.chips import CHIPS, GIB, num_chips, slice_devices, topology_named
from btlm_jax.plan.compiling import needed_bytes
from btlm_jax.plan.estimate import attention_seconds, skipped_share, step_parts
from btlm_jax.plan.executable import (
    ELEMENTWISE,
    PREFETCH,
    PRODUCT,
    UNESTIMATED,
    Executable,
    Operation,
    read_executable,
)
from btlm_jax.plan.flop_count import DIAGONAL, OUT_OF_WINDOW, StepWork, count_step_work
from btlm_jax.plan.slice_plan import dividing_meshes, layout_problems
from btlm_jax.plan.torus import Exchange
from btlm_jax.recipe.config import MeshConfig, train_config_from
from btlm_jax.train.flops import flops_per_token
from btlm_jax.train.program import Program, make_program

# Cut down from a compiled train step: a loop of 3 in a loop of 5, a collective spread over three fusions, an exchange
# of a single device, a reduce-scatter in the form that the compiler gives it, and the three ways to write groups.
PROGRAM = """HloModule jit_step, is_scheduled=true

%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  ROOT %add.1 = f32[]{:T(128)} add(%x, %x)
}

%start (p.0: bf16[1,10,60]) -> (bf16[1,10,60], bf16[1,40,60]) {
  %p.0 = bf16[1,10,60]{2,0,1:T(2,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[1,40,60]{2,0,1:T(2,128)(2,1)} all-gather(%p.0), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={1}
  ROOT %custom-call.1 = (bf16[1,10,60]{2,0,1}, bf16[1,40,60]{2,0,1}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.2 (p.1: bf16[1,10,60]) -> bf16[1,40,60] {
  %p.1 = bf16[1,10,60]{2,0,1:T(2,128)(2,1)} parameter(0)
  %dot.9 = bf16[1,10,60]{2,0,1} add(%p.1, %p.1), backend_config={"window_config":{"estimated_cycles":"77"}}
  ROOT %all-gather.2 = bf16[1,40,60]{2,0,1:T(2,128)(2,1)} all-gather(%p.1), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={1}
}

%all-reduce-scatter (p.2: f32[16,100]) -> f32[4,100] {
  %p.2 = f32[16,100]{1,0:T(8,128)} parameter(0)
  %all-reduce.3 = f32[16,100]{1,0:T(8,128)} all-reduce(%p.2), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum
  ROOT %dynamic-slice.1 = f32[4,100]{1,0} dynamic-slice(%all-reduce.3, %p.2), dynamic_slice_sizes={4,100}
}

%inner_condition (p.3: (s32[])) -> pred[] {
  %c.3 = s32[]{:T(128)} constant(3), metadata={op_name="lt"}
  %p.3 = (s32[]{:T(128)}) parameter(0)
  %g.3 = s32[]{:T(128)} get-tuple-element(%p.3), index=0
  ROOT %lt.3 = pred[]{:T(512)} compare(%g.3, %c.3), direction=LT
}

%inner_body (p.4: (s32[])) -> (s32[]) {
  %p.4 = (s32[]{:T(128)}) parameter(0)
  %async-collective-start.1 = (bf16[1,10,60]{2,0,1}, bf16[1,40,60]{2,0,1}) fusion(%p.4), kind=kCustom, calls=%start, backend_config={"window_config":{"estimated_cycles":"10"}}
  %fusion.2 = bf16[1,40,60]{2,0,1} fusion(%p.4), kind=kOutput, calls=%async_collective_fusion.2, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %all-reduce.9 = f32[9]{0} all-reduce(%p.4), channel_id=1, replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%sum
  ROOT %t.4 = (s32[]{:T(128)}) tuple(%p.4)
}

%outer_condition (p.5: (s32[])) -> pred[] {
  %c.5 = s32[]{:T(128)} constant(5)
  %p.5 = (s32[]{:T(128)}) parameter(0)
  %g.5 = s32[]{:T(128)} get-tuple-element(%p.5), index=0
  ROOT %lt.5 = pred[]{:T(512)} compare(%g.5, %c.5), direction=LT
}

%outer_body (p.6: (s32[])) -> (s32[]) {
  %p.6 = (s32[]{:T(128)}) parameter(0)
  %while.1 = (s32[]{:T(128)}) while(%p.6), condition=%inner_condition, body=%inner_body
  %fusion.4 = f32[4,100]{1,0} fusion(%p.6), kind=kCustom, calls=%all-reduce-scatter
  ROOT %t.6 = (s32[]{:T(128)}) tuple(%p.6)
}

ENTRY %main (p.7: s32[]) -> f32[] {
  %p.7 = s32[]{:T(128)} parameter(0)
  %while.2 = (s32[]{:T(128)}) while(%p.7), condition=%outer_condition, body=%outer_body
  %all-reduce.5 = (f32[]{:T(128)}, /*index=1*/bf16[20]{0:T(1024)(128)(2,1)S(1)}) all-reduce(%p.7, %p.7), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%sum
  %collective-permute-start.1 = (f32[6]{0}, f32[6]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p.7), channel_id=1, source_target_pairs={{0,1},{1,0}}
  ROOT %fusion.5 = f32[] fusion(%p.7), kind=kLoop, calls=%other, backend_config={"window_config":{"estimated_cycles":"5"}}
}

%other (p.8: s32[]) -> f32[] {
  ROOT %p.8 = f32[] parameter(0)
}
"""  # noqa: E501

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def test_collectives_and_cycles_of_a_compiled_program():
    read = read_executable(PROGRAM, num_devices=8)
    assert read.num_cycles == 5 * 3 * (10 + 1000) + 5
    expected = {
        ("all-gather", 2 * 40 * 60, 4, 15, True, ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("reduce-scatter", 4 * 16 * 100, 4, 5, False, ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("all-reduce", 4 + 2 * 20, 8, 1, False, (tuple(range(8)),)),
        ("collective-permute", 4 * 6, 8, 1, True, ((0, 1), (1, 0))),
    }
    assert {dataclasses.astuple(collective) for collective in read.collectives} == expected


# Cut down from another: a windowed product's loop, whose counter begins at 1 and grows by 2, in a body where products
# have slices of a stack for operands and results; a gather, a scatter of rows, a copy to vector memory.
OPERATIONS = """HloModule jit_step, is_scheduled=true

%slice_of (p.0: bf16[6,64,200], p.1: s32[]) -> bf16[64,200] {
  %p.0 = bf16[6,64,200]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = s32[]{:T(128)} parameter(1)
  %dynamic-slice.1 = bf16[1,64,200]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p.0, %p.1, %p.1, %p.1), dynamic_slice_sizes={1,64,200}
  ROOT %bitcast.1 = bf16[64,200]{1,0:T(8,128)(2,1)} bitcast(%dynamic-slice.1)
}

%product (p.2: bf16[3,16,64], p.3: bf16[6,64,200], p.4: s32[], p.5: f32[6,48,200]) -> f32[6,48,200] {
  %p.2 = bf16[3,16,64]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p.3 = bf16[6,64,200]{2,1,0:T(8,128)(2,1)} parameter(1)
  %p.4 = s32[]{:T(128)} parameter(2)
  %p.5 = f32[6,48,200]{2,1,0:T(8,128)} parameter(3)
  %fusion.9 = bf16[64,200]{1,0:T(8,128)(2,1)} fusion(%p.3, %p.4), kind=kLoop, calls=%slice_of
  %convolution.1 = f32[3,16,200]{2,1,0:T(8,128)} convolution(%p.2, %fusion.9), window={size=1}, dim_labels=0bf_io0->0bf
  %bitcast.2 = f32[1,48,200]{2,1,0:T(8,128)} bitcast(%convolution.1)
  ROOT %dynamic-update-slice.1 = f32[6,48,200]{2,1,0:T(8,128)} dynamic-update-slice(%p.5, %bitcast.2, %p.4, %p.4, %p.4)
}

%condition (p.6: (s32[], bf16[6,64,200], f32[6,48,200], s32[])) -> pred[] {
  %c.6 = s32[]{:T(128)} constant(7)
  %p.6 = (s32[]{:T(128)}, bf16[6,64,200]{2,1,0}, f32[6,48,200]{2,1,0}, s32[]{:T(128)}) parameter(0)
  %g.6 = s32[]{:T(128)} get-tuple-element(%p.6), index=0
  ROOT %lt.6 = pred[]{:T(512)} compare(%g.6, %c.6), direction=LT
}

%body (p.7: (s32[], bf16[6,64,200], f32[6,48,200], s32[])) -> (s32[], bf16[6,64,200], f32[6,48,200], s32[]) {
  %p.7 = (s32[]{:T(128)}, bf16[6,64,200]{2,1,0}, f32[6,48,200]{2,1,0}, s32[]{:T(128)}) parameter(0)
  %g.7 = s32[]{:T(128)S(6)} get-tuple-element(%p.7), index=0
  %g.8 = bf16[6,64,200]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p.7), index=1
  %g.9 = f32[6,48,200]{2,1,0:T(8,128)} get-tuple-element(%p.7), index=2
  %g.10 = s32[]{:T(128)S(6)} get-tuple-element(%p.7), index=3
  %on_chip = bf16[3,16,64]{2,1,0:T(8,128)(2,1)S(1)} custom-call(%g.7), custom_call_target="AllocateBuffer"
  %fusion.1 = f32[6,48,200]{2,1,0:T(8,128)} fusion(%on_chip, %g.8, %g.7, %g.9), kind=kOutput, calls=%product, backend_config={"window_config":{"estimated_cycles":"700"}}
  %next = s32[]{:T(128)S(6)} add(%g.7, %g.10)
  ROOT %t.7 = (s32[]{:T(128)}, bf16[6,64,200]{2,1,0}, f32[6,48,200]{2,1,0}, s32[]{:T(128)}) tuple(%next, %g.8, %fusion.1, %g.10)
}

%rows (p.8: f32[500,256], p.9: s32[16]) -> bf16[16,256] {
  %p.8 = f32[500,256]{1,0:T(8,128)} parameter(0)
  %p.9 = s32[16]{0:T(128)S(1)} parameter(1)
  ROOT %gather.1 = bf16[16,256]{1,0:T(8,128)(2,1)} gather(%p.8, %p.9), offset_dims={1}, slice_sizes={1,256}
}

%add_rows (p.10: f32[500,256], p.11: s32[16], p.12: f32[16,256]) -> f32[500,256] {
  %p.10 = f32[500,256]{1,0:T(8,128)} parameter(0)
  %p.11 = s32[16]{0:T(128)S(1)} parameter(1)
  %p.12 = f32[16,256]{1,0:T(8,128)S(1)} parameter(2)
  ROOT %scatter.1 = f32[500,256]{1,0:T(8,128)} scatter(%p.10, %p.11, %p.12), update_window_dims={1}, to_apply=%sum
}

%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  ROOT %add.1 = f32[]{:T(128)} add(%x, %x)
}

ENTRY %main (p.13: f32[500,256], p.14: bf16[6,64,200], p.15: f32[6,48,200]) -> f32[500,256] {
  %p.13 = f32[500,256]{1,0:T(8,128)} parameter(0)
  %p.14 = bf16[6,64,200]{2,1,0:T(8,128)(2,1)} parameter(1)
  %p.15 = f32[6,48,200]{2,1,0:T(8,128)} parameter(2)
  %one = s32[]{:T(128)S(6)} constant(1)
  %first = s32[]{:T(128)S(6)} copy(%one)
  %two = s32[]{:T(128)S(6)} constant(2)
  %ids = s32[16]{0:T(128)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %updates = f32[16,256]{1,0:T(8,128)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %t.15 = (s32[]{:T(128)}, bf16[6,64,200]{2,1,0}, f32[6,48,200]{2,1,0}, s32[]{:T(128)}) tuple(%first, %p.14, %p.15, %two)
  %while.1 = (s32[]{:T(128)}, bf16[6,64,200]{2,1,0}, f32[6,48,200]{2,1,0}, s32[]{:T(128)}) while(%t.15), condition=%condition, body=%body
  %copy-start.1 = (bf16[6,64,200]{2,1,0:T(8,128)(2,1)S(1)}, bf16[6,64,200]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%p.14)
  %copy-done.1 = bf16[6,64,200]{2,1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start.1)
  %batched.1 = f32[4,8,128]{2,1,0:T(8,128)S(1)} convolution(%lhs, %rhs), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf, backend_config={"window_config":{"estimated_cycles":"90"}}
  %lhs = f32[4,8,16]{2,1,0:T(8,128)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %rhs = f32[4,16,128]{2,1,0:T(8,128)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %gather_fusion = bf16[16,256]{1,0:T(8,128)(2,1)} fusion(%p.13, %ids), kind=kCustom, calls=%rows
  ROOT %scatter_fusion = f32[500,256]{1,0:T(8,128)} fusion(%p.13, %ids, %updates), kind=kCustom, calls=%add_rows
}
"""  # noqa: E501


def test_operations_of_a_compiled_program():
    """Trips of 1, 3, 5; 64 x 256 in tiles of 8 x 128 for 64 x 200; of stacks a slice a trip; of tables their rows."""
    read = read_executable(OPERATIONS, num_devices=8)
    found = {each.name: each for each in read.operations}
    slices = 2 * 64 * 256 + 4 * 48 * 256  # the stack's slice read, the result's slice written
    expected = {
        "fusion.1": (PRODUCT, 700, 2.0 * 48 * 64 * 200, slices, 3),
        "copy-start.1": (PREFETCH, 0, 0.0, 2 * 6 * 64 * 256, 1),
        "batched.1": (PRODUCT, 90, 2.0 * 4 * 8 * 16 * 128, 0, 1),
        "gather_fusion": (UNESTIMATED, 0, 0.0, 2 * (2 * 16 * 256), 1),
        "scatter_fusion": (UNESTIMATED, 0, 0.0, 2 * (4 * 16 * 256), 1),
    }
    assert {name: dataclasses.astuple(each)[1:] for name, each in found.items()} == expected


def test_both_complaints_about_memory_are_read():
    chip = CHIPS["v5e"]
    whole = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. " + (
        "Used 19.25G of 15.75G hbm. Exceeded hbm capacity by 3.50G."
    )
    assert needed_bytes(whole, state_bytes=GIB, chip=chip) == 19.25 * GIB
    part = "the total memory required for HLO temporaries (113.21G) exceeds available HBM (15.75G)."
    assert needed_bytes(part, state_bytes=GIB, chip=chip) == pytest.approx(114.21 * GIB, abs=1)
    with pytest.raises(ValueError, match="does not compile for v5e: Mosaic failed"):
        needed_bytes("Mosaic failed to compile a kernel", state_bytes=GIB, chip=chip)


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "tensor"), [("none", 4), ("matmuls_saved", 1), ("full", 4)])
def test_executed_flops_are_the_closed_form(remat, tensor):
    """Attention with all scores computes twice what counts; remat computes what it did not save once more."""
    config = tiny_config(
        model__attention="reference", model__remat=remat, model__loss_chunk=12, model__d_ff=56, mesh__tensor=tensor
    )
    phase = config.curriculum.table.phases[1]
    program = make_program(
        config, make_run_mesh(config.mesh, curriculum=config.curriculum.table, devices=jax.devices())
    )
    work = count_step_work(program.trace_train_step(phase).jaxpr.jaxpr)
    model, T = config.model, phase.seq_len
    L, D, F = model.num_layers, model.d_model, model.d_ff
    again = {"none": 0, "matmuls_saved": 2 * L * D * T, "full": L * (8 * D * D + 6 * D * F + 4 * D * T)}[remat]
    per_token = flops_per_token(model, seq_len=T) + 6 * L * D * T + again
    if remat == "full":  # the block's last product, and the output's, have nothing that needs them again
        per_token -= L * 2 * D * F
    assert work.flops == pytest.approx(per_token * phase.tokens_per_step, rel=1e-9)
    assert not work.kernel_blocks and not work.distant_blocks


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["tpu", "splash"])
@pytest.mark.parametrize("remat, num_forwards", [("matmuls_saved", 1), ("full", 2)])
def test_kernels_are_counted_by_the_blocks_of_the_lower_triangle(remat, num_forwards, attention):
    T = 1536  # 3 x 3 blocks, 6 of them at or below the diagonal
    config = tiny_config(
        model__attention=attention, model__remat=remat, curriculum__seq_len=(T, T), curriculum__batch_size=(8, 8),
        curriculum__num_tokens=(8 * T, 8 * T), optimizer__warmup_tokens=8 * T, mesh__tensor=2,
    )  # fmt: skip
    program = make_program(
        config, make_run_mesh(config.mesh, curriculum=config.curriculum.table, devices=jax.devices())
    )
    phase = config.curriculum.table.phases[0]
    work = count_step_work(program.trace_train_step(phase).jaxpr.jaxpr)
    heads = phase.batch_size * config.model.num_heads * config.model.num_layers
    if attention == "splash":
        assert work.kernel_blocks == {"fwd": num_forwards * 6 * heads, "dq": 6 * heads, "dkv": 6 * heads}
        assert not work.distant_blocks
        assert work.kernel_steps == (num_forwards + 2) * 6 * heads
    else:  # of which 3 on the diagonal, 2 beside it; a program takes all the heads that a device has
        expected = {FORWARD: num_forwards * 3 * heads, BACKWARD: 3 * heads}
        assert work.kernel_blocks == expected | {name + DIAGONAL: blocks for name, blocks in expected.items()}
        assert work.distant_blocks == {
            (name, distance): blocks / 3 * share
            for name, blocks in expected.items()
            for distance, share in ((0, 2), (512, 1))
        }
        heads_together = config.model.num_heads // 2
        assert work.kernel_steps == (num_forwards + 1) * 6 * heads / heads_together


def test_attention_takes_as_long_as_on_the_device_that_sees_the_most():
    chip, T, block = CHIPS["v5e"], 8192, 512
    slopes_XN = np.array([[0.5, 0.002], [0.1, 0.03]])
    num_blocks = T // block
    pairs = {(FORWARD, (apart - 1) * block): 4 * (num_blocks - apart) for apart in range(1, num_blocks)}
    blocks = {FORWARD: sum(pairs.values()), FORWARD + DIAGONAL: 4 * num_blocks}
    work = StepWork(flops=0.0, kernel_blocks=blocks, distant_blocks=pairs, kernel_steps=0)
    attention, negligible = attention_seconds(work, slopes_XN=slopes_XN, chip=chip, num_chips=2)
    bundles = chip.kernel_bundles

    def seconds_of(slopes):  # a head of each of two sequences, or two of one: all the same
        visits = 0
        for query, key in itertools.combinations_with_replacement(range(num_blocks), 2):
            nearest = (key - query) * block - block + 1
            for slope in slopes:
                sees = nearest <= (64 + 24 * math.log(2) - math.log(1 - math.exp(-slope))) / slope
                kind = FORWARD + DIAGONAL if query == key else FORWARD if sees else FORWARD + OUT_OF_WINDOW
                visits += bundles[kind]
        return visits / chip.clock

    everything = 2 * (num_blocks * bundles[FORWARD + DIAGONAL] + num_blocks * (num_blocks - 1) / 2 * bundles[FORWARD])
    assert attention == pytest.approx(everything / chip.clock)
    assert attention - negligible == pytest.approx(max(map(seconds_of, slopes_XN)))
    assert seconds_of(slopes_XN[1]) < attention - negligible < attention
    assert attention_seconds(work, slopes_XN=None, chip=chip, num_chips=2) == (attention, 0.0)


def test_the_share_of_blocks_out_of_sight():
    slopes_XN = np.array([[1.0, 1e-6]])  # a window of 81 positions, and one without end
    blocks = {BACKWARD: 3.0, BACKWARD + DIAGONAL: 6.0, FORWARD: 30.0}
    work = StepWork(
        flops=0.0, kernel_blocks=blocks, distant_blocks={(BACKWARD, 0): 2.0, (BACKWARD, 512): 1.0, (FORWARD, 512): 9.0},
        kernel_steps=0,
    )  # fmt: skip
    # Of 3 blocks and 6 halves, half of the heads skip the one that is 512 away.
    assert skipped_share(work, slopes_XN=slopes_XN) == pytest.approx(0.5 * 1 / (3 + 3))


def test_parts_of_a_step():
    """By hand, on a v5e: 1.5e9 cycles/s, 819e9 bytes/s; a product at peak, one at bandwidth, and so on."""
    operation = functools.partial(Operation, name="x", cycles=0, flops=0.0, num_bytes=0, count=1)
    operations = (
        operation(kind=PRODUCT, cycles=3_000_000, flops=100e9, num_bytes=819_000, count=10),  # 1 ms of FLOPs, 1 us
        operation(kind=PRODUCT, cycles=3_000, flops=100e6, num_bytes=8_190_000),  # 1 us of FLOPs, 10 us of bytes
        operation(kind=ELEMENTWISE, cycles=6_000_000, num_bytes=819_000_000, count=2),  # 1 ms of bytes
        operation(kind=UNESTIMATED, num_bytes=819_000_000, count=4),
        operation(kind=PREFETCH, num_bytes=819_000_000, count=3),
    )
    executable = Executable(collectives=(), operations=operations)
    work = StepWork(flops=0.0, kernel_blocks={}, distant_blocks={}, kernel_steps=0)
    exchange = Exchange(
        kind="all-gather", num_bytes=1, num_devices=2, count=1, is_asynchronous=False, way="", seconds=0.25
    )
    parts = step_parts(
        executable, work, (exchange, dataclasses.replace(exchange, is_asynchronous=True, seconds=0.5)),
        slopes_XN=None, chip=CHIPS["v5e"], num_chips=2, peak=100e12,
    )  # fmt: skip
    expected = {
        "products": 20e-3 + 2e-6, "products_at_peak": 10e-3 + 1e-6, "elementwise": 8e-3,
        "elementwise_at_bandwidth": 2e-3, "slowest": 10e-3 + 10e-6 + 2e-3, "unestimated": 4e-3 / 0.8,
        "prefetched": 3e-3, "attention": 0.0, "negligible": 0.0, "exposed": 0.25, "asynchronous": 0.5,
    }  # fmt: skip
    assert dataclasses.asdict(parts) == pytest.approx(expected)
    assert executable.num_cycles == 30_000_000 + 3_000 + 12_000_000
    # Of the exchange beside computation, what is longer than all of that is waited for.
    assert parts.exchanged == pytest.approx(0.25 + 0.5 - parts.estimate)
    assert parts.estimate == pytest.approx(20e-3 + 2e-6 + 8e-3 + 5e-3)


def test_the_paper_on_slices_that_its_batches_do_not_divide():
    config = train_config_from(config_dict("btlm_3b_8k"))
    assert layout_problems(config, num_devices=32, chip=CHIPS["v5e"]) == ()
    first, second, *_, last = layout_problems(config, num_devices=256, chip=CHIPS["v5e"])
    assert first.startswith("curriculum.batch_size of phase 1=1920 is not divisible by 256")
    assert second.startswith("curriculum.batch_size of phase 2=480 is not divisible by 256")
    assert last.startswith("layouts of this config that divide 256 chips: mesh.tensor=1 mesh.context=8 mesh.accum")
    last = layout_problems(config, num_devices=7, chip=CHIPS["v5e"])[-1]
    assert last.startswith("no layout of this config divides 7 chips; slices that one divides: v5e:2x2, ")
    wrong = dataclasses.replace(config, mesh=MeshConfig(tensor=3, context=1, accumulation=1))
    said = layout_problems(wrong, num_devices=32, chip=CHIPS["v5e"])[0]
    assert said == "mesh.tensor=3 x mesh.context=1 does not divide the 32 devices"


def test_layouts_divide_and_come_nearest_first():
    config = train_config_from(config_dict("btlm_3b_8k"))
    # tensor, context, accumulation
    found = [dataclasses.astuple(mesh)[:3] for mesh in dividing_meshes(config, num_devices=16)]
    assert found[:5] == [(1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 1, 1), (1, 1, 3)]
    found = [dataclasses.astuple(mesh)[:3] for mesh in dividing_meshes(config, num_devices=256)]
    assert found[0] == (1, 8, 1) and (2, 4, 1) in found
    assert dividing_meshes(config, num_devices=7) == []


@needs_libtpu
@pytest.mark.parametrize("name", [f"{chip.name}:{shape}" for chip in CHIPS.values() for shape in chip.slices])
def test_every_slice_named_exists_and_has_a_device_a_chip(name):
    assert len(slice_devices(name)) == num_chips(name.partition(":")[2])


LOCAL = f"--config={REPOSITORY / 'configs' / 'local_cpu.py'}"


def run_plan(*arguments) -> int:
    words = ["plan", LOCAL, *arguments]
    with mock.patch.object(sys, "argv", ["btlm", *words]):  # config_flags looks there for what to change
        return main(words)


def test_slices_that_are_not_there_are_refused(capsys):
    assert run_plan() == 2 and "needs --topology, for example" in capsys.readouterr().err
    for topology in ("v7:2x2", "v5e", "v5e:2", "v5p-7", "b200-8"):
        assert run_plan(f"--topology={topology}") == 1
        assert "is not known; allowed are v4:{2x2x1,2x2x2," in capsys.readouterr().err


def test_without_libtpu_it_says_what_to_install(capsys):
    with mock.patch("importlib.util.find_spec", return_value=None):
        assert run_plan("--topology=v5e:2x2") == 1
    assert "pip install 'btlm_jax[tpu]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind, topology, count",
    [
        ("v5litepod-256", "v5e:16x16", 256),
        ("v5p-256", "v5p:4x4x8", 128),
        ("v4-8", "v4:2x2x1", 4),
        ("v6e-64", "v6e:8x8", 64),
    ],
)
def test_accelerator_types_count_cores_where_a_chip_has_two(kind, topology, count):
    assert topology_named(kind) == topology_named(topology) == topology
    assert num_chips(topology.partition(":")[2]) == count


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--topology=v5e:2x2", "--search", "--check"], "give one of --search and --check"),
        (["--topology=v5e:2x2", "--max-compiles=3"], "--max_compiles has no effect without --search"),
        (["--topology=v5e:2x2", "--check", "--json=x"], "--json has no effect on --check"),
        (["--topology=v5e:2x2", "--search", "--max-compiles=-1"], "--max_compiles=-1 must not be negative"),
        (["--table=x"], "from the file's folder: leave out --config"),
    ],
)
def test_flags_of_another_mode_are_refused(capsys, arguments, said):
    assert run_plan(*arguments) == 2 and said in capsys.readouterr().err


def test_changes_of_keys_are_refused_where_no_config_is_read(capsys, tmp_path):
    change = "--config.model.remat=none"
    assert main(["plan", "--table=x", change, "--topology=v5e-8"]) == 2
    assert "leave out --topology, --config.model.remat" in capsys.readouterr().err
    for verb in ("coord-check", "scaling"):
        flags = [f"--directory={tmp_path}"] if verb == "coord-check" else [f"--law={tmp_path / 'x'}", "--plot=y"]
        assert main(["tune", verb, *flags, change]) == 2
        assert "--config=NAME or FILE is needed" in capsys.readouterr().err


@needs_libtpu
def test_a_slice_that_libtpu_refuses_and_a_mesh_that_does_not_divide(capsys):
    assert run_plan("--topology=v5e:3x3") == 1
    assert "libtpu refuses --topology=v5e:3x3" in (said := capsys.readouterr().err) and "16x16" in said
    assert run_plan("--topology=v5e:4x4") == 1
    said = capsys.readouterr().out
    assert "PROBLEM: curriculum.batch_size of phase 2=2 is not divisible by 16" in said
    assert "no layout of this config divides 16 chips; slices that one divides: v5e:2x2" in said


@pytest.mark.slow
@needs_libtpu
def test_the_command_end_to_end(capsys, tmp_path):
    path = tmp_path / "plan.json"
    changes = {
        "model.vocab_size": 300, "model.num_layers": 2, "model.d_model": 64, "model.d_ff": 96, "model.loss_chunk": 64,
        "curriculum.seq_len": "(256,)", "curriculum.batch_size": "(8,)", "curriculum.num_tokens": "(204800,)",
        "mesh.tensor": 2, "mesh.accumulation": 2,
    }  # fmt: skip
    asked = [f"--config.{name}={value}" for name, value in changes.items()]
    asked += ["--topology=v5p:2x2x1", f"--json={path}", f"--cache={tmp_path / 'cache'}", "--usd-per-chip-hour=2"]
    assert run_plan(*asked) == 0
    shown = capsys.readouterr()
    assert "compiling phase 1 (8 x 256) for v5p:2x2x1" in shown.err and "done in" in shown.err
    assert "to spare" in shown.out and "Step time assumes:" in shown.out and "Cost:" in shown.out
    plan = json.loads(path.read_text())
    assert plan["works"] and plan["num_chips"] == 4
    (phase,) = plan["phases"]
    memory = phase["memory"]
    # AdamW has two moments for each parameter, and a counter.
    assert 0 <= memory["optimizer"] - 2 * memory["parameters"] <= 8
    assert sum(memory[name] for name in memory if name not in ("available", "needed")) == memory["needed"]
    kinds = {collective["kind"] for collective in phase["collectives"]}
    assert "all-gather" in kinds and kinds & {"all-reduce", "reduce-scatter"}
    gathers = [c for c in phase["collectives"] if c["kind"] == "all-gather" and c["count"] == 2 * 2]
    assert len(gathers) >= 7  # the kernels of a block, as often as there are layers and micro-batches
    assert sum(c["is_asynchronous"] for c in gathers) >= 5
    assert phase["executed_flops"] > phase["counted_flops"] > 0
    low, high = phase["step_seconds"]
    assert 0 < low < phase["step_central"] < high and phase["step_with_windows"] <= phase["step_central"]
    assert 0 < phase["parts"]["products_at_peak"] < phase["parts"]["products"] and phase["parts"]["unestimated"] > 0
    assert phase["hfu"] == pytest.approx(phase["executed_flops"] / phase["peak_flops"] / phase["step_central"])
    assert plan["run"]["chip_hours"] == pytest.approx([4 * 100 * low / 3600, 4 * 100 * high / 3600])
    assert plan["run"]["usd"] == pytest.approx([2 * hours for hours in plan["run"]["chip_hours"]])
    with mock.patch.object(Program, "compile", side_effect=AssertionError("the cache has it")):
        assert run_plan(*asked) == 0
    assert json.loads(path.read_text()) == plan
