"""The axes of the device mesh, the rules that map a tensor's logical axes onto it, and the order of heads on devices.

A logical axis is the name of a dim of a parameter or an activation ("embed", "heads", ...). The mesh axes are

    FSDP               splits sequences, and the stored parameters
    BATCH_OR_CONTEXT   splits sequences in phases whose batch has enough of them, positions in the others
    CONTEXT            splits the positions of a sequence
    TENSOR             splits heads and d_ff in use, and the stored parameters

Several TPU slices, joined over the data-center network, are a further axis outside of these, SLICE. It splits sequences
alone: each slice stores all parameters, and only gradients, and numbers of the whole batch, are exchanged over it. The
mesh of one slice does not have it.

The mesh is in explicit mode: the sharding of every array is part of its type, and a mistake is an error at trace time,
on one CPU device too.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from btlm_jax.recipe.config import MeshConfig

SLICE = "slice"
FSDP, BATCH_OR_CONTEXT, CONTEXT, TENSOR = MESH_AXES = ("fsdp", "batch_or_context", "context", "tensor")
TPU_LANES = 128  # numbers side by side in a vector register of a TPU, and the width of its tiles

Axes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxisRules:
    """Which mesh axes each logical axis is split over, None for not split, and how matrices' gradients are summed.

    `embed`, `heads` and `mlp` are the dims of a stored weight: `embed` alone is split, and the others need not divide.
    `act_...` are those of an activation. Vectors, which are added to activations, carry `norm` for the model dim.
    """

    accumulation: Axes = None
    batch: Axes = FSDP
    length: Axes = (BATCH_OR_CONTEXT, CONTEXT)
    act_embed: Axes = None
    act_heads: Axes = TENSOR
    act_mlp: Axes = TENSOR
    layers: Axes = None
    vocab: Axes = None  # 50,257 divides by nothing; the loss splits positions over `tensor` instead
    embed: Axes = (FSDP, TENSOR)
    heads: Axes = None
    head_dim: Axes = None
    mlp: Axes = None
    norm: Axes = None
    gradient_dtype: str = "float32"  # of the sum over fsdp

    @property
    def heads_in_attention(self) -> tuple[str, ...]:
        """Return the mesh axes that heads are split over once each device has whole sequences of its share."""
        return *axis_names(self.act_heads), *axis_names(self.length)

    def over_slices(self, mesh: Mesh | AbstractMesh) -> AxisRules:
        """Return the rules that split sequences over the slices of a mesh too, if it has several."""
        return dataclasses.replace(self, batch=(SLICE, *axis_names(self.batch))) if SLICE in mesh.axis_names else self

    def spec(self, *axes: str) -> PartitionSpec:
        """Return the PartitionSpec of a tensor with these logical axes."""
        return PartitionSpec(*(getattr(self, axis) for axis in axes))


RULES = AxisRules()  # the most ways for positions, the fewest for sequences
MANY_SEQUENCES = AxisRules(batch=(FSDP, BATCH_OR_CONTEXT), length=CONTEXT)
WHOLE_SEQUENCES = AxisRules(length=None)  # for decoding, where a sequence's positions come one by one


def rules_for(batch_size: int, *, mesh: Mesh, config: MeshConfig) -> AxisRules:
    """Return the rules of a phase: positions are split the fewest ways that its batch allows."""
    many, few = MANY_SEQUENCES.over_slices(mesh), RULES.over_slices(mesh)
    rules = many if batch_size % (num_ways(mesh, many.batch) * config.accumulation) == 0 else few
    return dataclasses.replace(rules, gradient_dtype=config.gradient_dtype)


def batch_sharding(mesh: Mesh, rules: AxisRules) -> NamedSharding:
    """Return the sharding of a training batch's leaves [A, B/A, T]."""
    return NamedSharding(mesh, rules.spec("accumulation", "batch", "length"))


def evaluation_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an evaluation batch's leaves [B, T]."""
    return NamedSharding(mesh, RULES.over_slices(mesh).spec("batch", "length"))


def device_head_order(num_heads: int, rules: AxisRules, *, mesh: Mesh | AbstractMesh) -> np.ndarray:
    """Return the heads [N] in the order of activations; each device attends with a contiguous share of them."""
    return balanced_head_order(num_heads, ways=num_ways(mesh, rules.heads_in_attention))


def balanced_head_order(num_heads: int, *, ways: int) -> np.ndarray:
    """Return the heads [N] in an order whose contiguous shares, one for each of `ways` devices, cost much the same.

    A steeper ALiBi slope makes a shorter window and so less work, and slopes fall with the number of the head; so heads
    are assigned in boustrophedon order: of 8 heads, the first of 2 devices has 0, 3, 4 and 7. Where `ways` does not
    divide the heads, which `attend` refuses, they keep their order.
    """
    if num_heads % ways:
        return np.arange(num_heads)
    rounds = np.arange(num_heads).reshape(num_heads // ways, ways)
    rounds[1::2] = rounds[1::2, ::-1]
    return rounds.T.reshape(num_heads)


def platform() -> str:
    """Return the platform ("cpu", "gpu", "tpu") of the current mesh's devices, which need not exist on this machine."""
    return (jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]).platform


def device_kind() -> str:
    """Return the kind of the current mesh's devices ("TPU v5 lite"), which need not exist on this machine."""
    return (jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]).device_kind


def num_ways(mesh: Mesh | AbstractMesh, axes: Axes) -> int:
    """Return into how many parts these mesh axes split."""
    return math.prod(mesh.shape[name] for name in axis_names(axes))


def axis_names(axes: Axes) -> tuple[str, ...]:
    """Return as a tuple the mesh axes of a rule or of an entry of a PartitionSpec."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
