"""Figures of each TPU generation, and a slice's devices to compile for, which libtpu makes on any machine.

What a topology's name stands for is decided here, of GPUs (gpus.py) too.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

from btlm_jax import install_command
from btlm_jax.attention.tpu import BACKWARD, FORWARD
from btlm_jax.plan.flop_count import DIAGONAL, OUT_OF_WINDOW
from btlm_jax.plan.gpus import GPUS, Gpu, describe_gpu_topologies, gpu_devices, gpu_topology_named

GIB = 1 << 30
_PLANE = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One generation. Peak FLOP/s are in train/flops.py, by a device's kind."""

    name: str
    hbm_bytes: int  # what the compiler allows a program; its error names it when a program needs more
    clock: float  # cycles/s
    num_cores: int  # that one device is made of
    hbm_bandwidth: float  # bytes/s, from the data sheet
    link_bytes: float  # bytes/s of one direction of one link to a neighbour
    network_bytes: float  # bytes/s over the data-center network, a chip's share of its host's; published
    kernel_bundles: dict[str, int]  # instructions of attention kernels, see _bundles
    slices: tuple[str, ...]
    options: dict[str, str]  # of libtpu's topology description
    kinds: tuple[str, ...]  # jax.Device.device_kind
    accelerator: str  # what Google Cloud calls its slices, before the number

    @property
    def is_cube(self) -> bool:
        """Whether slices have three sides."""
        return self.slices == _CUBE


def _bundles(
    *,
    splash: tuple[int, int, int],
    forward: tuple[int, int],
    backward: tuple[int, int],
    out_of_window: tuple[int, int],
) -> dict[str, int]:
    """Return instruction bundles (one a cycle) of attention kernels for a head's block of 512 x 512 positions.

    Read out of libtpu 0.0.42's dump on 2026-11-26; `benchmarks/kernel_bundles.py` reads them again. By argument:

      splash         inner loops of its forward, dq and dkv kernels
      forward        attention/tpu.py with 8 heads of 80 lanes: (off the diagonal, on it), splitting and merging heads
      backward       included in a head's share
      out_of_window  (forward, backward): the most that is left off the diagonal for a head whose ALiBi window ends
                     before the block, beside heads whose windows do not
    """
    names = ("fwd", "dq", "dkv", FORWARD, FORWARD + DIAGONAL, BACKWARD, BACKWARD + DIAGONAL)
    skipped = (FORWARD + OUT_OF_WINDOW, BACKWARD + OUT_OF_WINDOW)
    return dict(zip((*names, *skipped), (*splash, *forward, *backward, *out_of_window), strict=True))


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4", hbm_bytes=int(30.75 * GIB), clock=1.05e9, num_cores=2, hbm_bandwidth=1228e9,
            link_bytes=45e9,
            network_bytes=6.25e9,
            kernel_bundles=_bundles(
                splash=(1411, 1700, 2150), forward=(2856, 3464), backward=(3248, 4256), out_of_window=(452, 328)
            ),
            slices=_CUBE,
            options={"chip_config_name": "megacore"},  # otherwise a device is half a chip
            kinds=("TPU v4",), accelerator="v4",
        ),
        Chip(
            name="v5e", hbm_bytes=int(15.75 * GIB), clock=1.5e9, num_cores=1, hbm_bandwidth=819e9,
            link_bytes=45e9,
            network_bytes=3.125e9,
            kernel_bundles=_bundles(
                splash=(1038, 1362, 1752), forward=(1278, 1447), backward=(2375, 2651), out_of_window=(18, 83)
            ),
            slices=_PLANE, options={},
            kinds=("TPU v5 lite", "TPU v5e"), accelerator="v5litepod",
        ),
        Chip(
            name="v5p", hbm_bytes=int(95.74 * GIB), clock=1.75e9, num_cores=2, hbm_bandwidth=2765e9,
            link_bytes=90e9,
            network_bytes=6.25e9,
            kernel_bundles=_bundles(
                splash=(1016, 1360, 1750), forward=(1314, 1425), backward=(2390, 2640), out_of_window=(18, 83)
            ),
            slices=_CUBE, options={},
            kinds=("TPU v5", "TPU v5p"), accelerator="v5p",
        ),
        Chip(
            name="v6e", hbm_bytes=int(31.25 * GIB), clock=1.75e9, num_cores=1, hbm_bandwidth=1640e9,
            link_bytes=90e9,
            network_bytes=12.5e9,
            kernel_bundles=_bundles(
                splash=(672, 780, 1000), forward=(988, 1018), backward=(1406, 1589), out_of_window=(18, 54)
            ),
            slices=_PLANE, options={},
            kinds=("TPU v6 lite", "TPU v6e"), accelerator="v6e",
        ),
    )
}  # fmt: skip


ACCELERATORS: dict[str, Chip | Gpu] = {**CHIPS, **GPUS}


def topology_named(name: str) -> str:
    """Return a topology such as v5e:16x16 or h100:8, from its own name, its number of chips or cores as v5e-256, of
    GPUs as h100-8, or Google Cloud's accelerator type v5litepod-256.

    Raises:
      ValueError: it is none of these.
    """
    if gpus := gpu_topology_named(name):
        return gpus
    for chip in CHIPS.values():
        if shapes := [shape for shape in chip.slices if name in _types(chip, shape)]:
            return f"{chip.name}:{shapes[0]}"
    if (found := re.fullmatch(r"(\w+):\d+x\d+(x\d+)?", name)) and found[1] in CHIPS:
        return name
    topologies_ = "; ".join(f"{chip.name}:{{{','.join(chip.slices)}}}" for chip in CHIPS.values())
    types = "; ".join(
        f"{chip.accelerator}-{{{','.join(str(_accelerator_number(chip, shape)) for shape in chip.slices)}}}"
        for chip in CHIPS.values()
    )
    known = [
        known
        for chip in CHIPS.values()
        for shape in chip.slices
        for known in (f"{chip.name}:{shape}", *_types(chip, shape))
    ]
    known += [f"{gpu.name}-{count}" for gpu in GPUS.values() for count in gpu.slices]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ValueError(
        f"--topology={name!r} is not known; allowed are {topologies_}, or accelerator types: {types}; or GPUs: "
        f"{describe_gpu_topologies()}; or cpu{hint}"
    )


def chip_of(topology: str) -> Chip | Gpu:
    """Return the chip, or the GPU, of a topology that `topology_named` returned."""
    return ACCELERATORS[topology.partition(":")[0]]


def chip_of_device(device: jax.Device) -> Chip | None:
    """Return the chip of a device of this machine; None if it is no TPU, or of an unknown generation."""
    found = accelerator_of_kind(device.device_kind)
    return found if isinstance(found, Chip) else None


def accelerator_of_kind(kind: str) -> Chip | Gpu | None:
    """Return the chip, or the GPU, that JAX calls so; None if plans are made for no such one."""
    return next((each for each in ACCELERATORS.values() if kind in each.kinds), None)


def usual_topology(chip: Chip, *, count: int) -> str:
    """Return the usual slice of so many chips, or "" if there is none."""
    return next((f"{chip.name}:{shape}" for shape in chip.slices if num_chips(shape) == count), "")


def slice_devices(topology: str, *, slices: int = 1) -> list[jax.Device]:
    """Return the devices of so many slices, or of GPUs: programs are compiled for them, arrays cannot be put on them.

    Raises:
      ValueError: there is no such slice, or libtpu is not installed; more than one "slice" of GPUs.
    """
    chip = chip_of(topology)
    if isinstance(chip, Gpu):
        if slices > 1:
            raise ValueError(f"--slices={slices} is of TPUs; several machines of GPUs are {chip.name}-{8 * slices}")
        return gpu_devices(chip, count=num_chips(topology.partition(":")[2]))
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"compiling for TPUs needs libtpu, on any Linux machine: {install_command('tpu')}")
    _configure_libtpu_without_tpu()
    options = chip.options | ({"num_slices": slices} if slices > 1 else {})
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"libtpu refuses --topology={topology}: {str(error).splitlines()[0]}; usual slices of {chip.name} are "
            f"{', '.join(chip.slices)}"
        ) from error
    return list(description.devices)


def num_chips(slice_shape: str) -> int:
    """Return how many chips "4x8", "4x4x8", or of GPUs "8" has."""
    return math.prod(int(side) for side in slice_shape.split("x"))


def _accelerator_number(chip: Chip, slice_shape: str) -> int:
    """Return the number in an accelerator type, which counts cores where a chip has two."""
    return num_chips(slice_shape) * chip.num_cores


def _types(chip: Chip, slice_shape: str) -> tuple[str, str]:
    """Return what a slice is called by its number: v5litepod-256 by Google Cloud, v5e-256 by most."""
    number = _accelerator_number(chip, slice_shape)
    return f"{chip.accelerator}-{number}", f"{chip.name}-{number}"


def _configure_libtpu_without_tpu() -> None:
    """Set the variables with which libtpu neither looks for a TPU, nor locks one, nor logs that there is none."""
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
        ("TPU_STDERR_LOG_LEVEL", "3"),
        ("TPU_MIN_LOG_LEVEL", "3"),
    ):
        os.environ.setdefault(name, value)
