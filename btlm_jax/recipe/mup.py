"""Maximal update parametrization: every width- and depth-dependent number of the recipe, as data.

A parameter is classified by the logical axes it is born with, and its class says how it starts and how it learns.
m = d_model / base_d_model, m_ff = d_ff / base_d_ff, L = num_layers, L_b = base_num_layers, sigma = mup.init_std,
eta = peak learning rate, lambda = optimizer.weight_decay:

    class           init std              learning rate   weight decay   Adam eps
    embedding       sigma                 eta             lambda         eps
    attention_in    sigma/sqrt(m)         eta/m           lambda         eps
    attention_out   sigma/sqrt(m 2L)      eta/m           lambda         eps
    mlp_in          sigma/sqrt(m)         eta/m           lambda         eps
    mlp_out         sigma/sqrt(m_ff 2L)   eta/m_ff        lambda         eps
    norm_scale      one                   eta             0              eps
    bias            zero                  eta             0              eps
    key_bias        zero                  0               0              eps

That is preset `btlm`: the published BTLM configs and arXiv 2304.03208. Its forward multipliers: embedding lookup
x embedding_multiplier, logits x output_multiplier/m, attention scores q.k/head_dim. Weight decay is coupled to the
learning rate, so a hidden matrix shrinks by (eta/m) lambda a step. With optimizer.weight_decay_convention "independent"
that is eta lambda (lambda m in the table), with "coupled" it is the table's in every preset.

`sp`, standard parametrization: m = m_ff = 1 throughout and attention scores q.k/sqrt(head_dim).

`completep` (arXiv 2505.01618, alpha = 1): as btlm, but residual branches x L_b/L in place of the 1/sqrt(2L) of the two
output kernels; weight decay lambda m of hidden matrices; eps (1/m)(L_b/L) for everything inside the blocks.

The bias of the keys adds q.b to every score of a row, which softmax ignores: its gradient is zero in exact arithmetic,
and what is computed is rounding noise, which Adam would turn into steps of full size. So it stays where it is: the same
function as with the published rate eta. With model.qk_norm its gradient is a true one, and it learns as other biases.

Normal initializers are truncated at two sigma and not corrected for it, as in the published code: the real standard
deviation is 0.8796 of the one in the table.
"""

from __future__ import annotations

import dataclasses
import math

from btlm_jax.recipe.config import ModelConfig, MupConfig

# The logical axes of a parameter, without its "layers" axis, and its leaf name decide its class.
_CLASS_OF_KERNEL = {
    ("vocab", "embed"): "embedding",
    ("embed", "heads", "head_dim"): "attention_in",
    ("heads", "head_dim", "embed"): "attention_out",
    ("embed", "mlp"): "mlp_in",
    ("mlp", "embed"): "mlp_out",
}
_CLASS_OF_VECTOR = {"scale": "norm_scale", "bias": "bias"}
HIDDEN_CLASSES = ("attention_in", "attention_out", "mlp_in", "mlp_out")
CLASSES = ("embedding", *HIDDEN_CLASSES, "norm_scale", "bias", "key_bias")
_VECTOR_CLASSES = ("norm_scale", "bias", "key_bias")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterRule:
    """How one parameter starts and learns; the multipliers apply to the optimizer's values."""

    parameter_class: str
    init_mean: float
    init_std: float
    learning_rate: float
    weight_decay: float
    eps: float
    is_frozen: bool = False  # it gets no update, and the optimizer keeps no moments of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parametrization:
    """The width and depth multipliers of a model, and the rules that follow from them."""

    preset: str
    width: float  # m
    ff_width: float  # m_ff
    depth: float  # L / L_b
    num_layers: int
    init_std: float
    embedding_scale: float  # x on the embedding lookup
    output_scale: float  # x on the logits
    attention_scale: float  # x on q.k
    residual_scale: float  # x on every residual branch
    has_qk_norm: bool = False

    def rule(self, axes: tuple[str, ...], *, layer: str, leaf: str) -> ParameterRule:
        """Return the rule of the parameter named `leaf` of the layer named `layer`, with these logical axes.

        Raises:
          ValueError: the axes and the name belong to no class.
        """
        parameter_class = classify(axes, layer=layer, leaf=leaf)
        completep = self.preset == "completep"
        width = self.ff_width if parameter_class == "mlp_out" else self.width
        hidden = parameter_class in HIDDEN_CLASSES
        variance = 0.0
        if parameter_class == "embedding":
            variance = self.init_std**2
        elif hidden:
            variance = self.init_std**2 / width
            if parameter_class in ("attention_out", "mlp_out") and not completep:
                variance /= 2 * self.num_layers
        in_block = "layers" in axes
        return ParameterRule(
            parameter_class=parameter_class,
            init_mean=1.0 if parameter_class == "norm_scale" else 0.0,
            init_std=math.sqrt(variance),
            learning_rate=1 / width if hidden else float(parameter_class != "key_bias" or self.has_qk_norm),
            weight_decay=0.0 if parameter_class in _VECTOR_CLASSES else width if completep and hidden else 1.0,
            eps=1 / (width * self.depth) if completep and in_block else 1.0,
        )


def classify(axes: tuple[str, ...], *, layer: str, leaf: str) -> str:
    """Return the class of the parameter named `leaf` of the layer named `layer`.

    Raises:
      ValueError: no class fits; every parameter must be classified.
    """
    own = tuple(axis for axis in axes if axis != "layers")
    if (layer, leaf) == ("key", "bias"):
        return "key_bias"
    parameter_class = _CLASS_OF_VECTOR.get(leaf) or _CLASS_OF_KERNEL.get(own)
    if parameter_class is None:
        raise ValueError(
            f"parameter {leaf!r} with logical axes {axes} belongs to no class of mup.py; add its rule there"
        )
    return parameter_class


def make_parametrization(mup: MupConfig, model: ModelConfig) -> Parametrization:
    """Make the parametrization that `mup.preset` asks for at this model's width and depth."""
    scaled = mup.preset != "sp"
    width = model.d_model / mup.base_d_model if scaled else 1.0
    ff_width = model.d_ff / mup.base_d_ff if scaled else 1.0
    depth = model.num_layers / mup.base_num_layers if mup.preset == "completep" else 1.0
    return Parametrization(
        preset=mup.preset,
        width=width,
        ff_width=ff_width,
        depth=depth,
        num_layers=model.num_layers,
        init_std=mup.init_std,
        embedding_scale=mup.embedding_multiplier,
        output_scale=mup.output_multiplier / width,
        attention_scale=1 / model.head_dim if scaled else 1 / math.sqrt(model.head_dim),
        residual_scale=1 / depth,
        has_qk_norm=model.qk_norm != "none",
    )
