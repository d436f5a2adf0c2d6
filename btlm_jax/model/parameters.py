"""The parameters as a tree: shape, logical axes, rule and sharding of each; and making them, split over the mesh."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from btlm_jax.model.transformer import Btlm
from btlm_jax.parallel.mesh import num_ways
from btlm_jax.recipe.mup import CLASSES, ParameterRule


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


def freeze(table: dict, patterns: Sequence[str]) -> dict:
    """Return a table in which the parameters that match one of the patterns are frozen.

    A pattern, with * ? [...] as in shells, matches a class of mup.py, or names of a path that lie side by side: `bias`,
    `ln_*`, `mlp`, `attention/*/kernel`, `blocks/mlp/up`.

    Raises:
      ValueError: a pattern matches nothing, or nothing is left that learns.
    """
    infos = jax.tree.leaves(table)
    for pattern in patterns:
        if not any(_matches(info, pattern) for info in infos):
            present = {info.rule.parameter_class for info in infos}
            raise ValueError(
                f"optimizer.freeze: {pattern!r} matches no parameter; there are the classes "
                f"{', '.join(name for name in CLASSES if name in present)} and the parameters "
                f"{', '.join(info.path for info in infos)}; patterns and parts of paths match too, as ln_* and "
                "mlp/*/bias. Layers are one array each and are not frozen one by one"
            )
    frozen = [info for info in infos if any(_matches(info, pattern) for pattern in patterns)]
    if not any(info.rule.learning_rate for info in infos if info not in frozen):
        raise ValueError(
            f"optimizer.freeze={','.join(patterns)} freezes every parameter that learns, so there is nothing to train; "
            "leave a pattern out"
        )

    def rule(info: ParameterInfo) -> ParameterRule:
        return dataclasses.replace(info.rule, learning_rate=0.0, weight_decay=0.0, is_frozen=True)

    return jax.tree.map(lambda info: dataclasses.replace(info, rule=rule(info)) if info in frozen else info, table)


def with_decay(table: dict, convention: str) -> dict:
    """Return a table whose rules have the weight decay of one of recipe/config.py's WEIGHT_DECAY_CONVENTIONS."""

    def rule(rule: ParameterRule) -> ParameterRule:
        if convention == "preset" or not rule.weight_decay:
            return rule
        return dataclasses.replace(rule, weight_decay=1 / rule.learning_rate if convention == "independent" else 1.0)

    return jax.tree.map(lambda info: dataclasses.replace(info, rule=rule(info.rule)), table)


def _matches(info: ParameterInfo, pattern: str) -> bool:
    wanted, names = pattern.split("/"), info.path.split("/")
    parts = [names[at : at + len(wanted)] for at in range(len(names) - len(wanted) + 1)]
    is_part = any(all(map(fnmatch.fnmatchcase, part, wanted)) for part in parts)
    return is_part or fnmatch.fnmatchcase(info.rule.parameter_class, pattern)


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
