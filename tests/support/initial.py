"""Initial parameters on a mesh, made on one device: a program that draws them on several takes seconds to compile."""

import jax
from jax.sharding import Mesh

from btlm_jax.model import Btlm, init_params, parameter_table
from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.parallel.mesh import RULES


def params_on(mesh: Mesh, model: Btlm, *, seed: int) -> dict:
    """Return what `init_params` makes on this mesh: it is the same on all (tests/recipe/test_mup.py)."""
    one = make_mesh(devices=mesh.devices.flat[:1].tolist(), tensor=1)
    params = init_params(model.clone(rules=RULES), one, seed=seed)
    return jax.device_put(
        jax.device_get(params), jax.tree.map(lambda info: info.sharding, parameter_table(model, mesh))
    )
