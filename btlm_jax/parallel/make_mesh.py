"""The device mesh (mesh.py has its axes) over the devices of a run, of one TPU slice or several."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from btlm_jax.parallel.mesh import MESH_AXES, SLICE
from btlm_jax.recipe.config import MeshConfig, divisors
from btlm_jax.recipe.curriculum import Curriculum


def make_mesh(
    *,
    devices: Sequence[jax.Device],  # pyright: ignore[reportInvalidTypeForm] # jax declares it as a variable
    tensor: int,
    context: int = 1,
    batch_or_context: int = 1,
    slices: int = 1,
) -> Mesh:
    """Make the explicit mesh over `devices`; fsdp takes what the others leave.

    Raises:
      ValueError: the other axes do not divide the number of devices, or of one of the slices.
    """
    if slices > 1:
        meshes = [
            make_mesh(devices=each, tensor=tensor, context=context, batch_or_context=batch_or_context)
            for each in _devices_of_slices(devices, slices)
        ]
        axes = (SLICE, *MESH_AXES)
        return Mesh(np.stack([mesh.devices for mesh in meshes]), axes, axis_types=(AxisType.Explicit,) * len(axes))
    length_ways = batch_or_context * context
    if len(devices) % (length_ways * tensor):
        ways = f"mesh.tensor={tensor}" + (f" x mesh.context={length_ways}" if length_ways > 1 else "")
        raise ValueError(f"{ways} does not divide the {len(devices)} devices of this run")
    shape = (len(devices) // (length_ways * tensor), batch_or_context, context, tensor)
    # jax.make_mesh refuses an axis that is part of a side of a TPU slice, except on a v5e: 32 x 4 x 2 on 16 x 16.
    device_array = mesh_utils.create_device_mesh(shape, tuple(devices), allow_split_physical_axes=True)
    return Mesh(device_array, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def make_run_mesh(
    config: MeshConfig,
    *,
    curriculum: Curriculum,
    devices: Sequence[jax.Device],  # pyright: ignore[reportInvalidTypeForm] # jax declares it as a variable
) -> Mesh:
    """Make the mesh of a run: sequences are split no more ways than some phase's batch can fill.

    Raises:
      ValueError: mesh.tensor x mesh.context does not divide the number of devices.
    """
    tensor, ways, slices = config.tensor, config.context, num_slices(devices)
    sequence_ways = len(devices) // (tensor * ways)  # fsdp, of all slices
    batches = [phase.batch_size for phase in curriculum.phases]
    batch_ways = max(
        (
            divisor
            for divisor in divisors(ways)
            if any(batch % (max(sequence_ways, 1) * config.accumulation * divisor) == 0 for batch in batches)
        ),
        default=1,
    )
    context = ways // batch_ways
    return make_mesh(devices=devices, tensor=tensor, context=context, batch_or_context=batch_ways, slices=slices)


def num_slices(
    devices: Sequence[jax.Device],  # pyright: ignore[reportInvalidTypeForm] # jax declares it as a variable
) -> int:
    """Return of how many TPU slices the devices are; 1 where they are no TPUs."""
    return len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1


def _devices_of_slices(devices: Sequence, slices: int) -> list[list]:
    """Return the devices of each slice.

    Raises:
      ValueError: slices differ in size.
    """
    parts = {}
    for number, device in enumerate(devices):
        is_tpu = device.platform == "tpu"
        parts.setdefault(device.slice_index if is_tpu else number * slices // len(devices), []).append(device)
    sizes = [len(parts[each]) for each in sorted(parts)]
    if len(set(sizes)) > 1 or len(sizes) != slices:
        raise ValueError(f"the {slices} slices of this run have {sizes} devices; all must have the same number")
    return [parts[each] for each in sorted(parts)]
