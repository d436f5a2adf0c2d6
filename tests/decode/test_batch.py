"""Prefill and decode over the cache against the whole forward pass; drawing tokens against its definitions."""

import functools

import jax
import numpy as np
import pytest
from support.tiny import tiny_config

from btlm_jax.decode import batch as generation
from btlm_jax.decode import decoder as decoders
from btlm_jax.decode.batch import Batch, FinishReason, Timings, continue_tokens, generate
from btlm_jax.decode.kv_cache import extend, make_cache
from btlm_jax.decode.sampling import GREEDY, Sampling, make_generator
from btlm_jax.model import init_params, make_model
from btlm_jax.model.loss import logits
from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.recipe.mup import make_parametrization

PLAIN = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
VOCAB = 300


@functools.cache
def model_and_params(mesh, **changes):
    config = tiny_config(**changes)
    model = make_model(config.model, make_parametrization(config.mup, config.model))
    return model, init_params(model, mesh, seed=3)


def ids(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, shape).astype(np.int32)


def full_logits(model, params, mesh, inputs_BT):
    """The logits_BTV by the whole forward pass on one device."""

    def whole_pass(params, inputs_BT):
        hidden_BTD = model.apply({"params": params}, inputs_BT)
        table_VD = params["embedding"]["embedding"]
        return logits(hidden_BTD, table_VD, output_scale=model.parametrization.output_scale)

    with jax.set_mesh(mesh):
        return np.asarray(jax.jit(whole_pass)(params, np.asarray(inputs_BT)))


@pytest.fixture(scope="module")
def one_device():
    return make_mesh(devices=jax.devices()[:1], tensor=1)


@pytest.mark.slow
def test_extending_in_pieces_equals_the_whole_pass_at_every_position(one_device):
    model, params = model_and_params(one_device, model__alibi_scaling=2.0)
    inputs_BT = ids(3, 90)
    with jax.set_mesh(one_device):
        want_BTD = jax.jit(model.apply)({"params": params}, inputs_BT)
        cache = make_cache(model, one_device, batch_size=3, num_slots=96, dtype="float32")
        step = jax.jit(
            lambda cache, x, s: extend(model, params, cache, inputs_BT=x, starts_B=s, lengths_B=s + x.shape[1])
        )
        made = []
        for start, end in ((0, 40), (40, 57), *((t, t + 1) for t in range(57, 90))):
            hidden, cache = step(cache, inputs_BT[:, start:end], np.full(3, start, np.int32))
            made.append(np.asarray(hidden))
    np.testing.assert_allclose(np.concatenate(made, axis=1), want_BTD, rtol=0, atol=3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1), pytest.param((2, 4), marks=pytest.mark.slow)], ids=str)
def test_decoding_is_the_whole_pass_for_mixed_lengths_across_growth_past_the_trained_length(
    one_device, shape, monkeypatch
):
    monkeypatch.setattr(decoders, "PREFILL_PIECE", 16)  # the longest prompt takes three pieces
    monkeypatch.setattr(decoders, "MIN_SLOTS", 8)
    monkeypatch.setattr(generation, "INITIAL_CACHE_TOKENS", 2)
    grown, seen = [], []
    for name in ("prefill", "decode"):
        run = getattr(decoders.ShardedDecoder, name)
        spy = lambda self, histories, run=run: seen.append(run(self, histories)) or seen[-1]  # noqa: E731
        monkeypatch.setattr(decoders.ShardedDecoder, name, spy)
    grow = decoders.ShardedDecoder.grow
    monkeypatch.setattr(decoders.ShardedDecoder, "grow", lambda self, slots: grown.append(slots) or grow(self, slots))
    mesh = make_mesh(devices=jax.devices()[: shape[0] * shape[1]], tensor=shape[1])
    model, params = model_and_params(mesh)  # trained at up to 48
    prompts = [ids(length, seed=length).tolist() for length in (5, 17, 30)]
    made = [list(prompt) for prompt in prompts]
    options = {
        "num_tokens": 37,
        "sampling": GREEDY,
        "seed": 0,
        "num_ids": VOCAB,
        "stop_id": -1,
        "cache_dtype": "float32",
    }
    for tokens in generate(model, params, mesh, prompts=prompts, **options):
        for row, token in tokens.items():
            made[row].append(token)
    assert grown == [64, 128]
    made_logits_BTV = np.stack(seen[-37:], axis=1)[:3]
    alone_model, alone_params = model_and_params(one_device)
    padded_BT = [np.pad(whole, (0, 67 - len(whole))) for whole in made]  # tokens to the right are never seen
    want_BTV = full_logits(alone_model, alone_params, one_device, padded_BT)
    for row, (prompt, whole) in enumerate(zip(prompts, made, strict=True)):
        assert len(whole) == len(prompt) + 37
        want_TV = want_BTV[row, len(prompt) - 1 : len(whole) - 1]
        np.testing.assert_allclose(made_logits_BTV[row], want_TV, rtol=0, atol=2e-5)
        assert whole[len(prompt) :] == want_TV.argmax(-1).tolist()


@pytest.mark.slow
def test_a_bfloat16_cache_is_near(one_device):
    model, params = model_and_params(one_device)
    inputs_BT, zeros_B = ids(2, 30), np.zeros(2, np.int32)
    results = {}
    with jax.set_mesh(one_device):
        step = jax.jit(lambda cache, x, s: extend(model, params, cache, inputs_BT=x, starts_B=s, lengths_B=s + 30))
        for dtype in ("float32", "bfloat16"):
            cache = make_cache(model, one_device, batch_size=2, num_slots=32, dtype=dtype)
            hidden_BTD, kept = step(cache, inputs_BT, zeros_B)
            results[dtype] = np.asarray(hidden_BTD)
            assert kept.k_LBSNH.dtype == dtype
    difference = np.abs(results["float32"] - results["bfloat16"]).max()
    assert 0 < difference < 0.05


def test_a_stop_token_ends_its_row_only(one_device):
    model, params = model_and_params(one_device)
    prompts = [ids(9, seed=1).tolist(), ids(6, seed=2).tolist()]
    options = {"num_tokens": 5, "sampling": GREEDY, "seed": 0, "num_ids": VOCAB, "cache_dtype": "float32"}
    free = list(generate(model, params, one_device, prompts=prompts, stop_id=-1, **options))
    stop = free[2][0]
    ends = [next((i for i, made in enumerate(free) if made[row] == stop), 5) for row in (0, 1)]
    assert ends[0] != ends[1]
    stopped = list(generate(model, params, one_device, prompts=prompts, stop_id=stop, **options))
    for row in (0, 1):
        want = [made[row] for made in free[: ends[row]]]
        assert [made[row] for made in stopped if row in made] == want


def batch_of(model, params, mesh, prompts, *, samples, **changes):
    generators = [make_generator(4, sample=sample, prompt=p) for sample, p in zip(samples, prompts, strict=True)]
    options = {"num_rows": 5, "num_tokens": 10, "stop_id": -1, "cache_dtype": "float32", "timings": Timings()}
    drawn = {"sampling": Sampling(temperature=1.5, **PLAIN), "num_ids": VOCAB}
    return Batch(model, params, mesh, prompts=prompts, generators=generators, **(options | drawn | changes))


def tokens_of(batch) -> list[list[int]]:
    made = [[] for _ in batch.active_rows]
    while batch.active_rows:
        for row, token in batch.step().items():
            made[row].append(token)
    return made


@pytest.mark.slow
def test_a_sample_depends_on_its_prompt_seed_and_number_and_not_on_its_batch_or_place(one_device):
    model, params = model_and_params(one_device)
    first, second = ids(8, seed=1).tolist(), ids(31, seed=2).tolist()
    a, b, c, d = tokens_of(
        batch_of(model, params, one_device, [first, first, second, second[:30]], samples=[0, 1, 0, 0])
    )
    assert len({tuple(a), tuple(b), tuple(c), tuple(d)}) == 4
    assert tokens_of(batch_of(model, params, one_device, [second, first], samples=[0, 1])) == [c, b]
    options = {"prompt": first, "num_tokens": 10, "sampling": Sampling(temperature=1.5, **PLAIN), "stop_id": -1}
    options["num_ids"] = VOCAB
    alone, other = (continue_tokens(model, params, one_device, seed=seed, **options) for seed in (4, 5))
    assert alone == a != other


@pytest.mark.slow
def test_a_batch_says_why_rows_ended_and_where_the_time_went(one_device):
    model, params = model_and_params(one_device)
    prompts = [ids(length, seed=length).tolist() for length in (7, 6, 11)]
    free = tokens_of(batch_of(model, params, one_device, prompts, samples=[0, 0, 0]))
    stop_id = free[0][3]
    assert free[0].index(stop_id) == 3 and stop_id not in free[1][:8] + free[2]
    jax.clear_caches()
    timings = Timings()
    batch = batch_of(model, params, one_device, prompts, samples=[0, 0, 0], stop_id=stop_id, timings=timings)
    made = [[], [], []]
    while batch.active_rows:
        for row, token in batch.step().items():
            made[row].append(token)
        if len(made[1]) == 8:
            batch.finish(1, FinishReason.STOP_STRING)
    assert made == [free[0][:3], free[1][:8], free[2]]
    assert batch.finish_reasons == {0: "end of document", 1: "stop string", 2: "length"}
    assert timings.prefill_tokens == 7 + 6 + 11
    assert timings.decode_tokens == 3 * 2 + 2 * 4 + 2 * 1  # steps 3 and 4, up to 8, up to 10; step 2 compiled
    assert min(timings.compile_seconds, timings.prefill_seconds, timings.decode_seconds) > 0
    assert timings.compile_seconds > timings.prefill_seconds + timings.decode_seconds  # of a tiny model
    again = Timings()
    tokens_of(batch_of(model, params, one_device, prompts[:2], samples=[0, 0], timings=again))
    assert again.compile_seconds == 0 and again.decode_tokens == 9 * 2  # the same shapes


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"num_tokens": 0}, "num_tokens=0 .* 1 or more"), ({"cache_dtype": "int3"}, "'int3' .* one of float32, bfloat16")],
)
def test_impossible_batches_are_refused(one_device, changes, said):
    model, params = model_and_params(one_device)
    with pytest.raises(ValueError, match=said):
        batch_of(model, params, one_device, [[3]], samples=[0], **changes)


@pytest.mark.parametrize(
    ("prompts", "said"),
    [([], "no prompt"), ([[1], []], "prompt 2 is empty"), ([[5, VOCAB]], "prompt 1 has an id that is none of the 300")],
)
def test_bad_prompts_are_refused(one_device, prompts, said):
    model, params = model_and_params(one_device)
    options = {
        "num_tokens": 2,
        "sampling": GREEDY,
        "seed": 0,
        "num_ids": VOCAB,
        "stop_id": -1,
        "cache_dtype": "float32",
    }
    with pytest.raises(ValueError, match=said):
        next(generate(model, params, one_device, prompts=prompts, **options))
