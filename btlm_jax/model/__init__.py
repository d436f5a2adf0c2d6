"""The network: the only folder that imports flax.linen.

Axis letters, in names and in einsums: B batch, T query length, S key length, D model, N heads, H head dim, F mlp,
V vocab, L layers, R rows (batch x length). The model runs under `jax.set_mesh` of a mesh of parallel/mesh.py.
"""

from btlm_jax.model.parameters import ParameterInfo, freeze, init_params, parameter_table, with_decay
from btlm_jax.model.transformer import Btlm, make_model

__all__ = [
    "Btlm",
    "ParameterInfo",
    "freeze",
    "init_params",
    "make_model",
    "parameter_table",
    "with_decay",
]
