"""FLOPs of training on a token; of a device the peak FLOP/s, which MFU is made of, the memory, and XLA's options."""

from __future__ import annotations

import dataclasses
import os
import time
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from btlm_jax.recipe.config import ModelConfig

if TYPE_CHECKING:
    from btlm_jax.recipe.sizes import Shape

FLOPS_CONVENTION = (
    "6 FLOP per matrix parameter and token, embedding counted once as the readout, plus 6 L D T of causal attention "
    "counted once; recompute, padding, biases and norms not counted"
)

# Dense bfloat16 FLOP/s of one device by a part of its kind, from the makers' data sheets. The first match counts.
_PEAKS = (
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),  # v5p calls itself "TPU v5" or "TPU v5p"
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
    ("A100", 312e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
)
_MEASUREMENTS = 6


def flops_per_token(model: ModelConfig | Shape, *, seq_len: int) -> float:
    """Return the FLOPs of training on one token of a sequence of `seq_len`, forward and backward.

    A matrix parameter multiplies and adds once forward and twice backward: 6. Causal attention does two T x T matmuls
    of width D a layer and sees half of each: 6 L D T for both passes (arXiv 2204.02311, appendix B, halved).
    """
    L, D, F, V = model.num_layers, model.d_model, model.d_ff, model.vocab_size
    matrix_parameters = L * (4 * D * D + 3 * D * F) + V * D
    return 6.0 * matrix_parameters + attention_flops_per_token(model, seq_len=seq_len)


def attention_flops_per_token(model: ModelConfig | Shape, *, seq_len: int) -> float:
    """Return the part of `flops_per_token` that is causal attention's products of queries, keys and values."""
    return 6.0 * model.num_layers * model.d_model * seq_len


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peak:
    """The most FLOP/s that one device can do, and where the number is from."""

    flops: float
    source: str


def peak_flops(device: jax.Device) -> Peak:  # pyright: ignore[reportInvalidTypeForm] # jax declares it as a variable
    """Return the peak of one device: from the table, or measured where the table does not know its kind."""
    for kind, flops in _PEAKS:
        if kind in device.device_kind:
            return Peak(flops=flops, source=f"data sheet of {kind}, dense bfloat16")
    return _measured_peak(device)


def peak_of_kind(device_kind: str) -> float:
    """Return the dense bfloat16 FLOP/s of a kind that the table knows."""
    return next(flops for kind, flops in _PEAKS if kind in device_kind)


def memory_bytes(device: jax.Device) -> int:  # pyright: ignore[reportInvalidTypeForm] # jax declares it as a variable
    """Return the bytes that a device may use; the CPU's are the whole machine's, which all its devices share."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _measured_peak(device: jax.Device) -> Peak:  # pyright: ignore[reportInvalidTypeForm] # jax declares it as a variable
    """Time a square matmul, the fastest of several; a CPU's cores serve all its simulated devices together."""
    is_cpu = device.platform == "cpu"
    size, dtype = (1280, jnp.float32) if is_cpu else (8192, jnp.bfloat16)
    sharing = jax.local_device_count() if is_cpu else 1
    # Its own mesh: the caller's may span devices that this array is not on.
    with jax.set_mesh(jax.sharding.Mesh(np.array([device]), ("one",))):
        x = jax.device_put(np.ones((size, size), dtype), device)
        matmul = jax.jit(jnp.matmul)
        matmul(x, x).block_until_ready()
        times = []
        for _ in range(_MEASUREMENTS):
            began = time.perf_counter()
            matmul(x, x).block_until_ready()
            times.append(time.perf_counter() - began)
    source = f"measured on {device.device_kind}: {jnp.dtype(dtype).name} matmul of {size:,} x {size:,}"
    if sharing > 1:
        source += f", shared by {sharing} simulated devices"
    return Peak(flops=2 * size**3 / min(times) / sharing, source=source)


# Collectives that overlap with computation. By default XLA makes some of them asynchronous on a v5e and none on a v5p
# (read in compiled steps).
_TPU_OPTIONS = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}
# What hides collectives behind computation on GPUs, by docs/GPU_performance.md of NVIDIA/JAX-Toolbox: combined up to
# more than a layer's weights, in bytes. Left out of that page are pipelined collectives, with which the 1.3B on 8 H100
# needs 68.0 GiB and without 42.3 (compiled, 2026-11-29), and loops with two buffers, which double the code: gathers and
# scatters are asynchronous without them.
_GPU_OPTIONS: dict[str, str | bool] = {  # XLA takes a flag of its own as True, libtpu's as text
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_all_gather_combine_threshold_bytes": str(1 << 30),
    "xla_gpu_reduce_scatter_combine_threshold_bytes": str(1 << 30),
}
# Scatters, products and attention without atomic sums, by docs/determinism.md of openxla/xla: a resumed run ends with
# the same bits, as long as its compiled steps are kept (WORKDIR/compile_cache), since kernels are chosen by their time.
_GPU_DETERMINISM: dict[str, str | bool] = {"xla_gpu_exclude_nondeterministic_ops": True}
# KiB of vector memory (VMEM) for one fusion. A v5p has 64 MiB of it, a v5e and v6e 128, a v4 only the default's 16.
# With more, products use larger blocks, and a v5e and v6e reduce gradients without padding (read in compiled steps).
_SCOPED_VMEM_KIB = {"TPU v5": 32768, "TPU v5 lite": 65536, "TPU v6 lite": 65536}


def compiler_options(
    device: jax.Device,  # pyright: ignore[reportInvalidTypeForm] # jax declares it as a variable
) -> dict[str, str | bool]:
    """Return XLA's options for the train step on this kind of device; a GPU's without those that XLA_FLAGS sets."""
    if device.platform == "gpu":
        given = {flag.lstrip("-").partition("=")[0] for flag in os.environ.get("XLA_FLAGS", "").split()}
        if "xla_gpu_deterministic_ops" in given:  # which means the other one too
            given |= _GPU_DETERMINISM.keys()
        return {name: value for name, value in (_GPU_OPTIONS | _GPU_DETERMINISM).items() if name not in given}
    if device.platform != "tpu":
        return {}
    options: dict[str, str | bool] = {**_TPU_OPTIONS}
    if "lite" not in device.device_kind:  # libtpu 0.0.42 refuses asynchronous all-to-alls, or aborts, on v5e and v6e
        options["xla_tpu_enable_async_all_to_all"] = "true"
    if kib := _SCOPED_VMEM_KIB.get(device.device_kind):
        options["xla_tpu_scoped_vmem_limit_kib"] = str(kib)
    return options
