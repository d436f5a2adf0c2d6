"""The muP rules against the published numbers and closed forms; initial values against the rules, on every mesh."""

import dataclasses
import functools
import math
import os

import jax
import numpy as np
import pytest
from support.tiny import config_dict, tiny_config

from btlm_jax.model import init_params, make_model, parameter_table, parameters
from btlm_jax.model.loss import token_losses
from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.recipe.config import ModelConfig, MupConfig, train_config_from
from btlm_jax.recipe.mup import CLASSES, HIDDEN_CLASSES, classify, make_parametrization

AXES = {
    "embedding": (("vocab", "embed"), "embedding"),
    "attention_in": (("layers", "embed", "heads", "head_dim"), "kernel"),
    "attention_out": (("layers", "heads", "head_dim", "embed"), "kernel"),
    "mlp_in": (("layers", "embed", "mlp"), "kernel"),
    "mlp_out": (("layers", "mlp", "embed"), "kernel"),
    "norm_scale": (("layers", "norm"), "scale"),
    "bias": (("layers", "heads", "head_dim"), "bias"),
    "key_bias": (("layers", "heads", "head_dim"), "bias"),
}
LAYERS = {"bias": "query", "key_bias": "key"}
# The standard deviation of a standard normal cut at two sigma.
CUT_STD = 0.8796256610342398


def rules_of(parametrization):
    return {
        name: parametrization.rule(axes, layer=LAYERS.get(name, "any"), leaf=leaf)
        for name, (axes, leaf) in AXES.items()
    }


def table_of(config, *, devices: int = 1, tensor: int = 1):
    model = make_model(config.model, make_parametrization(config.mup, config.model))
    mesh = make_mesh(devices=jax.devices()[:devices], tensor=tensor)
    return model, mesh, parameter_table(model, mesh)


def test_btlm_3b_has_the_published_numbers():
    """The literal values of the published BTLM-3B configs, not formulas."""
    config = train_config_from(config_dict("btlm_3b_8k"))
    parametrization = make_parametrization(config.mup, config.model)
    published = {  # class: (init std, learning rate, weight decay)
        "embedding": (0.073, 0.012, 0.1),
        "attention_in": (0.0230846, 0.0012, 0.1),
        "attention_out": (0.00288558, 0.0012, 0.1),
        "mlp_in": (0.0230846, 0.0012, 0.1),
        "mlp_out": (0.00288558, 0.0012, 0.1),
        "norm_scale": (0.0, 0.012, 0.0),
        "bias": (0.0, 0.012, 0.0),
        "key_bias": (0.0, 0.0, 0.0),  # as all biases in those configs; its gradient is zero
    }
    for name, rule in rules_of(parametrization).items():
        assert rule.parameter_class == name
        found = (rule.init_std, 0.012 * rule.learning_rate, 0.1 * rule.weight_decay)
        assert found == pytest.approx(published[name], rel=2e-6), name
        assert rule.eps == 1
        assert rule.init_mean == (name == "norm_scale")
    assert parametrization.output_scale == pytest.approx(0.222, rel=1e-12)
    assert parametrization.embedding_scale == 14.6
    assert parametrization.attention_scale == 1 / 80
    assert parametrization.residual_scale == 1


MODEL = dict(
    vocab_size=300, num_layers=6, d_model=96, num_heads=4, d_ff=200, layer_norm_eps=1e-5, qk_norm="none",
    alibi_scaling=1.0,
    dtype="float32", attention="reference", remat="none", loss_chunk=8,
)  # fmt: skip
MUP = dict(
    base_d_model=32.0, base_d_ff=40.0, base_num_layers=2, init_std=0.3, embedding_multiplier=7.0, output_multiplier=1.5
)


def preset(name: str):
    """m = 3, m_ff = 5, L = 6, L / L_b = 3, head dim 24."""
    return make_parametrization(MupConfig(preset=name, **MUP), ModelConfig(**MODEL))


def test_btlm_scales_mlp_out_by_its_own_width():
    rules = rules_of(preset("btlm"))
    assert rules["mlp_out"].learning_rate == pytest.approx(1 / 5)
    assert rules["mlp_out"].init_std == pytest.approx(0.3 / math.sqrt(5 * 12))
    assert rules["mlp_in"].learning_rate == pytest.approx(1 / 3)
    assert rules["attention_out"].init_std == pytest.approx(0.3 / math.sqrt(3 * 12))


def test_sp_knows_no_width():
    parametrization = preset("sp")
    for name, rule in rules_of(parametrization).items():
        assert (rule.learning_rate, rule.eps) == (name != "key_bias", 1)
        assert rule.weight_decay == (name not in ("norm_scale", "bias", "key_bias"))
        std = {"attention_out": 0.3 / math.sqrt(12), "mlp_out": 0.3 / math.sqrt(12)}
        std |= {"norm_scale": 0, "bias": 0, "key_bias": 0}
        assert rule.init_std == pytest.approx(std.get(name, 0.3)), name
    scales = (parametrization.embedding_scale, parametrization.output_scale, parametrization.residual_scale)
    assert scales == (7.0, 1.5, 1.0)
    assert parametrization.attention_scale == pytest.approx(24**-0.5)


def test_completep_is_table_1_of_its_paper():
    parametrization = preset("completep")
    expected = {  # class: (init std, learning rate, weight decay, eps)
        "embedding": (0.3, 1, 1, 1),
        "attention_in": (0.3 / math.sqrt(3), 1 / 3, 3, 1 / 9),
        "attention_out": (0.3 / math.sqrt(3), 1 / 3, 3, 1 / 9),
        "mlp_in": (0.3 / math.sqrt(3), 1 / 3, 3, 1 / 9),
        "mlp_out": (0.3 / math.sqrt(5), 1 / 5, 5, 1 / 15),
        "norm_scale": (0, 1, 0, 1 / 9),
        "bias": (0, 1, 0, 1 / 9),
        "key_bias": (0, 0, 0, 1 / 9),
    }
    for name, rule in rules_of(parametrization).items():
        found = (rule.init_std, rule.learning_rate, rule.weight_decay, rule.eps)
        assert found == pytest.approx(expected[name]), name
    assert parametrization.rule(("norm",), layer="ln_f", leaf="scale").eps == 1  # the final norm is in no block
    assert parametrization.residual_scale == pytest.approx(1 / 3)
    assert parametrization.output_scale == pytest.approx(0.5)
    assert parametrization.attention_scale == 1 / 24


@pytest.mark.parametrize("name", ["btlm", "sp", "completep"])
def test_every_parameter_is_classified(name):
    _, _, table = table_of(tiny_config(mup__preset=name))
    classes = {info.path: info.rule.parameter_class for info in jax.tree.leaves(table)}
    expected = {"embedding/embedding": "embedding", "ln_f/scale": "norm_scale", "ln_f/bias": "bias"}
    for norm in ("ln_1", "ln_2"):
        expected |= {f"blocks/{norm}/scale": "norm_scale", f"blocks/{norm}/bias": "bias"}
    kernels = {"attention/query": "attention_in", "attention/key": "attention_in", "attention/value": "attention_in"}
    kernels |= {"attention/out": "attention_out", "mlp/up": "mlp_in", "mlp/gate": "mlp_in", "mlp/down": "mlp_out"}
    for path, parameter_class in kernels.items():
        expected |= {f"blocks/{path}/kernel": parameter_class, f"blocks/{path}/bias": "bias"}
    expected["blocks/attention/key/bias"] = "key_bias"
    assert classes == expected
    assert set(classes.values()) == set(CLASSES)


@pytest.mark.parametrize(
    ("axes", "leaf"), [(("embed", "vocab"), "kernel"), (("embed", "embed"), "kernel"), (("norm",), "gain")]
)
def test_an_unknown_parameter_is_refused(axes, leaf):
    with pytest.raises(ValueError, match="belongs to no class"):
        classify(axes, layer="key", leaf=leaf)


@pytest.mark.parametrize("name", ["btlm", "sp", "completep"])
def test_initial_values_follow_the_rules(name):
    config = tiny_config(mup__preset=name, model__d_model=80, model__d_ff=112)
    model, mesh, table = table_of(config)
    params = init_params(model, mesh, seed=3)
    for info, value in zip(jax.tree.leaves(table), map(np.asarray, jax.tree.leaves(params)), strict=True):
        std = info.rule.init_std
        if info.rule.parameter_class in ("norm_scale", "bias", "key_bias"):
            np.testing.assert_array_equal(value, info.rule.init_mean)
            continue
        assert info.rule.parameter_class in ("embedding", *HIDDEN_CLASSES) and std > 0
        # Five standard errors: of a std it is at most 1/sqrt(2n) of it, of a mean 1/sqrt(n).
        assert value.std() == pytest.approx(CUT_STD * std, rel=5 / math.sqrt(2 * value.size)), info.path
        assert abs(value.mean()) < 5 * std / math.sqrt(value.size), info.path
        assert 1.9 * std < np.abs(value).max() <= 2 * std * (1 + 1e-6), info.path
    attention = params["blocks"]["attention"]
    query, key = np.asarray(attention["query"]["kernel"]), np.asarray(attention["key"]["kernel"])
    assert (query[0] != query[1]).mean() > 0.99 and (query != key).mean() > 0.99


@pytest.mark.slow
@pytest.mark.fully_optimized
def test_initial_values_do_not_depend_on_the_mesh(monkeypatch):
    if "use_fusion_emitters=false" in os.environ.get("XLA_FLAGS", ""):  # what compiles the other tests faster
        as_users = {"xla_cpu_use_fusion_emitters": True}
        monkeypatch.setattr(parameters.jax, "jit", functools.partial(jax.jit, compiler_options=as_users))
    values = []
    for devices, tensor in ((1, 1), (8, 2)):
        model, mesh, table = table_of(tiny_config(), devices=devices, tensor=tensor)
        params = init_params(model, mesh, seed=3)
        assert jax.tree.all(jax.tree.map(lambda x, info: x.sharding == info.sharding, params, table))
        values.append(jax.device_get(params))
    for other in values[1:]:
        jax.tree.map(np.testing.assert_array_equal, values[0], other)


@pytest.mark.slow
def test_initial_loss_of_the_btlm_constants_is_the_same_at_every_width():
    """Tied tables give the current token a logit of base width x sigma^2 x ...: 27.7 nats, far above ln V."""
    losses = [initial_loss(width) for width in (128, 512)]
    assert losses == pytest.approx([27.7] * 2, abs=1.0), losses


def initial_loss(width: int) -> float:
    """Return the loss of the untrained model on random tokens, with the constants of btlm_3b_8k."""
    config = train_config_from(config_dict("btlm_3b_8k"))
    shape = dict(vocab_size=4096, num_layers=2, d_model=width, num_heads=width // 64, d_ff=round(width * 682.6 / 256))
    model_config = dataclasses.replace(config.model, dtype="float32", attention="reference", remat="none", **shape)
    model = make_model(model_config, make_parametrization(config.mup, model_config))
    mesh = make_mesh(devices=jax.devices()[:1], tensor=1)
    params = init_params(model, mesh, seed=0)
    tokens_BT = np.random.default_rng(0).integers(0, 4096, (2, 65)).astype(np.int32)

    @jax.jit
    def loss(params, inputs_BT, targets_BT):
        hidden_BTD = model.apply({"params": params}, inputs_BT)
        scale, table_VD = model.parametrization.output_scale, params["embedding"]["embedding"]
        return token_losses(hidden_BTD, table_VD, targets_BT, output_scale=scale, chunk=32, rules=model.rules).mean()

    with jax.set_mesh(mesh):
        return float(loss(params, tokens_BT[:, :-1], tokens_BT[:, 1:]))
