"""The feed-forward layer of GPT-2 in the place of SwiGLU: two matrices, and GELU between them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from unittest import mock

import flax.linen as nn
import jax

from btlm_jax.model import transformer
from btlm_jax.model.layers import Linear


class GeluMlp(transformer.Mlp):
    """x_BTD -> down(gelu(up(x))), with the exact GELU, x (1 + erf(x / sqrt(2))) / 2 (arXiv 1606.08415)."""

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        D, F = self.config.d_model, self.config.d_ff
        linear = functools.partial(Linear, parametrization=self.parametrization, rules=self.rules, project=self.project)
        up_BTF = linear(in_shape=(D,), in_axes=("embed",), out_shape=(F,), out_axes=("mlp",), name="up")(x_BTD)
        hidden_BTF = jax.nn.gelu(up_BTF, approximate=False)
        return linear(in_shape=(F,), in_axes=("mlp",), out_shape=(D,), out_axes=("embed",), name="down")(hidden_BTF)


@contextlib.contextmanager
def gelu_in_place_of_swiglu() -> Iterator[None]:
    """Build networks with GeluMlp meanwhile. No key of the config does, since no published BTLM is so."""
    with mock.patch.object(transformer, "Mlp", GeluMlp):
        yield
