"""What the compiler made of the train step for a TPU slice: read in its text, not believed."""

import math
import re

import jax
import pytest
from support.tiny import tiny_config
from support.tpu import needs_libtpu, quickly_compiled  # noqa: F401

from btlm_jax.parallel.make_mesh import make_run_mesh
from btlm_jax.plan.chips import slice_devices
from btlm_jax.plan.executable import read_executable
from btlm_jax.train.program import make_program

L, D, F, V, T = 2, 320, 426, 1250, 256  # heads of 80 as in BTLM; F and V divide by no tile
BATCHES = (16, 4)  # phase 1 fills 8 devices with sequences, phase 2 splits positions in two


def compile_phase(index: int):
    config = tiny_config(
        model__num_layers=L, model__d_model=D, model__num_heads=4, model__d_ff=F, model__vocab_size=V,
        model__dtype="bfloat16", model__attention="auto", model__remat="matmuls_saved", model__loss_chunk=128,
        mup__base_d_model=128.0, mup__base_d_ff=170.0, curriculum__seq_len=(T, 4 * T), curriculum__batch_size=BATCHES,
        curriculum__num_tokens=(16 * T, 16 * T), optimizer__warmup_tokens=0, evaluation__batch_size=4,
        mesh__context=2,
    )  # fmt: skip
    mesh = make_run_mesh(config.mesh, curriculum=config.curriculum.table, devices=slice_devices("v5e:2x4"))
    assert dict(mesh.shape) == {"fsdp": 4, "batch_or_context": 2, "context": 1, "tensor": 1}
    program = make_program(config, mesh)
    compiled = program.compile(program.trace_train_step(config.curriculum.table.phases[index]))
    return program, compiled


@pytest.fixture(scope="module")
def second_phase(quickly_compiled):  # noqa: F811
    program, compiled = compile_phase(1)
    return program, compiled.as_text(), read_executable(compiled.as_text(), num_devices=8)


@needs_libtpu
@pytest.mark.slow
def test_every_gradient_is_reduce_scattered_in_float32(second_phase):
    program, text, executable = second_phase
    parameters = jax.tree.leaves(program.table)
    matrices = [info for info in parameters if info.axes[-1] != "norm" and len(info.shape) > 2 or "embed" in info.axes]
    stored = sum(math.prod(info.shape) * 4 for info in matrices)
    scattered = sum(each.count * each.num_bytes for each in executable.collectives if each.kind == "reduce-scatter")
    passed_on = sum(each.count * each.num_bytes for each in executable.collectives if each.kind == "collective-permute")
    # The lookup's and the readout's gradient are one table each, perhaps summed before; padding adds to the rest.
    assert 0.95 * stored < scattered + passed_on < 2.2 * stored
    largest = max(each.num_bytes for each in executable.collectives if each.kind == "all-reduce")
    assert largest < stored / 4  # vectors, and the parts that the second data axis holds copies of
    for line in text.splitlines():
        if " reduce-scatter(" in line:
            assert " f32[" in line.split("reduce-scatter(")[0], line[:200]


@needs_libtpu
@pytest.mark.slow
def test_weights_are_gathered_in_bfloat16_one_layer_at_a_time(second_phase):
    _, text, executable = second_phase
    gathered = [line.split(" all-gather(")[0] for line in text.splitlines() if " all-gather(" in line]
    assert gathered and not [line for line in gathered if "f32[" in line]
    whole = max(V * D, D * 2 * F) * 2  # bytes of the largest single weight, bfloat16
    assert all(each.num_bytes <= 1.1 * whole for each in executable.collectives if each.kind == "all-gather")


@needs_libtpu
@pytest.mark.slow
def test_neither_all_the_logits_nor_all_the_scores_exist(second_phase):
    _, text, _ = second_phase
    rows = 16 * T // 8  # tokens of a device
    sizes = {tuple(int(dim) for dim in dims.split(",")) for dims in re.findall(r"\b(?:f32|bf16)\[([0-9,]+)\]", text)}
    assert any(V in dims for dims in sizes)  # a chunk's logits do exist
    assert not [dims for dims in sizes if V in dims and math.prod(dims) >= rows * V]
    assert not [dims for dims in sizes if dims.count(4 * T) >= 2]


@needs_libtpu
@pytest.mark.slow
def test_positions_are_exchanged_for_heads(second_phase):
    exchanges = [each for each in second_phase[2].collectives if each.kind == "all-to-all"]
    # A layer: q, k, v and the output there, their gradients back, and the output again for its projection's gradient.
    assert sum(each.count for each in exchanges) == 9 * L
    assert all(each.num_devices == 2 for each in exchanges)
