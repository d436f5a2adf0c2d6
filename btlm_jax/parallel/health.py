"""Whether all devices of all hosts are there, compute and exchange: one small step before a run, not a part of it.

`python -m btlm_jax.parallel.health --devices=256 --distributed` on every host, at the same time; launch/tpu.sh does it.
"""

from __future__ import annotations

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

SIZE = 256  # of the matrices that each device multiplies
_LARGEST = 8  # of their entries, integers: products are exact in float32


def fault_of_devices(
    devices: list[jax.Device],  # pyright: ignore[reportInvalidTypeForm] # jax declares it as a variable
    *,
    expected: int,
    platform: str = "",
) -> str:
    """Multiply two matrices on each device and sum all devices' results; return what is wrong, "" if nothing is.

    Device d's result counts d + 1 times, so that one that is missing, doubled or another device's changes the sum. That
    is of integers, modulo 2^32: the order of the sum changes nothing. If a `platform` is given, devices of another are
    wrong: where an accelerator does not start JAX goes on with the CPU.
    """
    if platform not in ("", devices[0].platform):
        return f"JAX found no {platform} and took {devices[0].device_kind}; what it said of that is above"
    if len(devices) != expected:
        return f"{len(devices)} devices, and {expected} are expected"
    mesh = Mesh(np.asarray(devices), ("device",))
    left, right = _matrices()
    product = left.astype(np.int32) @ right.astype(np.int32)
    total = int(product.sum(dtype=np.int64)) * (expected * (expected + 1) // 2)

    def step(left_XY: jax.Array, right_YZ: jax.Array):
        product_XZ = jnp.dot(left_XY, right_YZ, precision="highest", preferred_element_type=jnp.float32)
        share = product_XZ.astype(jnp.int32).sum() * (jax.lax.axis_index("device") + 1)
        return jax.lax.psum(share, "device"), jnp.abs(product_XZ - product).max()[None]

    run = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P()), out_specs=(P(), P("device")), check_vma=False))
    whole = NamedSharding(mesh, P())
    found, errors = run(*(jax.make_array_from_callback(x.shape, whole, lambda i, x=x: x[i]) for x in (left, right)))
    for shard in errors.addressable_shards:
        if (error := float(np.asarray(shard.data)[0])) != 0.0:
            return f"{shard.device} multiplies matrices wrongly: an entry is off by {error}"
    if (int(np.asarray(found.addressable_data(0))) - total) % 2**32:
        return "the sum over all devices is wrong: they do not exchange what they compute"
    return ""


def _matrices() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    left, right = (random.integers(-_LARGEST, _LARGEST + 1, (SIZE, SIZE)) for _ in range(2))
    return left.astype(np.float32), right.astype(np.float32)


def main(arguments: list[str]) -> int:
    """Check this host's part of it; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m btlm_jax.parallel.health", description=__doc__)
    parser.add_argument("--devices", type=int, required=True, help="how many there must be, of all hosts")
    parser.add_argument("--platform", default="", help="what they must be: gpu, tpu")
    parser.add_argument("--distributed", action="store_true", help="join the other hosts of a TPU pod slice")
    flags = parser.parse_args(arguments)
    if flags.distributed:
        jax.distributed.initialize()
    fault = fault_of_devices(jax.devices(), expected=flags.devices, platform=flags.platform)
    if fault:
        print(f"health: process {jax.process_index()}: {fault}", file=sys.stderr)
        return 1
    print(
        f"health: process {jax.process_index()} of {jax.process_count()}: {flags.devices} devices compute and exchange"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
