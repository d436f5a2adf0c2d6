"""Seconds of a step on GPUs by a formula, and what published runs took over theirs.

The parts of a step are its matrix products and attention at the peak, bytes of everything else at the bandwidth of HBM,
and exchanges over NVLink and between machines. gpu_runs.json beside this file holds measured steps of other models by
other code, each with its source: their parts by the same formula correct what is planned.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

from btlm_jax.plan.calibration import Parts, Point, hash_of_points
from btlm_jax.plan.executable import Collective
from btlm_jax.plan.gpus import GPUS, GPUS_OF_NODE, Gpu
from btlm_jax.plan.torus import Exchange
from btlm_jax.storage.files import read_json_object
from btlm_jax.train.flops import peak_of_kind

RUNS_FILE = Path(__file__).with_name("gpu_runs.json")

# Values read and written in HBM a token and a layer by what a forward pass does beside products: of width d_model two
# norms (read, written), two residual sums (two read, one written), positions put into queries and keys (read, written);
# of width d_ff the activation, which reads its inputs and writes a value. The backward pass does it twice.
_OF_D = 2 * 2 + 2 * 3 + 2 * 2
_PASSES = 1 + 2
_BYTES_OF_LOGIT = 4 + 2 * 4 + 2 + 2 * 2  # float32 written, read for norm and gradient; that written, read twice
# A parameter, by micro-batch: read in float32 and written in bfloat16 for either pass, its gradient added to the sum.
# By step: gradient read for its norm; gradient, parameter and both moments read, the last three written.
_BYTES_OF_PARAMETER, _BYTES_OF_UPDATE = 2 * (4 + 2) + 3 * 4, 4 + 4 * 4 + 3 * 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuWork:
    """What one GPU does in a step."""

    product_flops: float  # of matrix products but attention's
    attention_flops: float
    tokens: float  # of its sequences or parts of them, with whole activations
    num_layers: int
    d_model: int
    d_ff: int  # its part
    mlp_inputs: int  # of the activation function: 2 where it is gated
    itemsize: int  # of activations
    logits: float
    parameters: float  # that it stores
    micro_batches: int
    computed_again: float  # share of the forward pass, without products, that the backward pass does again

    @property
    def moved_bytes(self) -> float:
        """Bytes read from HBM and written to it outside of matrix products and attention."""
        of_layer = _OF_D * self.d_model + (self.mlp_inputs + 1) * self.d_ff
        activations = self.itemsize * self.tokens * self.num_layers * of_layer * (_PASSES + self.computed_again)
        parameters = self.parameters * (self.micro_batches * _BYTES_OF_PARAMETER + _BYTES_OF_UPDATE)
        return activations + self.logits * _BYTES_OF_LOGIT + parameters


def gpu_parts(work: GpuWork, exchanges: Sequence[Exchange], *, gpu: Gpu) -> Parts:
    """Return the parts of a step's time; `products` and `elementwise` are the roofline's, as XLA estimates none."""
    peak = peak_of_kind(gpu.kind) * 2 / work.itemsize
    products, elementwise = work.product_flops / peak, work.moved_bytes / gpu.hbm_bandwidth
    return Parts(
        products=products,
        products_at_peak=products,
        elementwise=elementwise,
        elementwise_at_bandwidth=elementwise,
        slowest=products + elementwise,
        unestimated=0.0,
        prefetched=0.0,
        attention=work.attention_flops / peak,
        negligible=0.0,
        exposed=sum(each.seconds for each in exchanges if not each.is_asynchronous),
        asynchronous=sum(each.seconds for each in exchanges if each.is_asynchronous),
    )


def time_gpu_exchange(collective: Collective, *, gpu: Gpu) -> Exchange:
    """Return a collective with its time, of its first group of devices, which are numbered machine by machine.

    A ring brings every GPU what the others have, (n - 1) / n of the array, over NVLink; of a group on k machines all
    but 1 / k of the array comes into each machine by the network of the GPUs that the group has there. Both at once.
    """
    group = collective.groups[0] if collective.groups else tuple(range(collective.num_devices))
    n = len(group)
    machines = {device // GPUS_OF_NODE for device in group}
    k, share = len(machines), len(group) / len(machines)
    if collective.kind == "collective-permute":
        inside, between = (collective.num_bytes, 0.0) if k == 1 else (0.0, collective.num_bytes)
    elif collective.kind == "all-to-all":
        inside, between = (collective.num_bytes * part / n for part in (share - 1, n - share))
    else:
        passes = 2 if collective.kind == "all-reduce" else 1
        inside = passes * collective.num_bytes * (n - 1) / n
        between = passes * collective.num_bytes * (k - 1) / k / share
    once = max(inside / gpu.nvlink_bytes, between / gpu.network_bytes)
    way = f"NVLink of {n}" if k == 1 else f"{k} machines, {share:g} GPUs of each"
    return Exchange(
        kind=collective.kind, num_bytes=collective.num_bytes, num_devices=n, count=collective.count,
        is_asynchronous=collective.is_asynchronous, way=way, seconds=collective.count * once,
    )  # fmt: skip


@functools.cache
def published_gpu_points(file: Path = RUNS_FILE) -> tuple[Point, ...]:
    """Return the published runs on GPUs with their parts."""
    return tuple(_point(values) for values in read_json_object(file)["runs"])


def gpu_calibration_hash() -> str:
    """Return the first 12 digits of the hash of the published runs on GPUs and their parts."""
    return hash_of_points(published_gpu_points())


def _point(values: dict) -> Point:
    gpu, n, model = GPUS[values["gpu"]], values["num_gpus"], values["model"]
    L, D, F, V = (model[name] for name in ("num_layers", "d_model", "d_ff", "vocab_size"))
    parameters = L * (4 * D * D + (model["mlp_inputs"] + 1) * D * F) + V * D
    tokens, T = values["batch_size"] * values["seq_len"] / n, values["seq_len"]
    work = GpuWork(
        product_flops=6.0 * parameters * tokens,
        attention_flops=7.0 * L * D * T * tokens,  # 2 products forward and 5 backward, half of each T x T
        tokens=tokens,
        num_layers=L,
        d_model=D,
        d_ff=F,
        mlp_inputs=model["mlp_inputs"],
        itemsize=2,
        logits=tokens * V,
        parameters=parameters / n,
        micro_batches=values["micro_batches"],
        computed_again=values["computed_again"],
    )
    # Fully sharded: parameters gathered in bfloat16 for both passes, gradients scattered in float32, beside products.
    sent = (("all-gather", 2, 2), ("reduce-scatter", 4, 1))
    exchanges = [
        time_gpu_exchange(
            Collective(
                kind=kind, num_bytes=size * parameters, num_devices=n, count=times * values["micro_batches"],
                is_asynchronous=True,
            ),
            gpu=gpu,
        )
        for kind, size, times in sent
    ]  # fmt: skip
    executed = work.product_flops + work.attention_flops
    return Point(
        name=values["name"],
        chip=gpu.name,
        measured=values["step_seconds"],
        parts=gpu_parts(work, exchanges, gpu=gpu),
        hfu=executed / peak_of_kind(gpu.kind) / values["step_seconds"],
    )
