"""Compile a config's train steps for NVIDIA GPUs on a machine without one, and say what memory they need.

Command: python benchmarks/compile_for_cuda.py --config=gpu/80gb_8:1.3B --gpu=h100 --count=8 [--accumulation=2]
Needs pip install 'jax[cuda13]' of the same version, 3 GB, best in an environment of its own: where there is no GPU, JAX
warns at each start once it is there. The GPU is described to XLA (figures of xla/backends/gpu/target_config/specs of
openxla/xla), kernels are not tried out (xla_gpu_autotune_level=0), and nothing runs. jaxlib 0.10.2 leaves cuDNN's
graphs as they are without a GPU, so the memory that its backward pass works in is added by a formula: float32 dq, and a
number a row.

A line a phase: GiB of a GPU for state and batch, what the step needs beside, cuDNN's, the sum and its share of nine
tenths of the memory (XLA_PYTHON_CLIENT_MEM_FRACTION=0.9, as launch/gpu.sh sets it); exchanges in the program's text;
seconds to compile. Exit code 1 if a phase does not fit with a tenth to spare.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import re
import sys
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental import topologies

from btlm_jax.attention.gpu import describe_attention, padded_width
from btlm_jax.cli.parse import find_config, load_config
from btlm_jax.parallel.make_mesh import make_run_mesh
from btlm_jax.recipe.config import TrainConfig, train_config_from
from btlm_jax.recipe.curriculum import Phase
from btlm_jax.train.program import Program, make_program

GIB = 1 << 30
MEMORY_SHARE, SPARE = 0.9, 0.1
EXCHANGES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """What XLA asks of a GPU."""

    name: str
    capability: tuple[int, int]
    cores: int
    units: int  # of float32, a core
    clock: float  # GHz
    memory: int  # bytes
    bandwidth: int  # bytes/s
    cache: int  # bytes, of the second level
    shared: int  # bytes of a core's shared memory
    shared_of_block: int  # the most that a block may ask for

    @property
    def target_config(self) -> str:
        major, minor = self.capability
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              shared_memory_per_block: 49152 shared_memory_per_core: {self.shared}
              shared_memory_per_block_optin: {self.shared_of_block}
              core_count: {self.cores} fpus_per_core: {self.units} clock_rate_ghz: {self.clock}
              memory_bandwidth: {self.bandwidth} l2_cache_size: {self.cache} device_memory_size: {self.memory}
              cuda_compute_capability {{ major: {major} minor: {minor} }}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 12 }}
            runtime_version {{ major: 13 minor: 0 }}
            device_description_str: "{self.name}"
        """


HOPPER = dict(
    capability=(9, 0), cores=132, units=128, clock=1.98, cache=52_428_800, shared=233_472, shared_of_block=232_448
)
AMPERE = dict(
    capability=(8, 0), cores=108, units=64, clock=1.41, cache=41_943_040, shared=167_936, shared_of_block=166_912
)
GPUS = {
    "h100": Gpu(name="NVIDIA H100 80GB HBM3", memory=84_942_979_072, bandwidth=3_352_320_000_000, **HOPPER),
    "h200": Gpu(name="NVIDIA H200", memory=151_397_597_184, bandwidth=4_800_000_000_000, **HOPPER),
    "a100": Gpu(name="NVIDIA A100-SXM4-80GB", memory=85_100_068_864, bandwidth=2_039_040_000_000, **AMPERE),
}


def gpu_devices(gpu: Gpu, *, count: int) -> list:
    """Return GPUs of one machine: programs can be compiled for them, arrays cannot be put on them."""
    own = gpu.capability[0] + gpu.capability[1] / 10
    cudnn.check_compute_capability = lambda capability: own >= float(capability)
    cudnn.is_cuda_compute_capability_equal = lambda capability: own == float(capability)
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=gpu.name, topology=f"1x1x{count}", target_config=gpu.target_config
    )
    return list(topology.devices)


def workspace_bytes(program: Program, phase: Phase) -> int:
    """Return what cuDNN's backward pass works in, of a layer on one GPU, by the formula."""
    config, mesh = program.config, program.mesh
    rows = phase.batch_size // config.mesh.accumulation
    width = padded_width(config.model.head_dim)
    return 4 * rows * phase.seq_len * config.model.num_heads * (width + 1) // mesh.size


def compile_phase(program: Program, phase: Phase, *, gpu: Gpu) -> tuple[str, bool]:
    """Compile the step of a phase; return what is to be said of it, and whether it fits."""
    began = time.monotonic()
    lowered = dataclasses.replace(program, options=program.options | {"xla_gpu_autotune_level": "0"})
    compiled = lowered.compile(program.trace_train_step(phase))
    seconds, memory, text = time.monotonic() - began, compiled.memory_analysis(), compiled.as_text()
    has_kernel = "__cudnn$fmha" in text
    state = memory.argument_size_in_bytes
    beside = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    workspace = workspace_bytes(program, phase) if has_kernel else 0
    needed, available = state + beside + workspace, MEMORY_SHARE * gpu.memory
    found = collections.Counter(re.findall(rf" ({'|'.join(EXCHANGES)})(?:-start)?\(", text))
    begun = collections.Counter(re.findall(rf" ({'|'.join(EXCHANGES)})-start\(", text))
    exchanges = ", ".join(f"{count} {kind} ({begun[kind]} asynchronous)" for kind, count in sorted(found.items()))
    forward = len(re.findall(r'custom_call_target="__cudnn\$fmhaSoftmax"', text))
    return (
        f"{phase.batch_size} x {phase.seq_len}: state and batch {state / GIB:.2f} + step {beside / GIB:.2f} + cuDNN "
        f"{workspace / GIB:.2f} = {needed / GIB:.2f} GiB, {needed / available:.0%} of {available / GIB:.1f}; "
        f"cuDNN's forward pass in {forward} places; exchanges: {exchanges or 'none'}; compiled in {seconds:.0f} s",
        needed <= (1 - SPARE) * available,
    )


def with_layout(config: TrainConfig, arguments: argparse.Namespace) -> TrainConfig:
    """Return the config with what the flags change."""
    changes = {
        name: getattr(arguments, name) for name in ("tensor", "context", "accumulation") if getattr(arguments, name)
    }
    model = dataclasses.replace(config.model, remat=arguments.remat) if arguments.remat else config.model
    return dataclasses.replace(config, model=model, mesh=dataclasses.replace(config.mesh, **changes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="name or file")
    parser.add_argument("--gpu", choices=GPUS, default="h100")
    parser.add_argument("--count", type=int, default=1, help="GPUs of the machine")
    parser.add_argument("--phases", type=int, nargs="*", help="numbers of the phases, from 1 on; all without")
    for name in ("tensor", "context", "accumulation"):
        parser.add_argument(f"--{name}", type=int, help=f"in place of mesh.{name}")
    parser.add_argument("--remat", help="in place of model.remat")
    arguments = parser.parse_args()
    gpu = GPUS[arguments.gpu]
    name, _, argument = arguments.config.partition(":")
    values = load_config(find_config(name), argument=argument, changes={})
    config = with_layout(train_config_from(values), arguments)
    table = config.curriculum.table
    mesh = make_run_mesh(config.mesh, curriculum=table, devices=gpu_devices(gpu, count=arguments.count))
    program = make_program(config, mesh)
    layout = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one GPU"
    print(f"{arguments.config} on {arguments.count} x {gpu.name} ({layout}), {config.mesh.accumulation} micro-batches, "
          f"{config.model.remat}; jax {jax.__version__}, cuDNN {cudnn.check_cudnn_version()}")  # fmt: skip
    with jax.set_mesh(mesh):
        print(describe_attention(config.model, has_documents=config.data.document_mask), flush=True)
    all_fit = True
    for phase in table.phases:
        if arguments.phases and phase.index + 1 not in arguments.phases:
            continue
        said, fits = compile_phase(program, phase, gpu=gpu)
        print(said, flush=True)
        all_fit &= fits
    sys.exit(0 if all_fit else 1)


if __name__ == "__main__":
    main()
