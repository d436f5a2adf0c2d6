"""Compile what `btlm evaluate` runs of BTLM-3B-8K for a TPU slice that is not there, and say what memory it takes.

Command: python benchmarks/evaluate_on_pod.py --topology=v5e:4x4 --lengths=2048,8192,32768

No TPU is needed, but libtpu is (pip install 'btlm_jax[tpu]'), and some minutes. For each length windows of that
length, as loss by position scores them, each device as many as --batch_tokens allows, at least one; with --prefixes too
the piece of a cached prefix of 2,048 tokens that choices go on from. Bytes are of one device, after libtpu's own count.
"""

from __future__ import annotations

import argparse
import sys
import time

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from btlm_jax.decode import kv_cache
from btlm_jax.evaluate import scorer, shared_prefix
from btlm_jax.model import make_model, parameter_table
from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.parallel.mesh import FSDP
from btlm_jax.plan.chips import chip_of, slice_devices, topology_named
from btlm_jax.recipe.config import train_config_from
from btlm_jax.recipe.mup import make_parametrization

GIB = 1 << 30


def main() -> int:
    """Compile, print a table; return 1 if something does not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--lengths", default="2048,8192,16384,32768")
    parser.add_argument("--batch_tokens", type=int, default=8192)
    parser.add_argument("--prefixes", action="store_true")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    from btlm_jax.cli.parse import find_config, load_config

    values = load_config(find_config("btlm_3b_8k"), argument="", changes={})
    config = train_config_from(values)
    topology = topology_named(arguments.topology)
    mesh, chip = make_mesh(devices=slice_devices(topology), tensor=1), chip_of(topology)
    ways = mesh.shape[FSDP]
    model = make_model(config.model, make_parametrization(config.mup, config.model))
    params = jax.tree.map(lambda info: info.abstract, parameter_table(model, mesh))
    rows = NamedSharding(mesh, PartitionSpec(FSDP))

    def ids(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)

    programs = {}
    for length in map(int, arguments.lengths.split(",")):
        size = ways * max(1, arguments.batch_tokens // length)
        inputs = (ids(size, length),) * 3
        programs[f"{size} windows of {length:,}"] = lambda inputs=inputs: scorer._scores_on_mesh.lower(
            model, params, *inputs
        )
    if arguments.prefixes:
        most = shared_prefix.DEVICE_CACHE_BYTES // (2 * config.model.num_layers * config.model.d_model * 2 * 2048)
        size = ways * (1 << (most.bit_length() - 1))
        cached = NamedSharding(mesh, kv_cache.cache_spec())
        shape = (config.model.num_layers, size, 2048, config.model.num_heads, config.model.head_dim)
        cache = kv_cache.KVCache(
            **{name: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=cached) for name in ("k_LBSNH", "v_LBSNH")}
        )
        new = (ids(size, shared_prefix.MAX_PIECE), ids(size), ids(size))
        programs[f"256 tokens more of {size} prefixes of up to 2,048"] = lambda: shared_prefix._extend_on_mesh.lower(
            model, params, cache, *new
        )
    print(f"BTLM-3B-8K on {topology}, {len(mesh.devices.flat)} devices, {chip.hbm_bytes / GIB:.2f} GiB each\n")
    print("| scored at a time | arguments, GiB | temporary, GiB | compiled in, s |\n|---|---:|---:|---:|")
    has_failed = False
    for what, lower in programs.items():
        began = time.monotonic()
        try:
            with jax.set_mesh(mesh):
                stats = lower().compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            print(f"| {what} | does not fit: {' '.join(str(error).split())[:300]} | | |", flush=True)
            has_failed = True
            continue
        seconds = time.monotonic() - began
        sizes = (stats.argument_size_in_bytes / GIB, stats.temp_size_in_bytes / GIB)
        print(f"| {what} | {sizes[0]:.2f} | {sizes[1]:.2f} | {seconds:.0f} |", flush=True)
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
