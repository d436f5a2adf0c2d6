"""Prefill and decode over the cache against the whole forward pass; drawing tokens against its definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from btlm_jax import generate as generation
from btlm_jax.generate import GREEDY, Sampling, continue_tokens, draw, generate
from btlm_jax.loss import logits
from btlm_jax.model import extend, init_params, make_cache, make_model
from btlm_jax.mup import make_parametrization
from btlm_jax.sharding import make_mesh

PLAIN = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
VOCAB = 300


def model_and_params(mesh, **changes):
    config = tiny_config(**changes)
    model = make_model(config.model, make_parametrization(config.mup, config.model))
    return model, init_params(model, mesh, seed=3)


def ids(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, shape).astype(np.int32)


def full_logits(model, params, mesh, row):
    """The logits_TV of one row, by the whole forward pass on one device."""
    with jax.set_mesh(mesh):
        hidden_1TD = model.apply({"params": params}, jnp.asarray(row)[None])
        table_VD = params["embedding"]["embedding"]
        return np.asarray(logits(hidden_1TD, table_VD, output_scale=model.parametrization.output_scale))[0]


@pytest.fixture(scope="module")
def one_device():
    return make_mesh(devices=jax.devices()[:1], tensor=1)


def test_extending_in_pieces_equals_the_whole_pass_at_every_position(one_device):
    model, params = model_and_params(one_device, model__alibi_scaling=2.0)
    inputs_BT = ids(3, 90)
    with jax.set_mesh(one_device):
        want_BTD = model.apply({"params": params}, jnp.asarray(inputs_BT))
        cache = make_cache(model, one_device, batch_size=3, num_slots=96, dtype="float32")
        step = jax.jit(lambda cache, x, s: extend(model, params, cache, inputs_BT=x, starts_B=s))
        made = []
        for start, end in ((0, 40), (40, 57), *((t, t + 1) for t in range(57, 90))):
            hidden, cache = step(cache, jnp.asarray(inputs_BT[:, start:end]), jnp.full(3, start))
            made.append(hidden)
    np.testing.assert_allclose(np.concatenate(made, axis=1), want_BTD, rtol=0, atol=3e-6)


@pytest.mark.parametrize("shape", [(1, 1), (4, 2), (2, 4)], ids=str)
def test_prompts_of_different_lengths_on_any_mesh_continue_as_alone(one_device, shape, monkeypatch):
    monkeypatch.setattr(generation, "PREFILL_PIECE", 16)  # the longest prompt takes three pieces
    mesh = make_mesh(devices=jax.devices()[: shape[0] * shape[1]], tensor=shape[1])
    model, params = model_and_params(mesh)
    prompts = [ids(length, seed=length).tolist() for length in (5, 17, 47)]
    made = [list(prompt) for prompt in prompts]
    options = {"num_tokens": 12, "sampling": GREEDY, "seed": 0, "stop_id": -1, "cache_dtype": "float32"}
    for tokens in generate(model, params, mesh, prompts=prompts, **options):
        for row, token in tokens.items():
            made[row].append(token)
    alone_model, alone_params = model_and_params(one_device)
    for prompt, row in zip(prompts, made, strict=True):
        assert len(row) == len(prompt) + 12
        want = full_logits(alone_model, alone_params, one_device, np.asarray(row[:-1])).argmax(-1)
        assert row[len(prompt) :] == want[len(prompt) - 1 :].tolist()


def test_a_bfloat16_cache_is_near(one_device):
    model, params = model_and_params(one_device)
    inputs_BT = jnp.asarray(ids(2, 30))
    with jax.set_mesh(one_device):
        results = {}
        for dtype in ("float32", "bfloat16"):
            cache = make_cache(model, one_device, batch_size=2, num_slots=32, dtype=dtype)
            results[dtype], kept = extend(model, params, cache, inputs_BT=inputs_BT, starts_B=jnp.zeros(2, jnp.int32))
            assert kept.k_LBSNH.dtype == dtype
    difference = np.abs(results["float32"] - results["bfloat16"]).max()
    assert 0 < difference < 0.05


def test_a_stop_token_ends_its_row_only(one_device):
    model, params = model_and_params(one_device)
    prompts = [ids(9, seed=1).tolist(), ids(6, seed=2).tolist()]
    options = {"num_tokens": 5, "sampling": GREEDY, "seed": 0, "cache_dtype": "float32"}
    free = list(generate(model, params, one_device, prompts=prompts, stop_id=-1, **options))
    stop = free[2][0]
    ends = [next((i for i, made in enumerate(free) if made[row] == stop), 5) for row in (0, 1)]
    assert ends[0] != ends[1]
    stopped = list(generate(model, params, one_device, prompts=prompts, stop_id=stop, **options))
    for row in (0, 1):
        want = [made[row] for made in free[: ends[row]]]
        assert [made[row] for made in stopped if row in made] == want


def test_a_seed_gives_the_same_text_and_another_seed_another(one_device):
    model, params = model_and_params(one_device)
    options = {"prompt": ids(8).tolist(), "num_tokens": 10, "sampling": Sampling(temperature=1.5, **PLAIN)}
    first, again, other = (
        continue_tokens(model, params, one_device, seed=seed, stop_id=-1, **options) for seed in (4, 4, 5)
    )
    assert first == again != other


LOGITS = np.log([0.4, 0.3, 0.2, 0.06, 0.04])[[3, 0, 4, 1, 2]]  # probabilities .06 .4 .04 .3 .2


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({}, [0.06, 0.4, 0.04, 0.3, 0.2]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.65}, [0, 4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 0.75}, [0, 4 / 9, 0, 3 / 9, 2 / 9]),
        ({"min_p": 0.45}, [0, 4 / 9, 0, 3 / 9, 2 / 9]),
        ({"temperature": 0.5}, np.square([0.06, 0.4, 0.04, 0.3, 0.2]) / 0.2952),
        ({"top_p": 1e-9}, [0, 1, 0, 0, 0]),
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_their_definition_says(changes, want):
    sampling = Sampling(**{"temperature": 1.0, **PLAIN, **changes})
    generator = np.random.default_rng(0)
    drawn = [draw(LOGITS, history=[], sampling=sampling, generator=generator) for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(drawn, minlength=5) / 4000, want, atol=0.03)
    assert not set(drawn) & set(np.flatnonzero(np.equal(want, 0)))


def test_the_repetition_penalty_moves_seen_tokens_down_whatever_their_sign():
    sampling = Sampling(**{**PLAIN, "temperature": 0.0, "repetition_penalty": 2.0})
    generator = np.random.default_rng(0)
    assert draw(np.array([3.0, 2.0, 1.0]), history=[0, 0], sampling=sampling, generator=generator) == 1
    assert draw(np.array([-1.0, -1.5, -9.0]), history=[0], sampling=sampling, generator=generator) == 1


@pytest.mark.parametrize(
    "changes",
    [{"temperature": -0.1}, {"top_k": -1}, {"top_p": 0.0}, {"min_p": 1.5}, {"repetition_penalty": 0.0}],
    ids=str,
)
def test_impossible_sampling_is_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        Sampling(**{"temperature": 1.0, **PLAIN, **changes})


@pytest.mark.parametrize(
    ("prompts", "said"), [([], "no prompt"), ([[1], []], "prompt 2 is empty"), ([[5, VOCAB]], "outside the vocabulary")]
)
def test_bad_prompts_are_refused(one_device, prompts, said):
    model, params = model_and_params(one_device)
    options = {"num_tokens": 2, "sampling": GREEDY, "seed": 0, "stop_id": -1, "cache_dtype": "float32"}
    with pytest.raises(ValueError, match=said):
        next(generate(model, params, one_device, prompts=prompts, **options))
