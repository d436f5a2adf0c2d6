"""Compile our attention kernels for TPUs at many numbers and widths of heads: none may need too much vector memory.

    python benchmarks/kernel_vmem.py --chips=v5e,v4 --lengths=2048,8192 --heads=16x72,32x80,20x128

No TPU is needed, but libtpu is (pip install 'btlm_jax[tpu]'), and about ten seconds a shape, one at a time. A line says
which blocks attention/tpu.py chose: heads of a program, positions of a block, blocks of queries at once in the backward
pass. --less=N has the compiler allow N MiB less than the kernels ask for, to see how close the choice is.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
import time
from unittest import mock

# As `btlm new` makes them, of published models, as context parallelism leaves them, and odd ones.
SHAPES = "16x64,16x72,16x88,16x96,16x104,16x112,32x80,64x104,12x64,20x128,25x64,20x72,32x100,36x80,4x104,2x72,1x80,7x24"


def compile_shape(chip: str, *, heads: int, head_dim: int, length: int, less: int) -> str:
    """Compile forward and backward for one device; return the blocks that were chosen, or what libtpu says."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from btlm_jax.attention import attend, tpu
    from btlm_jax.attention.tpu_kernels import Heads
    from btlm_jax.plan.chips import CHIPS, slice_devices

    jax.config.update("jax_platforms", "cpu")
    mesh = jax.make_mesh((1, 1), ("a", "b"), devices=slice_devices(f"{chip}:{CHIPS[chip].slices[0]}")[:1])
    replicated = NamedSharding(mesh, PartitionSpec())
    x_BTM = jax.ShapeDtypeStruct((2, length, heads * head_dim), jnp.bfloat16, sharding=replicated)
    slopes_N = jax.ShapeDtypeStruct((heads,), jnp.float32, sharding=replicated)
    params = functools.partial(_allow, tpu.pltpu.CompilerParams, less << 20)

    def step(slopes_N, do_BTM, *qkv_BTM):
        def output(*qkv_BTM):
            q, k, v = (x.reshape(2, length, heads, head_dim) for x in qkv_BTM)
            return attend(q, k, v, slopes_N, scale=1 / head_dim, implementation="auto").reshape(2, length, -1)

        o_BTM, gradients = jax.vjp(output, *qkv_BTM)
        return o_BTM, gradients(do_BTM)

    with jax.set_mesh(mesh), mock.patch.object(tpu.pltpu, "CompilerParams", params):
        lowered = jax.jit(step).lower(slopes_N, *4 * [x_BTM])
        try:
            lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            needs = re.search(r"size ([\d.]+\w) and limit ([\d.]+\w)", str(error))
            return f"FAILS: {needs[1]} of {needs[2]}" if needs else f"FAILS: {' '.join(str(error).split())[:200]}"
        if not tpu.has_kernels_for(heads, head_dim, jnp.bfloat16):
            return "compiles, by splash"
        kernel = Heads(num=heads, dim=head_dim, scale=1.0, itemsize=2)
        size = tpu.block_size(kernel, length)
        return (
            f"compiles: {kernel.together} heads, {size} positions, {tpu._queries_at_once(kernel, length, size)} at once"
        )


def _allow(params, less: int, **arguments):
    return params(**{**arguments, "vmem_limit_bytes": arguments["vmem_limit_bytes"] - less})


def main(arguments: list[str]) -> int:
    """Print a line for each; return 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", default="v4,v5e,v5p,v6e")
    parser.add_argument("--lengths", default="2048,8192,32768")
    parser.add_argument("--heads", default=SHAPES, help="NUMBERxWIDTH, ...")
    parser.add_argument("--less", type=int, default=0, help="MiB")
    flags = parser.parse_args(arguments)
    failed = 0
    for chip in flags.chips.split(","):
        for shape in flags.heads.split(","):
            for length in map(int, flags.lengths.split(",")):
                heads, head_dim = map(int, shape.split("x"))
                began = time.monotonic()
                said = compile_shape(chip, heads=heads, head_dim=head_dim, length=length, less=flags.less)
                failed += said.startswith("FAILS")
                print(f"{chip} {shape} {length:,}: {said} ({time.monotonic() - began:.0f} s)", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
