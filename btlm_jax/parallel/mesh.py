"""The device mesh and the rules that map a tensor's logical axes onto it.

A logical axis is the name that a parameter or an activation is born with ("embed", "heads", ...). A mesh axis is one of

    fsdp      splits sequences, and the stored parameters
    shared    splits sequences in phases whose batch has enough of them, positions in the others
    context   splits the positions of a sequence
    tensor    splits heads and d_ff in use, and the stored parameters

The mesh is in explicit mode: the sharding of every array is part of its type, and a mistake is an error at trace time,
on one CPU device too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from btlm_jax.parallel.divisibility import divisors
from btlm_jax.recipe.config import TrainConfig

FSDP, SHARED, CONTEXT, TENSOR = MESH_AXES = ("fsdp", "shared", "context", "tensor")

Axes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxisRules:
    """Which mesh axes each logical axis is split over; None is not split.

    `embed`, `heads` and `mlp` are the dims of a weight as it is stored: `embed` alone is split, so that the others need
    not divide by anything. `act_...` are those of an activation. Vectors, which are added to activations, carry `norm`
    for the model dim.
    """

    accumulation: Axes = None
    batch: Axes = FSDP
    length: Axes = (SHARED, CONTEXT)
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

    @property
    def heads_in_attention(self) -> tuple[str, ...]:
        """Return the mesh axes that heads are split over once each device has whole sequences of its share."""
        return *axis_names(self.act_heads), *axis_names(self.length)

    def spec(self, *axes: str) -> PartitionSpec:
        """Return the PartitionSpec of a tensor with these logical axes."""
        return PartitionSpec(*(getattr(self, axis) for axis in axes))


RULES = AxisRules()  # the most ways for positions, the fewest for sequences
MANY_SEQUENCES = AxisRules(batch=(FSDP, SHARED), length=CONTEXT)
WHOLE_SEQUENCES = AxisRules(length=None)  # for decoding, where a sequence's positions come one by one


def make_mesh(*, devices: Sequence[jax.Device], tensor: int, context: int = 1, shared: int = 1) -> Mesh:
    """Make the explicit mesh over `devices`; fsdp takes what the others leave.

    Raises:
      ValueError: the other axes do not divide the number of devices.
    """
    if len(devices) % (tensor * context * shared):
        ways = f"mesh.tensor={tensor}" + (f" x mesh.context={context * shared}" if context * shared > 1 else "")
        raise ValueError(f"{ways} does not divide the {len(devices)} devices of this run")
    fsdp = len(devices) // (tensor * context * shared)
    # jax.make_mesh refuses an axis that is part of a side of a TPU slice, except on a v5e: 32 x 4 x 2 on 16 x 16.
    placed = mesh_utils.create_device_mesh(
        (fsdp, shared, context, tensor), tuple(devices), allow_split_physical_axes=True
    )
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def make_run_mesh(config: TrainConfig, *, devices: Sequence[jax.Device]) -> Mesh:
    """Make the mesh of a run: sequences are split no more ways than some phase's batch can fill.

    Raises:
      ValueError: mesh.tensor x mesh.context does not divide the number of devices.
    """
    tensor, ways = config.mesh.tensor, config.mesh.context
    fsdp = len(devices) // (tensor * ways)
    batches = [phase.batch_size for phase in config.curriculum.table.phases]
    shared = max(
        (
            shared
            for shared in divisors(ways)
            if any(batch % (max(fsdp, 1) * config.mesh.accumulation * shared) == 0 for batch in batches)
        ),
        default=1,
    )
    return make_mesh(devices=devices, tensor=tensor, context=ways // shared, shared=shared)


def rules_for(batch_size: int, *, mesh: Mesh, accumulation: int) -> AxisRules:
    """Return the rules of a phase: positions are split the fewest ways that its batch allows."""
    is_filled = batch_size % (mesh.shape[FSDP] * mesh.shape[SHARED] * accumulation) == 0
    return MANY_SEQUENCES if is_filled else RULES


def batch_sharding(mesh: Mesh, rules: AxisRules) -> NamedSharding:
    """Return the sharding of a training batch's leaves [A, B/A, T]."""
    return NamedSharding(mesh, rules.spec("accumulation", "batch", "length"))


def evaluation_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an evaluation batch's leaves [B, T]."""
    return NamedSharding(mesh, RULES.spec("batch", "length"))


def platform() -> str:
    """Return the platform of the surrounding mesh's devices, which a compilation ahead of time need not have here."""
    return _device().platform


def device_kind() -> str:
    """Return what the devices of the surrounding mesh call themselves ("TPU v5 lite"), here or ahead of time."""
    return _device().device_kind


def _device():
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def num_ways(mesh: Mesh | jax.sharding.AbstractMesh, axes: Axes) -> int:
    """Return into how many parts these mesh axes split."""
    return math.prod(mesh.shape[name] for name in axis_names(axes))


def axis_names(axes: Axes) -> tuple[str, ...]:
    """Return mesh axes, as a rule or an entry of a PartitionSpec has them, one by one."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
