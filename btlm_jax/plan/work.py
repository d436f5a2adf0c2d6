"""Count what a traced step computes: the FLOPs of its matrix products, recompute included, and its kernels' blocks.

The compiler's own count (`cost_analysis`) takes the body of a loop once and a kernel not at all, so it is of no use.
"""

from __future__ import annotations

import collections
import dataclasses
import math

import jax.extend

BLOCK = 512  # kernels' work is counted in squares of so many positions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What all devices together compute in a step."""

    flops: float  # of matrix products, in kernels too
    kernel_blocks: dict[str, float]  # for "fwd", "dq" and "dkv": BLOCK x BLOCK squares of one head of one sequence


def work_of(jaxpr) -> Work:
    """Count the work of a jaxpr. What nothing needs is left out, as the compiler leaves it out."""
    blocks: dict[str, float] = collections.Counter()
    flops = _flops(jaxpr, len(jaxpr.outvars) * [True], 1.0, blocks)
    return Work(flops=flops, kernel_blocks={name: blocks[name] for name in ("fwd", "dq", "dkv")})


def _flops(jaxpr, is_needed: list[bool], times: float, blocks: dict[str, float]) -> float:
    """Return the FLOPs of running a jaxpr `times` times for those of its results that are needed."""
    needed = {id(out) for out, wanted in zip(jaxpr.outvars, is_needed, strict=True) if wanted}
    total = 0.0
    for equation in reversed(jaxpr.eqns):
        wanted = [id(out) in needed for out in equation.outvars]
        if not any(wanted):
            continue
        total += _flops_of_equation(equation, wanted, times, blocks)
        needed |= {id(operand) for operand in equation.invars}
    return total


def _flops_of_equation(equation, wanted: list[bool], times: float, blocks: dict[str, float]) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return times * 2.0 * equation.outvars[0].aval.size * math.prod(left[dim] for dim in contracted)
    if name == "pallas_call":
        return _flops_of_kernel(equation, times, blocks)
    inner = [part.jaxpr if hasattr(part, "jaxpr") else part for part in jax.extend.core.jaxprs_in_params(params)]
    if name == "cond":
        return max(_flops(part, wanted, times, blocks) for part in inner)
    if name == "scan":
        (body,) = inner
        # A carry is needed if a later iteration needs it; taking all of them is right for training steps.
        carries = params["num_carry"] * [True]
        return _flops(body, carries + wanted[params["num_carry"] :], times * params["length"], blocks)
    if name == "shard_map":
        (body,) = inner  # its shapes are those of one device
        return _flops(body, wanted, times * params["mesh"].size, blocks)
    return sum(
        _flops(part, wanted if len(part.outvars) == len(wanted) else len(part.outvars) * [True], times, blocks)
        for part in inner
    )


def _flops_of_kernel(equation, times: float, blocks: dict[str, float]) -> float:
    """Count a kernel of causal attention: of the n x n pairs of blocks of a head it runs the lower n (n + 1) / 2."""
    params = equation.params
    name = str(params["name"] if "name" in params else params["name_and_src_info"])
    (kind,) = (kind for kind in ("fwd", "dkv", "dq") if f"_{kind}_" in name)
    body = params["jaxpr"]
    grid = params["grid_mapping"].grid
    num_blocks = grid[-1]  # of one sequence: queries and keys have blocks of one size
    runs = times * math.prod(grid) * (num_blocks + 1) / (2 * num_blocks)
    length = max(operand.aval.shape[-2] for operand in equation.invars if operand.aval.ndim >= 3)
    blocks[kind] += runs * (length / num_blocks / BLOCK) ** 2
    return _flops_everything(body, runs)


def _flops_everything(jaxpr, times: float) -> float:
    """Return the FLOPs of a kernel's body, whose results are its writes."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            total += _flops_of_equation(equation, [True], times, {})
        parts = [
            _flops_everything(part.jaxpr if hasattr(part, "jaxpr") else part, times)
            for part in jax.extend.core.jaxprs_in_params(equation.params)
        ]
        length = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += length * (max(parts) if equation.primitive.name == "cond" else sum(parts)) if parts else 0.0
    return total
