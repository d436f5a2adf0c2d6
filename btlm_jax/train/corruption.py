"""Whether devices compute what they should: copies of parameters compared, steps computed twice.

Imported only by runs that ask for it (bad_numbers.compare_every, bad_numbers.recompute_every). A device that computes
wrongly now and then changes a run without a word: its numbers are finite, and no hash of a file is wrong.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from btlm_jax.recipe.config import BadNumbersConfig
from btlm_jax.train.checkpoint import local_sums
from btlm_jax.train.step import CorruptionError


class Checks:
    """The checks of a run whose state is on `mesh`; every process calls them after the same steps."""

    def __init__(self, config: BadNumbersConfig, mesh: Mesh):
        self._config, self._mesh = config, mesh
        self._traced_sums = jax.jit(self._trace_sums)
        self._copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))

    def step(self, train_step: Callable, step: int, state: Any, batch: Any, learning_rate: np.float32) -> tuple:
        """Return what `train_step` does, computed twice if this is one of recompute_every steps.

        Raises:
          CorruptionError: the two states, or the steps' numbers, differ in a bit; names the devices.
        """
        every = self._config.recompute_every
        if not every or step % every:
            return train_step(state, batch, learning_rate)
        first, numbers = train_step(self._copy(state), batch, learning_rate)
        sums, numbers = self._sums(first), jax.device_get(numbers)
        del first  # of which there is no room for long
        result = train_step(state, batch, learning_rate)
        devices = np.flatnonzero((self._sums(result[0]) != sums).any((1, 2)))
        if devices.size:
            names = ", ".join(self._name(int(number)) for number in devices)
            raise CorruptionError(step, f"computed twice it has other bits on {names}")
        again = jax.device_get(result[1])
        differing = {name for name in again if np.asarray(again[name]).tobytes() != numbers[name].tobytes()}
        if jax.process_count() > 1:  # each has its own copies of them
            from btlm_jax.parallel.rendezvous import texts_of_all

            differing = {name for text in texts_of_all(" ".join(sorted(differing))) for name in text.split()}
        if differing:
            raise CorruptionError(step, f"computed twice it has another {', '.join(sorted(differing)[:3])}")
        return result

    def compare(self, step: int, state: Any, *, is_saving: bool) -> None:
        """Compare all copies of the state if this is one of compare_every steps, or it is to be saved.

        Raises:
          CorruptionError: devices that have the same part of an array have other bits; names the array and the devices.
        """
        every = self._config.compare_every
        if not every or (step % every and not is_saving):
            return
        sums = self._sums(state)
        for row, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(state)):
            parts = leaf.sharding.devices_indices_map(leaf.shape)
            groups = collections.defaultdict(list)
            for number, device in enumerate(self._mesh.devices.flat):
                groups[repr(parts[device])].append(number)
            for devices in groups.values():
                found = [sums[number, row].tobytes() for number in devices]
                (usual, count), *others = collections.Counter(found).most_common()
                if not others:
                    continue
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                if count == others[0][1]:
                    names = " and ".join(self._name(number) for number in devices)
                    raise CorruptionError(step, f"{name}: {names} have copies with different bits")
                wrong = [self._name(number) for number, value in zip(devices, found, strict=True) if value != usual]
                raise CorruptionError(step, f"{name}: {', '.join(wrong)} differs from {count} other copies")

    def _sums(self, tree: Any) -> np.ndarray:
        """Return the hash that `facts_of` has, of the part of each array that each device has: [devices, leaves, 2]."""
        with jax.set_mesh(self._mesh):
            return np.asarray(self._traced_sums(jax.tree.leaves(tree)).addressable_data(0))

    def _trace_sums(self, leaves: list[jax.Array]) -> jax.Array:
        def local(leaves: list[jax.Array]) -> jax.Array:
            return jnp.stack([jnp.stack(local_sums(leaf)) for leaf in leaves])[None]

        specs = [jax.typeof(leaf).sharding.spec for leaf in leaves]
        by_device = PartitionSpec(self._mesh.axis_names)
        mapped = jax.shard_map(local, mesh=self._mesh, in_specs=(specs,), out_specs=by_device, check_vma=False)
        return jax.sharding.reshard(mapped(leaves), NamedSharding(self._mesh, PartitionSpec()))

    def _name(self, number: int) -> str:
        device = self._mesh.devices.flat[number]
        return f"device {device.id} of process {device.process_index}"
