"""The network against the originally published PyTorch code, and against itself in other forms."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.tiny import tiny_config

from btlm_jax.attention.alibi import alibi_slopes
from btlm_jax.decode.batch import continue_tokens
from btlm_jax.decode.sampling import GREEDY
from btlm_jax.model import init_params, make_model, parameter_table
from btlm_jax.model.loss import logits, token_losses
from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.parallel.mesh import RULES
from btlm_jax.recipe.config import ModelConfig, MupConfig
from btlm_jax.recipe.mup import make_parametrization

ORACLES = Path(__file__).parents[1] / "golden" / "oracles"
TOLERANCE = 2e-5


@pytest.fixture(autouse=True)
def mesh():
    """One device of the explicit mesh."""
    mesh = make_mesh(devices=jax.devices()[:1], tensor=1)
    with jax.set_mesh(mesh):
        yield mesh


@pytest.fixture(scope="module", params=["tiny", "tiny_sp", "tiny_pi_fix"])
def oracle(request):
    folder = ORACLES / request.param
    hf = json.loads((folder / "config.json").read_text())
    arrays = {name: np.load(folder / f"{name}.npy") for name in ("input_ids", "logits", "nll", "greedy")}
    return hf, load_file(folder / "model.safetensors"), arrays


def model_of(hf: dict, *, attention: str):
    width = 1 / hf["mup_width_scale"]
    config = ModelConfig(
        vocab_size=hf["vocab_size"],
        num_layers=hf["n_layer"],
        d_model=hf["n_embd"],
        num_heads=hf["n_head"],
        d_ff=hf["n_inner"],
        layer_norm_eps=hf["layer_norm_epsilon"],
        qk_norm="none",
        alibi_scaling=hf["alibi_scaling"]["factor"] if hf["alibi_scaling"] else 1.0,
        dtype="float32",
        attention=attention,
        remat="full",
        loss_chunk=32,
    )
    mup = MupConfig(
        preset="btlm" if hf["mup_scale_qk_dot_by_d"] else "sp",
        base_d_model=hf["n_embd"] / width,
        base_d_ff=hf["n_inner"] / width,
        base_num_layers=1,
        init_std=0.02,
        embedding_multiplier=hf["mup_embeddings_scale"],
        output_multiplier=hf["mup_output_alpha"],
    )
    return make_model(config, make_parametrization(mup, config))


def params_of(hf: dict, weights: dict) -> dict:
    """Map Hugging Face names onto ours; c_attn's columns are [q | k | v], c_fc is up, c_fc2 is gate."""
    D, N, L = hf["n_embd"], hf["n_head"], hf["n_layer"]

    def stack(name: str):
        return np.stack([weights[f"transformer.h.{layer}.{name}"] for layer in range(L)])

    def dense(name: str) -> dict:
        return {"kernel": stack(f"{name}.weight"), "bias": stack(f"{name}.bias")}

    def norm(name: str) -> dict:
        return {"scale": stack(f"{name}.weight"), "bias": stack(f"{name}.bias")}

    qkv = dense("attn.c_attn")
    attention = {
        name: {
            "kernel": qkv["kernel"][:, :, i * D : (i + 1) * D].reshape(L, D, N, D // N),
            "bias": qkv["bias"][:, i * D : (i + 1) * D].reshape(L, N, D // N),
        }
        for i, name in enumerate(("query", "key", "value"))
    }
    out = dense("attn.c_proj")
    attention["out"] = {"kernel": out["kernel"].reshape(L, N, D // N, D), "bias": out["bias"]}
    mlp = {"up": dense("mlp.c_fc"), "gate": dense("mlp.c_fc2"), "down": dense("mlp.c_proj")}
    return {
        "embedding": {"embedding": weights["transformer.wte.weight"]},
        "blocks": {"ln_1": norm("ln_1"), "attention": attention, "ln_2": norm("ln_2"), "mlp": mlp},
        "ln_f": {"scale": weights["transformer.ln_f.weight"], "bias": weights["transformer.ln_f.bias"]},
    }


@pytest.mark.parametrize("attention", ["reference", "blockwise"])
def test_logits_and_losses_equal_the_published_code(oracle, attention):
    hf, weights, arrays = oracle
    model, params = model_of(hf, attention=attention), params_of(hf, weights)
    inputs_BT = np.asarray(arrays["input_ids"], np.int32)
    scale = model.parametrization.output_scale

    @jax.jit
    def logits_and_losses(params, inputs_BT):
        hidden_BTD, table_VD = model.apply({"params": params}, inputs_BT), params["embedding"]["embedding"]
        losses_BT = token_losses(
            hidden_BTD[:, :-1], table_VD, inputs_BT[:, 1:], output_scale=scale, chunk=32, rules=RULES
        )
        return logits(hidden_BTD, table_VD, output_scale=scale), losses_BT

    logits_BTV, losses_BT = logits_and_losses(params, inputs_BT)
    np.testing.assert_allclose(logits_BTV, arrays["logits"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(losses_BT, arrays["nll"], rtol=0, atol=TOLERANCE)


def test_greedy_continuations_equal_the_published_code(oracle, mesh):
    hf, weights, arrays = oracle
    model, params = model_of(hf, attention="blockwise"), jax.tree.map(jnp.asarray, params_of(hf, weights))
    for row in arrays["greedy"].tolist():
        options = {"sampling": GREEDY, "seed": 0, "num_ids": model.config.vocab_size, "stop_id": -1}
        made = continue_tokens(model, params, mesh, prompt=row[:16], num_tokens=24, **options)
        assert made == row[16:]


def test_the_oracle_tree_is_the_model_tree(oracle, mesh):
    hf, weights, _ = oracle
    table = parameter_table(model_of(hf, attention="blockwise"), mesh)
    assert jax.tree.map(lambda info: info.shape, table) == jax.tree.map(np.shape, params_of(hf, weights))


@pytest.mark.parametrize(
    ("num_heads", "expected"),
    [
        (32, [2 ** (-(k + 1) / 4) for k in range(32)]),
        (4, [0.25, 0.0625, 0.015625, 0.00390625]),
        (12, [0.5**k for k in range(1, 9)] + [0.5**0.5, 0.5**1.5, 0.5**2.5, 0.5**3.5]),
    ],
)
def test_alibi_slopes(num_heads, expected):
    np.testing.assert_allclose(alibi_slopes(num_heads, scaling=1.0), expected, rtol=1e-6)
    np.testing.assert_allclose(alibi_slopes(num_heads, scaling=4.0), np.asarray(expected) / 4, rtol=1e-6)


def test_alibi_slopes_of_jais_tail():
    np.testing.assert_allclose(alibi_slopes(40, scaling=1.0)[-4:], [0.458502, 0.385553, 0.324210, 0.272627], atol=1e-6)


def test_no_position_sees_the_future(mesh):
    config = tiny_config().model
    model = make_model(config, make_parametrization(tiny_config().mup, config))
    params = init_params(model, mesh, seed=3)
    inputs_BT = np.random.default_rng(0).integers(0, 300, (1, 23)).astype(np.int32)
    changed_BT = inputs_BT.copy()
    changed_BT[0, 11] += 1
    apply = jax.jit(lambda params, x_BT: model.apply({"params": params}, x_BT))
    before, after = (np.asarray(apply(params, x_BT)) for x_BT in (inputs_BT, changed_BT))
    np.testing.assert_array_equal(before[:, :11], after[:, :11])
    assert (before[:, 11:] != after[:, 11:]).any(-1).all()


@pytest.mark.slow
def test_remat_changes_memory_and_not_gradients(mesh):
    config = tiny_config(model__num_layers=6)
    params = init_params(make_model(config.model, make_parametrization(config.mup, config.model)), mesh, seed=3)

    def temporaries_and_grads(remat):
        changed = dataclasses.replace(config.model, remat=remat)
        model = make_model(changed, make_parametrization(config.mup, changed))
        inputs_BT = jnp.asarray(np.random.default_rng(0).integers(0, 300, (3, 23)), jnp.int32)
        step = jax.jit(jax.grad(lambda params: jnp.square(model.apply({"params": params}, inputs_BT)).sum()))
        compiled = step.lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes, compiled(params)

    kept, expected = temporaries_and_grads("none")
    # The floor is for the key bias, whose true gradient is zero.
    floor = 1e-6 * max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for remat in ("full", "matmuls_saved"):
        recomputed, found = temporaries_and_grads(remat)
        assert recomputed < kept, remat
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=floor), found, expected)
