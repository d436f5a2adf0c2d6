"""Count the work of a traced step: FLOPs of its matrix products, recompute included, blocks of attention kernels, and
the exchanges that it asks for itself, which are all but those that XLA adds for what it shards.

The compiler's own count (`cost_analysis`) counts the body of a loop once and a kernel not at all.
"""

from __future__ import annotations

import collections
import dataclasses
import math

import jax.extend

from btlm_jax.attention.remat_names import CUDNN_BACKWARD, CUDNN_FORWARD
from btlm_jax.attention.tpu import BACKWARD, FORWARD

BLOCK = 512  # positions: the work of kernels is counted in blocks of BLOCK queries x BLOCK keys
OUT_OF_WINDOW = "_out_of_window"  # suffix of a kernel's name: what is left of a block outside a head's window
DIAGONAL = "_diagonal"  # suffix: blocks on the diagonal, with what is done once for each
_CUDNN_PRODUCTS = {CUDNN_FORWARD: 2, CUDNN_BACKWARD: 5}  # of T x T: scores and values; both again, and three gradients
_EXCHANGES = {
    "all_gather": "all-gather", "reduce_scatter": "reduce-scatter", "all_to_all": "all-to-all",
    "ppermute": "collective-permute", "psum": "all-reduce", "psum_invariant": "all-reduce",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepWork:
    """The work of a step on all devices together."""

    flops: float  # of matrix products, in kernels too
    # Blocks of one head of one sequence, by kernel: all of them; and those off the diagonal by the distance, in
    # positions, between the last key and the first query, because a head skips those beyond its window.
    kernel_blocks: dict[str, float]
    distant_blocks: dict[tuple[str, int], float]
    kernel_steps: float  # grid steps of all kernels
    kernel_flops: float = 0.0  # of cuDNN's kernels, which `flops` has
    # How often devices run an exchange, by (kind, bytes of the whole array on one device, mesh axes that it is over).
    exchanges: dict[tuple[str, int, tuple[str, ...]], float] = dataclasses.field(default_factory=dict)


def count_step_work(jaxpr) -> StepWork:
    """Count the work of a jaxpr without its dead code, which the compiler removes too."""
    kernels = _Kernels()
    flops = _flops(jaxpr, len(jaxpr.outvars) * [True], 1.0, kernels)
    return StepWork(
        flops=flops,
        kernel_blocks=dict(kernels.blocks),
        distant_blocks=dict(kernels.distant_blocks),
        kernel_steps=kernels.steps,
        kernel_flops=kernels.cudnn_flops,
        exchanges=dict(kernels.exchanges),
    )


@dataclasses.dataclass
class _Kernels:
    """Counters of kernels and exchanges; see StepWork."""

    blocks: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    distant_blocks: collections.Counter[tuple[str, int]] = dataclasses.field(default_factory=collections.Counter)
    steps: float = 0.0
    cudnn_flops: float = 0.0
    exchanges: dict[tuple[str, int, tuple[str, ...]], float] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(float)
    )


def _flops(jaxpr, is_needed: list[bool], times: float, kernels: _Kernels) -> float:
    """Return the FLOPs of running a jaxpr `times` times for those of its outputs that are needed."""
    needed = {id(out) for out, used in zip(jaxpr.outvars, is_needed, strict=True) if used}
    total = 0.0
    for equation in reversed(jaxpr.eqns):
        used = [id(out) in needed for out in equation.outvars]
        if not any(used):
            continue
        total += _flops_of_equation(equation, used, times, kernels)
        needed |= {id(operand) for operand in equation.invars}
    return total


def _flops_of_equation(equation, used: list[bool], times: float, kernels: _Kernels) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return times * 2.0 * equation.outvars[0].aval.size * math.prod(left[dim] for dim in contracted)
    if name == "pallas_call":
        return _flops_of_kernel(equation, times, kernels)
    if name in _CUDNN_PRODUCTS:
        return _flops_of_cudnn(equation, times, kernels)
    if name in _EXCHANGES:
        _count_exchange(equation, times, kernels)
        return 0.0
    inner = [_open(part) for part in jax.extend.core.jaxprs_in_params(params)]
    if name == "cond":
        return max(_flops(part, used, times, kernels) for part in inner)
    if name == "scan":
        (body,) = inner
        # A carry is needed if a later iteration needs it; taking all of them is right for training steps.
        carries = params["num_carry"] * [True]
        return _flops(body, carries + used[params["num_carry"] :], times * params["length"], kernels)
    if name == "shard_map":
        (body,) = inner  # its shapes are those of one device
        return _flops(body, used, times * params["mesh"].size, kernels)
    return sum(
        _flops(part, used if len(part.outvars) == len(used) else len(part.outvars) * [True], times, kernels)
        for part in inner
    )


def _flops_of_kernel(equation, times: float, kernels: _Kernels) -> float:
    params = equation.params
    name = str(params["name"] if "name" in params else params["name_and_src_info"])
    for own in (FORWARD, BACKWARD):
        if name.startswith(own):
            return _flops_of_own_kernel(equation, own, times, kernels)
    (kind,) = (kind for kind in ("fwd", "dkv", "dq") if f"_{kind}_" in name)
    return _flops_of_splash(equation, kind, times, kernels)


def _flops_of_cudnn(equation, times: float, kernels: _Kernels) -> float:
    """Count cuDNN's causal attention on q_BTNH: it runs the lower half of each product of T x T."""
    B, T, N, H = equation.invars[0].aval.shape
    flops = times * _CUDNN_PRODUCTS[equation.primitive.name] * 2.0 * B * N * H * T * (T + 1) / 2
    kernels.cudnn_flops += flops
    return flops


def _count_exchange(equation, times: float, kernels: _Kernels) -> None:
    params = equation.params
    axes = params["axes"] if "axes" in params else params["axis_name"]
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    kind = _EXCHANGES[equation.primitive.name]
    arrays = equation.outvars if kind == "all-gather" else equation.invars
    num_bytes = sum(each.aval.size * each.aval.dtype.itemsize for each in arrays)
    kernels.exchanges[kind, num_bytes, axes] += times


def _flops_of_own_kernel(equation, name: str, times: float, kernels: _Kernels) -> float:
    """Count a kernel of attention/tpu.py: one program for a pair of blocks and a few heads."""
    params = equation.params
    grid, slopes = params["grid_mapping"].grid, equation.invars[1].aval
    queries = equation.outvars[0].aval  # the output, or the gradient of queries, [pieces x B, T, M]
    block = next(iter(params["grid_mapping"].block_mappings_output)).block_aval.shape[1]
    programs, num_pairs = math.prod(grid), grid[2]
    squares = times * grid[0] * slopes.shape[0] * (block / BLOCK) ** 2  # of each pair of blocks
    num_queries = queries.shape[0] * queries.shape[1] // block // grid[0]
    num_keys = (num_pairs + num_queries * (num_queries - 1) // 2) // num_queries  # the queries are the last of them
    kernels.steps += times * programs
    kernels.blocks[name + DIAGONAL] += squares * num_queries
    for apart in range(1, num_keys):
        count = min(num_queries, num_keys - apart)
        kernels.blocks[name] += squares * count
        kernels.distant_blocks[name, (apart - 1) * block] += squares * count
    # On and off the diagonal it runs different code for the same products: one of the two.
    return times * programs * max(_flops_of_body([each], 1.0) for each in params["jaxpr"].eqns)


def _flops_of_splash(equation, kind: str, times: float, kernels: _Kernels) -> float:
    """Count a kernel of causal attention: of the n x n pairs of blocks of a head it runs the lower n (n + 1) / 2."""
    params = equation.params
    grid = params["grid_mapping"].grid
    num_blocks = grid[-1]  # of one sequence: queries and keys have blocks of one size
    runs = times * math.prod(grid) * (num_blocks + 1) / (2 * num_blocks)
    length = max(operand.aval.shape[-2] for operand in equation.invars if operand.aval.ndim >= 3)
    kernels.steps += runs
    kernels.blocks[kind] += runs * (length / num_blocks / BLOCK) ** 2
    return _flops_of_body(params["jaxpr"].eqns, runs)


def _flops_of_body(equations, times: float) -> float:
    """Return the FLOPs of a kernel's body, whose results are its writes."""
    total = 0.0
    for equation in equations:
        if equation.primitive.name == "dot_general":
            total += _flops_of_equation(equation, [True], times, _Kernels())
        parts = [_flops_of_body(_open(part).eqns, times) for part in jax.extend.core.jaxprs_in_params(equation.params)]
        length = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += length * (max(parts) if equation.primitive.name == "cond" else sum(parts)) if parts else 0.0
    return total


def _open(jaxpr):
    """Return the jaxpr inside a closed one."""
    return getattr(jaxpr, "jaxpr", jaxpr)
