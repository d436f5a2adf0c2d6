"""QK-norm: the network against NumPy in float64, in training's form and over a cache; its rules; what refuses it."""

import types
from typing import cast

import jax
import numpy as np
import pytest
from support.tiny import tiny_config

from btlm_jax import notices
from btlm_jax.attention.alibi import alibi_slopes
from btlm_jax.decode.decoder import make_decoder
from btlm_jax.evaluate.checkpoint import Checkpoint
from btlm_jax.evaluate.texts import load_to_generate
from btlm_jax.generate.loading import load_for_generation
from btlm_jax.hub.client_files import NO_SETTINGS
from btlm_jax.hub.given_model import NATIVE
from btlm_jax.hub.native import ModelMetadata, one_device_mesh, write_model_directory
from btlm_jax.hub.source import UnpublishedError, open_source
from btlm_jax.model import make_model, parameter_table
from btlm_jax.model.qk_norm import HeadNorm
from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.parallel.mesh import RULES
from btlm_jax.recipe.mup import make_parametrization
from btlm_jax.recipe.sizes import count_parameters
from btlm_jax.train.checkpoint import check_same_run
from btlm_jax.train.setup import num_parameters

V, T = 31, 12


def tiny(qk_norm: str, **changes):
    return tiny_config(
        model__qk_norm=qk_norm, model__vocab_size=V, model__num_heads=8, model__d_model=48,
        model__attention="reference", model__layer_norm_eps=1e-3, **changes,
    )  # fmt: skip


def model_of(config):
    return make_model(config.model, make_parametrization(config.mup, config.model))


def random_params(config, mesh) -> dict:
    """Parameters of which none is zero or one, biases of keys and gains least of all."""
    rng = np.random.default_rng(4)

    def drawn(info):
        values = info.rule.init_mean + rng.normal(size=info.shape).astype(np.float32) / 4
        return jax.device_put(values, info.sharding)

    return jax.tree.map(drawn, parameter_table(model_of(config), mesh))


def by_formula(config, params, ids_T) -> np.ndarray:
    """The float64 logits_TV of the network of model/transformer.py, attention written as loops over heads and rows."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    model, mup, eps = config.model, config.mup, config.model.layer_norm_eps
    H, N = model.head_dim, model.num_heads
    slopes_N = alibi_slopes(N, scaling=1.0)

    def norm(x, own):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * own["scale"] + own["bias"]

    def head_norm(x_THN, name, own):
        if model.qk_norm == "none":
            return x_THN
        x_THN = x_THN / np.sqrt((x_THN**2).mean(-1, keepdims=True) + eps)
        return x_THN * own[f"{name}_norm"]["scale"] if model.qk_norm == "rms_gain" else x_THN

    x_TD = p["embedding"]["embedding"][ids_T] * mup.embedding_multiplier
    for layer in range(model.num_layers):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], p["blocks"])
        own, mlp = block["attention"], block["mlp"]
        h_TD = norm(x_TD, block["ln_1"])
        q, k, v = (
            np.einsum("TD,DNH->TNH", h_TD, own[name]["kernel"]) + own[name]["bias"]
            for name in ("query", "key", "value")
        )
        q, k = head_norm(q, "query", own), head_norm(k, "key", own)
        o_TNH = np.zeros_like(q)
        for n in range(N):
            for t in range(len(ids_T)):
                scores = k[: t + 1, n] @ q[t, n] / H - slopes_N[n] * np.arange(t, -1, -1)
                weights = np.exp(scores - scores.max())
                o_TNH[t, n] = weights @ v[: t + 1, n] / weights.sum()
        x_TD = x_TD + np.einsum("TNH,NHD->TD", o_TNH, own["out"]["kernel"]) + own["out"]["bias"]
        h_TD = norm(x_TD, block["ln_2"])
        up, gate = (h_TD @ mlp[name]["kernel"] + mlp[name]["bias"] for name in ("up", "gate"))
        x_TD = x_TD + (up * gate / (1 + np.exp(-gate))) @ mlp["down"]["kernel"] + mlp["down"]["bias"]
    output_scale = mup.output_multiplier / (model.d_model / mup.base_d_model)
    return norm(x_TD, p["ln_f"]) @ p["embedding"]["embedding"].T * output_scale


@pytest.mark.parametrize("qk_norm", ["rms", "rms_gain"])
def test_a_head_is_normed_by_itself_and_padding_is_not_counted(qk_norm):
    config, rng = tiny(qk_norm), np.random.default_rng(0)
    module = HeadNorm(config.model, make_parametrization(config.mup, config.model), RULES, name="query_norm")
    x_BTNH, gain_H = rng.normal(size=(2, 3, 8, 6)), rng.normal(size=6)
    expected = x_BTNH / np.sqrt((x_BTNH**2).mean(-1, keepdims=True) + 1e-3) * (gain_H if qk_norm == "rms_gain" else 1)
    padded = np.pad(x_BTNH, ((0, 0), (0, 0), (0, 0), (0, 10))).astype(np.float32)
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1], tensor=1)):
        params = {"scale": jax.numpy.asarray(gain_H, np.float32)} if qk_norm == "rms_gain" else {}
        found = np.asarray(module.apply({"params": params}, padded))
    np.testing.assert_allclose(found[..., :6], expected, rtol=2e-6, atol=2e-6)
    assert not found[..., 6:].any()


def expected_logits(config, params, ids_BT) -> np.ndarray:
    expected = np.stack([by_formula(config, params, ids_T) for ids_T in ids_BT])
    plain = np.stack([by_formula(tiny("none"), params, ids_T) for ids_T in ids_BT])
    assert np.abs(expected - plain).max() > 0.1 * expected.std()  # the norms are there to be seen
    return expected


def test_the_network_on_a_mesh_computes_the_formula():
    config, ids_BT = tiny("rms_gain"), np.random.default_rng(1).integers(0, V, (2, T)).astype(np.int32)
    mesh = make_mesh(devices=jax.devices()[:8], context=2, tensor=2)
    model, params = model_of(config), random_params(config, mesh)
    with jax.set_mesh(mesh):
        ids = jax.device_put(ids_BT, jax.NamedSharding(mesh, RULES.spec("batch", "length")))
        hidden_BTD = jax.device_get(jax.jit(lambda params, ids: model.apply({"params": params}, ids))(params, ids))
    found = hidden_BTD @ np.asarray(params["embedding"]["embedding"]).T * model.parametrization.output_scale
    expected = expected_logits(config, params, ids_BT)
    np.testing.assert_allclose(found, expected, atol=2e-5 * expected.std())


def test_the_cache_has_normed_keys():
    config, histories = tiny("rms"), np.random.default_rng(1).integers(0, V, (2, T)).tolist()
    mesh = one_device_mesh()
    params = random_params(config, mesh)
    decoder = make_decoder(model_of(config), params, mesh, num_rows=2, num_slots=16, cache_dtype="float32")
    cached = [decoder.prefill([history[:7] for history in histories])]
    cached += [decoder.decode([history[:length] for history in histories]) for length in range(8, T + 1)]
    expected = expected_logits(config, params, np.array(histories))
    np.testing.assert_allclose(np.stack(cached, 1), expected[:, 6:], atol=2e-5 * expected.std())


def test_rules_sizes_and_what_a_resume_may_change():
    plain, normed = (make_parametrization(config.mup, config.model) for config in (tiny("none"), tiny("rms_gain")))
    key_bias = {"axes": ("layers", "heads", "head_dim"), "layer": "key", "leaf": "bias"}
    assert (plain.rule(**key_bias).learning_rate, normed.rule(**key_bias).learning_rate) == (0, 1)
    gain = normed.rule(("layers", "head_dim"), layer="query_norm", leaf="scale")
    assert (gain.parameter_class, gain.init_mean, gain.learning_rate, gain.weight_decay) == ("norm_scale", 1, 1, 0)
    mesh = make_mesh(devices=jax.devices()[:1], tensor=1)
    for qk_norm, more in (("none", 0), ("rms", 0), ("rms_gain", 2 * 2 * 6)):
        config = tiny(qk_norm)
        table = parameter_table(model_of(config), mesh)
        assert num_parameters(table) == count_parameters(config.model) == count_parameters(tiny("none").model) + more
    with pytest.raises(ValueError, match="model.qk_norm: checkpoint 'none', config 'rms'"):
        check_same_run(tiny("none"), tiny("rms"), where="here")


def test_a_model_with_it_is_read_and_decoded_and_not_exported(tmp_path, monkeypatch):
    config, mesh = tiny("rms_gain"), one_device_mesh()
    params = random_params(config, mesh)
    metadata = ModelMetadata(
        model=config.model, mup=config.mup, max_length=48, eos_id=0, tokenizer=None, prompt_bos_id=None, notes={},
        clients=NO_SETTINGS,
    )  # fmt: skip
    write_model_directory(tmp_path / "model", metadata=metadata, params=params, tokenizer=None)
    monkeypatch.setattr("btlm_jax.hub.source.read_model_directory", lambda directory: pytest.fail("it was read"))
    with pytest.raises(UnpublishedError, match="model.qk_norm=rms_gain, which is in no published form"):
        open_source(tmp_path / "model")
    with pytest.raises(UnpublishedError):
        load_for_generation(tmp_path / "model", as_int4=True)
    monkeypatch.undo()
    monkeypatch.setattr("btlm_jax.generate.loading.has_kernels", lambda: True)
    notices.begin(strict=())
    found = load_for_generation(tmp_path / "model", as_int4=False).params
    assert isinstance(found, dict)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert notices.counts() == {"without-kernels": 1}

    monkeypatch.setattr("btlm_jax.evaluate.texts.has_kernels", lambda: True)
    parts = {"name": "M", "given": types.SimpleNamespace(form=NATIVE), "metadata": metadata, "tokenizer": None}
    checkpoint = types.SimpleNamespace(**parts, load=lambda: (params, mesh))
    assert load_to_generate(cast(Checkpoint, checkpoint), dtype="float32", as_int4=False).params is params
    assert notices.counts() == {"without-kernels": 2}
