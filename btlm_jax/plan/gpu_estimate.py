"""Predict the memory and the time of one phase's train step on GPUs. Not yet compared with a run of this code on one.

With JAX's CUDA plugin the step is compiled, and memory and exchanges are those of the executable; without it memory is
by a formula and the exchanges are those that the traced step asks for. FLOPs are counted in the traced step either way,
and the time is the roofline of gpu_roofline.py, corrected by published runs of other models.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp

from btlm_jax.attention.gpu import describe_attention, padded_width
from btlm_jax.parallel.mesh import num_ways
from btlm_jax.plan.calibration import correction_by, kept_points
from btlm_jax.plan.compiling import CompileCache, CompiledStep, DoesNotFitError
from btlm_jax.plan.estimate import Memory, PhasePlan, StepTime, state_bytes
from btlm_jax.plan.executable import Collective
from btlm_jax.plan.flop_count import StepWork, count_step_work
from btlm_jax.plan.gpu_roofline import GpuWork, gpu_parts, published_gpu_points, time_gpu_exchange
from btlm_jax.plan.gpus import Gpu, is_stand_in
from btlm_jax.plan.layout import KEPT
from btlm_jax.plan.torus import Exchange
from btlm_jax.recipe.curriculum import Phase
from btlm_jax.train.flops import flops_per_token, peak_of_kind
from btlm_jax.train.memory import bytes_of, second_state_bytes
from btlm_jax.train.program import Program

GPU_ASSUMPTIONS = (
    "memory: nine tenths of a GPU's, as launch/gpu.sh lets JAX take; the state exactly, by its shardings",
    "products and attention: FLOPs of the traced step, recompute too, at the peak of dense bfloat16 (data sheet), in "
    "float32 at half of it, which is TF32's",
    "bytes: of norms, sums, activation functions, logits, casts of parameters, gradients and the update by a formula "
    "(btlm_jax/plan/gpu_roofline.py), at the bandwidth of HBM",
    "exchanges: a ring's bytes over NVLink, of a group on several machines over a network card a GPU, as in NVIDIA's "
    "DGX; gathers and scatters, of weights and gradients, add only what is longer than all computation, others wait",
    "central value: the sum x what published runs of other models and other code took over theirs; error: what leaving "
    "one of those runs out makes (btlm_jax/plan/gpu_runs.json)",
    "HFU: FLOPs executed; left out: input, checkpoints, evaluation, failures",
)
COMPILED_ASSUMPTION = (
    "compiled for GPUs that are not here: no kernel tried out; what cuDNN's backward pass works in is by a formula"
)
FORMULA_ASSUMPTION = (
    "not compiled, memory by formula: the state; as much for gradients and the update; float32 logits; what remat "
    "keeps of all layers, and one layer whole"
)

_CHUNKS = 8  # of queries in chunked attention
# These move weights and gradients, beside the products of other layers. XLA starts all others asynchronously too, but
# what needs their activations comes next.
_BESIDE = ("all-gather", "reduce-scatter")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuPhasePlan(PhasePlan):
    """What is predicted of one phase on GPUs."""

    is_compiled: bool  # or by formula
    attention: str  # how it is computed
    formula_bytes: int  # that the formula says a GPU needs
    moved_seconds: float  # of bytes outside of products at the bandwidth, by the executable; 0 where it is not compiled


def plan_gpu_phase(program: Program, phase: Phase, *, topology: str, gpu: Gpu, cache: CompileCache) -> GpuPhasePlan:
    """Compile the train step of a phase, unless `cache` has the result or it cannot be compiled here, and predict.

    To be called inside `answering_for(gpu)`.

    Raises:
      DoesNotFitError: saying by how much.
      NoCompilationsLeftError: `cache` may compile no more.
      ValueError: it does not compile.
    """
    began, config, mesh = time.monotonic(), program.config, program.mesh
    traced = program.trace_train_step(phase)
    work = count_step_work(traced.jaxpr.jaxpr)
    with jax.set_mesh(mesh):
        attention = describe_attention(config.model, length=phase.seq_len, has_documents=config.data.document_mask)
    step = None
    if not is_stand_in(mesh.devices.flat[0]):
        untried = dataclasses.replace(program, options=program.options | {"xla_gpu_autotune_level": "0"})
        step = cache.compile_step(untried, traced, topology=topology, chip=gpu, state_bytes=state_bytes(program))
    workspace = workspace_bytes(program, phase) if work.kernel_flops else 0
    by_formula = _memory_by_formula(program, phase, gpu=gpu, workspace=workspace)
    memory = _compiled_memory(by_formula, step) if step else by_formula
    identity = step.program if step else "by formula"
    if memory.needed > memory.available:
        raise DoesNotFitError(program=identity, needed=memory.needed, available=memory.available)
    exchanges = _timed(step.executable.collectives if step else traced_collectives(program, work), gpu=gpu)
    return GpuPhasePlan(
        phase=phase,
        program=identity,
        compile_seconds=step.seconds if step else time.monotonic() - began,
        memory=memory,
        collectives=exchanges,
        counted_flops=flops_per_token(config.model, seq_len=phase.seq_len) * phase.tokens_per_step,
        executed_flops=work.flops,
        skipped_flops=0.0,
        peak_flops=peak_of_kind(gpu.kind) * mesh.size,
        step_time=_step_time(program, phase, work, exchanges, gpu=gpu, measured=cache.measured),
        is_compiled=step is not None,
        attention=attention,
        formula_bytes=by_formula.needed,
        moved_seconds=_moved_bytes(step) / gpu.hbm_bandwidth if step else 0.0,
    )


def time_gpu_step(
    program: Program, phase: Phase, traced: jax.stages.Traced, *, gpu: Gpu, measured: Path | None
) -> StepTime:
    """Predict the time of a traced step of a phase; nothing is compiled.

    Steps of runs of one's own that are kept in `measured` correct it, where there are any.

    Raises:
      ValueError: a file of them is damaged.
    """
    work = count_step_work(traced.jaxpr.jaxpr)
    exchanges = _timed(traced_collectives(program, work), gpu=gpu)
    return _step_time(program, phase, work, exchanges, gpu=gpu, measured=measured)


def _timed(collectives: Iterable[Collective], *, gpu: Gpu) -> tuple[Exchange, ...]:
    """Return exchanges with their times; of those that XLA starts asynchronously only _BESIDE run beside products."""
    return tuple(
        time_gpu_exchange(
            dataclasses.replace(each, is_asynchronous=each.is_asynchronous and each.kind in _BESIDE), gpu=gpu
        )
        for each in collectives
    )


def _step_time(
    program: Program, phase: Phase, work: StepWork, exchanges: tuple[Exchange, ...], *, gpu: Gpu, measured: Path | None
) -> StepTime:
    own = kept_points(gpu.name, directory=measured) if measured else ()
    parts = gpu_parts(gpu_work(program, phase, work), exchanges, gpu=gpu)
    correction = correction_by(published_gpu_points(), chip=gpu.timed_as, own=own, roofline=parts.roofline)
    return StepTime(parts=parts, correction=correction)


def gpu_work(program: Program, phase: Phase, work: StepWork) -> GpuWork:
    """Return what one GPU does in a step of a phase."""
    model, mesh = program.config.model, program.mesh
    tensor = mesh.shape["tensor"]
    return GpuWork(
        product_flops=(work.flops - work.kernel_flops) / mesh.size,
        attention_flops=work.kernel_flops / mesh.size,
        tokens=phase.tokens_per_step * tensor / mesh.size,
        num_layers=model.num_layers,
        d_model=model.d_model,
        d_ff=model.d_ff // tensor,
        mlp_inputs=2,
        itemsize=jnp.dtype(model.dtype).itemsize,
        logits=phase.tokens_per_step * model.vocab_size / mesh.size,
        parameters=bytes_of(program.state.params) / 4,
        micro_batches=program.config.mesh.accumulation,
        computed_again=0.0 if model.remat == "none" else 1.0,
    )


def workspace_bytes(program: Program, phase: Phase) -> int:
    """Return what cuDNN's backward pass works in on one GPU: dq in float32, and a number a row of each head.

    The compiler leaves cuDNN's graphs as they are without a GPU, so that the executable does not have it.
    """
    config = program.config
    rows = phase.batch_size // config.mesh.accumulation
    width = padded_width(config.model.head_dim)
    return 4 * rows * phase.seq_len * config.model.num_heads * (width + 1) // program.mesh.size


def step_bytes_by_formula(program: Program, phase: Phase, *, has_kernel: bool) -> int:
    """Return the bytes that a step needs on one GPU beside the state and the batch: see FORMULA_ASSUMPTION."""
    config, mesh, model = program.config, program.mesh, program.config.model
    tensor, size = mesh.shape["tensor"], jnp.dtype(model.dtype).itemsize
    rows = phase.batch_size // config.mesh.accumulation
    tokens = rows * phase.seq_len * tensor / mesh.size
    output = padded_width(model.head_dim) if has_kernel else model.head_dim
    of_heads = model.num_heads * (size * (3 * model.head_dim + output) + 4)

    def kept(remat: str) -> float:
        num_d, num_f = KEPT[remat]
        has_heads = num_d > 4
        split = size * num_f * model.d_ff + of_heads * has_heads
        return tokens * (size * (num_d - 4 * has_heads) * model.d_model + split / tensor)

    activations = model.num_layers * kept(model.remat) + kept("none")
    sequences = rows / num_ways(mesh, program.rules_for(phase).batch)
    logits = sequences * min(model.loss_chunk, phase.seq_len) * model.vocab_size * 4
    scores = 0.0
    if not has_kernel:  # of a span of queries, in float32, and their exponentials
        heads = model.num_heads / num_ways(mesh, program.rules_for(phase).heads_in_attention)
        scores = 2 * 4 * sequences * heads * phase.seq_len * phase.seq_len / _CHUNKS
    return int(state_bytes(program) + activations + logits + scores)


def traced_collectives(program: Program, work: StepWork) -> tuple[Collective, ...]:
    """Return the exchanges that a traced step asks for, with their groups of devices."""
    mesh = program.mesh
    places = _places(mesh.axis_names, tuple(mesh.shape.values()))
    found = []
    for (kind, num_bytes, axes), times in work.exchanges.items():
        n = num_ways(mesh, axes)
        if n > 1:
            others = [axis for axis in mesh.axis_names if axis not in axes]
            group = tuple(at for at, place in enumerate(places) if all(place[axis] == 0 for axis in others))
            found.append(
                Collective(
                    kind=kind, num_bytes=num_bytes, num_devices=n, count=round(times / mesh.size),
                    is_asynchronous=kind in _BESIDE, groups=(group,),
                )
            )  # fmt: skip
    return tuple(found)


def _places(axes: Iterable[str], sizes: tuple[int, ...]) -> list[dict[str, int]]:
    """Return where each device of a mesh is, in their order: its index along each axis."""
    places: list[dict[str, int]] = [{}]
    for axis, size in zip(axes, sizes, strict=True):
        places = [{**place, axis: at} for place in places for at in range(size)]
    return places


def _moved_bytes(step: CompiledStep) -> int:
    """Return the bytes that the operations without products of an executable read and write in a step."""
    return sum(each.count * each.num_bytes for each in step.executable.operations if not each.flops)


def _memory_by_formula(program: Program, phase: Phase, *, gpu: Gpu, workspace: int) -> Memory:
    arrays = 4 if program.config.data.document_mask else 3  # of 4 bytes a token
    return Memory(
        available=gpu.hbm_bytes,
        parameters=bytes_of(program.state.params),
        optimizer=bytes_of(program.state.opt_state),
        other_arguments=4 * arrays * phase.tokens_per_step * program.mesh.shape["tensor"] // program.mesh.size,
        outputs=0,
        temporaries=step_bytes_by_formula(program, phase, has_kernel=workspace > 0),
        code=0,
        workspace=workspace,
        second_state=second_state_bytes(program),
    )


def _compiled_memory(by_formula: Memory, step: CompiledStep) -> Memory:
    """Return what the executable says; of the formula's the state, a second one and cuDNN's workspace stay."""
    return dataclasses.replace(
        by_formula,
        other_arguments=step.argument_bytes - by_formula.parameters - by_formula.optimizer,
        outputs=step.output_bytes - step.alias_bytes,
        temporaries=step.temporary_bytes,
        code=step.code_bytes,
    )
