"""The device mesh and the rules that map a tensor's logical axes onto it.

A logical axis is the name that a parameter or an activation is born with ("embed", "heads", ...); a mesh axis is
"fsdp" (data parallel, parameters sharded) or "tensor" (heads and d_ff split). The mesh is in explicit mode: the
sharding of every array is part of its type, and a mistake is an error at trace time, on one CPU device too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from btlm_jax.config import TrainConfig

FSDP, TENSOR = "fsdp", "tensor"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxisRules:
    """Which mesh axis each logical axis is split over; None is not split.

    `embed` is the model dim of a weight as it is stored, `act_embed` that of an activation. Vectors that are added to
    activations carry `norm` and are replicated, because `embed` shares the batch's mesh axis.
    """

    accumulation: str | None = None
    batch: str | None = FSDP
    length: str | None = None
    act_embed: str | None = None
    layers: str | None = None
    vocab: str | None = None  # 50,257 divides by nothing; the loss splits positions over `tensor` instead
    embed: str | None = FSDP
    heads: str | None = TENSOR
    head_dim: str | None = None
    mlp: str | None = TENSOR
    norm: str | None = None

    def spec(self, *axes: str) -> PartitionSpec:
        """Return the PartitionSpec of a tensor with these logical axes."""
        return PartitionSpec(*(getattr(self, axis) for axis in axes))

    def gathered_spec(self, *axes: str) -> PartitionSpec:
        """Return the spec of a weight in use: as stored, but whole along the fsdp axis."""
        return PartitionSpec(*(None if getattr(self, axis) == FSDP else getattr(self, axis) for axis in axes))


RULES = AxisRules()


def make_mesh(*, devices: Sequence[jax.Device], tensor: int) -> Mesh:
    """Make the explicit (fsdp, tensor) mesh over `devices`; fsdp takes what `tensor` leaves.

    Raises:
      ValueError: `tensor` does not divide the number of devices.
    """
    if len(devices) % tensor:
        raise ValueError(f"mesh.tensor={tensor} does not divide the {len(devices)} devices of this run")
    return jax.make_mesh((len(devices) // tensor, tensor), (FSDP, TENSOR), devices=tuple(devices))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a training batch's leaves [A, B/A, T]."""
    return NamedSharding(mesh, RULES.spec("accumulation", "batch", "length"))


def check_divisible(config: TrainConfig, mesh: Mesh) -> None:
    """Check that everything the mesh splits divides evenly.

    Raises:
      ValueError: naming every size that does not divide, by what, and what would.
    """
    fsdp, tensor = mesh.shape[FSDP], mesh.shape[TENSOR]
    problems = divisibility_problems(config, fsdp=fsdp, tensor=tensor)
    if problems:
        layout = f"on {fsdp * tensor} devices as fsdp {fsdp} x tensor {tensor}"
        raise ValueError(f"the config does not divide {layout}:\n  " + "\n  ".join(problems))


def divisibility_problems(config: TrainConfig, *, fsdp: int, tensor: int) -> list[str]:
    """Return a line for every size that a (fsdp, tensor) mesh does not divide: the size, by what, and what would do."""
    ways = fsdp * config.mesh.accumulation
    problems = []
    for name, size, by, reason in (
        *(
            (
                f"curriculum.batch_size of phase {phase.index + 1}",
                phase.batch_size,
                ways,
                f"mesh fsdp {fsdp} x mesh.accumulation {config.mesh.accumulation}",
            )
            for phase in config.curriculum.table.phases
        ),
        *(
            (f"curriculum.seq_len of phase {phase.index + 1}", phase.seq_len, tensor, f"mesh.tensor {tensor}")
            for phase in config.curriculum.table.phases
        ),
        ("evaluation.batch_size", config.evaluation.batch_size, fsdp, f"mesh fsdp {fsdp}"),
        ("model.d_model", config.model.d_model, fsdp, f"mesh fsdp {fsdp}"),
        ("model.num_heads", config.model.num_heads, tensor, f"mesh.tensor {tensor}"),
        ("model.d_ff", config.model.d_ff, tensor, f"mesh.tensor {tensor}"),
    ):
        if size % by:
            near = sorted({max(size // by * by, by), (size // by + 1) * by})
            problems.append(f"{name}={size} is not divisible by {by} ({reason}); nearest: {', '.join(map(str, near))}")
    return problems
