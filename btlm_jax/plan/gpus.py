"""Figures of NVIDIA's GPUs, their topologies by name, and GPUs that are not there: to compile for, or to trace for.

With the CUDA plugin of JAX a program is compiled for them on any machine. Without it stand-ins make up the mesh: a step
is traced for them, as it would be on GPUs, and goes no further.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import re
from collections.abc import Callable, Iterator
from unittest import mock

import jax
from jax.experimental import topologies

GPUS_OF_NODE = 8
MEMORY_SHARE = 0.9  # of a GPU's memory: XLA_PYTHON_CLIENT_MEM_FRACTION, as launch/gpu.sh sets it
_MOST_NODES = 128
_CUDNN = "jax._src.cudnn.fused_attention_stablehlo"
_CUDNN_VERSION = 91200  # 9.12, as the plugin's of JAX 0.10.2 or older, of stand-ins


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """One model. Peak FLOP/s are in train/flops.py, by a device's kind.

    What XLA asks of it is as in xla/backends/gpu/target_config/specs of openxla/xla. NVLink is half of what NVIDIA's
    data sheets of the H100, H200 and A100 (SXM) give, which is of both directions together: 900, 900 and 600 GB/s. The
    network is that of the DGX H100, H200 and A100 (data sheets): a GPU has a ConnectX-7 of 400 Gb/s, or a ConnectX-6 of
    200 Gb/s.
    """

    name: str
    kind: str  # jax.Device.device_kind
    capability: tuple[int, int]
    cores: int
    units: int  # of float32, a core
    clock: float  # GHz
    memory: int  # bytes
    hbm_bandwidth: float  # bytes/s
    cache: int  # bytes, of the second level
    shared: int  # bytes of a core's shared memory
    shared_of_block: int  # the most that a block may ask for
    nvlink_bytes: float  # bytes/s into a GPU from the others of its machine
    network_bytes: float  # bytes/s into a GPU from other machines
    timed_as: str  # the GPU of the published runs whose times correct its own

    @property
    def hbm_bytes(self) -> int:
        """Bytes of its memory that JAX may take."""
        return int(MEMORY_SHARE * self.memory)

    @property
    def link_bytes(self) -> float:
        """Half of NVLink, as the search of layouts takes two links into a chip."""
        return self.nvlink_bytes / 2

    @property
    def kinds(self) -> tuple[str, ...]:
        return (self.kind,)

    @property
    def slices(self) -> tuple[str, ...]:
        """Usual numbers of them."""
        return ("1", "2", "4", "8", "16", "32", "64")

    @property
    def target_config(self) -> str:
        """Return the text that describes it to XLA (a GpuTargetConfigProto)."""
        major, minor = self.capability
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              shared_memory_per_block: 49152 shared_memory_per_core: {self.shared}
              shared_memory_per_block_optin: {self.shared_of_block}
              core_count: {self.cores} fpus_per_core: {self.units} clock_rate_ghz: {self.clock}
              memory_bandwidth: {int(self.hbm_bandwidth)} l2_cache_size: {self.cache} device_memory_size: {self.memory}
              cuda_compute_capability {{ major: {major} minor: {minor} }}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 12 }}
            runtime_version {{ major: 13 minor: 0 }}
            device_description_str: "{self.kind}"
        """


def _hopper(name: str, kind: str, *, memory: int, hbm_bandwidth: float) -> Gpu:
    return Gpu(
        name=name, kind=kind, memory=memory, hbm_bandwidth=hbm_bandwidth, capability=(9, 0), cores=132, units=128,
        clock=1.98, cache=52_428_800, shared=233_472, shared_of_block=232_448, nvlink_bytes=450e9, network_bytes=50e9,
        timed_as="h100",
    )  # fmt: skip


GPUS = {
    gpu.name: gpu
    for gpu in (
        _hopper("h100", "NVIDIA H100 80GB HBM3", memory=84_942_979_072, hbm_bandwidth=3352.32e9),
        _hopper("h200", "NVIDIA H200", memory=151_397_597_184, hbm_bandwidth=4800e9),
        Gpu(
            name="a100", kind="NVIDIA A100-SXM4-80GB", memory=85_100_068_864, hbm_bandwidth=2039.04e9,
            capability=(8, 0), cores=108, units=64, clock=1.41, cache=41_943_040, shared=167_936,
            shared_of_block=166_912, nvlink_bytes=300e9, network_bytes=25e9, timed_as="a100",
        ),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class StandIn:
    """A GPU as far as a mesh and tracing ask; nothing can be lowered for it."""

    id: int
    device_kind: str
    core_count: int
    platform: str = "gpu"
    process_index: int = 0
    client: None = None


def gpu_topology_named(name: str) -> str:
    """Return h100:8 of the name h100-8 or h100:8; "" if it is no number of GPUs.

    Raises:
      ValueError: it is, but not one that a machine has, or several machines of eight.
    """
    found = re.fullmatch(r"([a-z]\w*)[-:](\d+)", name)
    if not found or found[1] not in GPUS:
        return ""
    count = int(found[2])
    if count not in (1, 2, 4) and (count % GPUS_OF_NODE or not 0 < count <= _MOST_NODES * GPUS_OF_NODE):
        raise ValueError(
            f"--topology={name} is not planned for: {found[1]} comes as 1, 2, 4 or {GPUS_OF_NODE} in one machine, and "
            f"as multiples of {GPUS_OF_NODE} up to {_MOST_NODES * GPUS_OF_NODE} in several: {found[1]}-8, {found[1]}-16"
        )
    return f"{found[1]}:{count}"


def describe_gpu_topologies() -> str:
    """Return what --topology takes of GPUs."""
    return f"{{{','.join(GPUS)}}}-{{1,2,4,8,16,24,...}}"


def has_cuda_plugin() -> bool:
    """Return whether JAX's plugin for CUDA 13 is installed, with which steps are compiled."""
    return importlib.util.find_spec("jax_cuda13_plugin") is not None


def gpu_devices(gpu: Gpu, *, count: int) -> list:
    """Return so many GPUs: compiled for where the CUDA plugin is installed, stand-ins where it is not."""
    if not has_cuda_plugin():
        return [StandIn(id=at, device_kind=gpu.kind, core_count=gpu.cores) for at in range(count)]
    nodes = -(-count // GPUS_OF_NODE)
    description = topologies.get_topology_desc(
        platform="cuda", topology_name=gpu.kind, topology=f"1x{nodes}x{count // nodes}", target_config=gpu.target_config
    )
    return list(description.devices)


@contextlib.contextmanager
def answering_for(gpu: Gpu) -> Iterator[None]:
    """Answer JAX's questions about the GPU here with those of `gpu`: it has no other way to be told of one."""
    own = gpu.capability[0] + gpu.capability[1] / 10
    with contextlib.ExitStack() as stack:
        answers: dict[str, Callable] = {
            "check_compute_capability": lambda capability: own >= float(capability),
            "is_cuda_compute_capability_equal": lambda capability: own == float(capability),
        }
        if not has_cuda_plugin():
            answers["check_cudnn_version"] = lambda: _CUDNN_VERSION
        for name, answer in answers.items():
            stack.enter_context(mock.patch(f"{_CUDNN}.{name}", answer))
        yield


def is_stand_in(device: jax.Device | StandIn) -> bool:  # pyright: ignore[reportInvalidTypeForm] # jax declares it so
    """Return whether a device is one that nothing can be compiled for."""
    return isinstance(device, StandIn)
