"""The parameters as a tree: shape, logical axes, rule and sharding of each; and making them, split over the mesh."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from btlm_jax.model.transformer import Btlm
from btlm_jax.parallel.mesh import num_ways
from btlm_jax.recipe.mup import ParameterRule


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterInfo:
    """What is known of a parameter before it is made."""

    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    rule: ParameterRule
    sharding: NamedSharding

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.shape, jnp.float32, sharding=self.sharding)


def parameter_table(model: Btlm, mesh: Mesh) -> dict:
    """Return the tree of parameters with a ParameterInfo at every leaf; nothing is computed.

    Raises:
      ValueError: a parameter belongs to no class of mup.py.
    """

    def info(path, box) -> ParameterInfo:
        names = [key.key for key in path]
        return ParameterInfo(
            path="/".join(names),
            shape=box.value.shape,
            axes=box.names,
            rule=model.parametrization.rule(box.names, layer=names[-2], leaf=names[-1]),
            sharding=NamedSharding(mesh, model.rules.spec(*box.names)),
        )

    with jax.set_mesh(mesh):
        boxed = jax.eval_shape(lambda: model.init(jax.random.key(0), _example_inputs(model, mesh)))["params"]
    return jax.tree_util.tree_map_with_path(info, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def init_params(model: Btlm, mesh: Mesh, *, seed: int) -> dict:
    """Make the parameters, split over the mesh; their values depend on the seed alone."""
    shardings = jax.tree.map(lambda info: info.sharding, parameter_table(model, mesh))

    def init(key):
        return nn.unbox(model.init(key, _example_inputs(model, mesh))["params"])

    with jax.set_mesh(mesh):
        return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def _example_inputs(model: Btlm, mesh: Mesh) -> jax.Array:
    shape = num_ways(mesh, model.rules.batch), 8 * num_ways(mesh, model.rules.length)
    return jnp.zeros(shape, jnp.int32, out_sharding=NamedSharding(mesh, model.rules.spec("batch", "length")))
