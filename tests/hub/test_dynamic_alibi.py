"""Dynamic position interpolation, {"type": "linear", "train_seq_len": L}: one factor a call, from its keys.

The reference is written from the definition, in float64: slopes are divided by keys / L where there are more keys than
L, by 1 otherwise, for all queries of a call. Beyond L a whole pass and decoding over a cache differ by definition.
"""

import json

import numpy as np
import pytest
import torch
from support.published_files import oracle_array, oracle_weights, write_published

from btlm_jax.convert import conversion
from btlm_jax.convert.conversion import Conversion, convert
from btlm_jax.decode.decoder import make_decoder
from btlm_jax.generate import loading
from btlm_jax.generate.loading import load_for_generation
from btlm_jax.hub.source import open_source

TRAINED, PROMPT, LENGTH = 16, 21, 45
SCALING = {"type": "linear", "train_seq_len": TRAINED}
IDS = oracle_array("tiny", "input_ids")[0, :LENGTH]


def norm(x, weights, name):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]


def call(weights, ids, cache):
    """The logits_TV of new tokens after those in the cache, of two layers and four heads of 16; extends the cache."""
    x = weights["transformer.wte.weight"][ids] * 14.6
    start = len(cache[0][0]) if cache[0] else 0
    num_keys = start + len(ids)
    factor = max(1.0, num_keys / TRAINED)
    distance = np.arange(start, num_keys)[:, None] - np.arange(num_keys)
    for layer in range(2):
        prefix = f"transformer.h.{layer}."
        qkv = linear(norm(x, weights, prefix + "ln_1"), weights, prefix + "attn.c_attn")
        q, k, v = (part.reshape(len(ids), 4, 16) for part in np.split(qkv, 3, axis=1))
        if cache[layer]:
            k, v = (np.concatenate([old, new]) for old, new in zip(cache[layer], (k, v), strict=True))
        cache[layer] = (k, v)
        heads = []
        for head in range(4):
            slope = 2.0 ** (-2 * (head + 1)) / factor
            scores = q[:, head] @ k[:, head].T / 16 - slope * distance
            scores = np.where(distance >= 0, scores, -np.inf)
            weight = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weight / weight.sum(-1, keepdims=True) @ v[:, head])
        x = x + linear(np.concatenate(heads, axis=1), weights, prefix + "attn.c_proj")
        normed = norm(x, weights, prefix + "ln_2")
        up, gate = linear(normed, weights, prefix + "mlp.c_fc"), linear(normed, weights, prefix + "mlp.c_fc2")
        x = x + linear(up * gate / (1 + np.exp(-gate)), weights, prefix + "mlp.c_proj")
    return norm(x, weights, "transformer.ln_f") @ weights["transformer.wte.weight"].T * 0.222


@pytest.fixture(scope="module")
def whole_and_cached():
    """The logits_TV of one pass, and those after the prompt's last token and each later one, from a cache."""
    weights = {name: array.astype(np.float64) for name, array in oracle_weights().items()}
    cache = [None, None]
    cached = [call(weights, IDS[:PROMPT], cache)[-1:]]
    cached += [call(weights, IDS[at : at + 1], cache) for at in range(PROMPT, LENGTH)]
    return call(weights, IDS, [None, None]), np.concatenate(cached)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_published(tmp_path_factory.mktemp("dynamic") / "m", oracle_weights(), alibi_scaling=SCALING)


def make(source, target, **changes):
    options = {"format": "hf", "dtype": "float32", "file_type": "F32", "pad_ffn": 1, "max_shard_bytes": 10**9}
    options |= {"method": "rtn", "calibration": None} | changes
    convert(Conversion(source=source, target=target, **options), log=lambda line: None)
    return target


def assert_near(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_the_reference_tells_the_two_and_plain_alibi_apart(whole_and_cached):
    whole, cached = whole_and_cached
    scale = np.abs(whole).max()
    assert np.abs(whole[PROMPT - 1 :] - cached).max() > 1e-2 * scale
    assert np.abs(whole - oracle_array("tiny", "logits")[0, :LENGTH]).max() > 1e-2 * scale


@pytest.mark.slow
def test_every_form_computes_it_and_says_it(source, whole_and_cached, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "has_transformers", lambda: False)
    whole, _ = whole_and_cached
    native = make(source, tmp_path / "native", format="native")
    hf = make(native, tmp_path / "hf")
    for directory in (source, native, hf):
        assert_near(open_source(directory).logits(IDS), whole)
    assert json.loads((hf / "config.json").read_text())["alibi_scaling"] == SCALING
    make(source, tmp_path / "int4", format="int4")  # the proof decodes, no further than both ways agree
    for format, target in (("gguf", "m.gguf"), ("jais", "jais")):
        with pytest.raises(ValueError, match="alibi_scaling=keys/16 cannot be expressed in a Jais model"):
            make(hf, tmp_path / target, format=format)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["CPU kernels", "mesh"])
def test_decoding_computes_it_while_the_cache_grows(source, whole_and_cached, way, monkeypatch):
    monkeypatch.setattr(loading, "has_kernels", lambda: way == "CPU kernels")
    model = load_for_generation(source, as_int4=False)
    decoder = make_decoder(
        model.metadata.network(), model.params, model.mesh, num_rows=2, num_slots=24, cache_dtype="float32"
    )
    ids = IDS.tolist()
    rows = [ids[:PROMPT], ids[:5]]  # the other row is shorter, and never past the trained length
    logits = [decoder.prefill(rows)[0]]
    for end in range(PROMPT + 1, LENGTH + 1):
        if end == 24:
            decoder.grow(48)
        logits.append(decoder.decode([ids[:end], ids[: 5 + (end - PROMPT) // 4]])[0])
    assert_near(np.stack(logits), whole_and_cached[1])


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_exported_code_computes_it(source, whole_and_cached, implementation):
    from btlm_jax.convert.remote_code.configuration_btlm import BTLMConfig
    from btlm_jax.convert.remote_code.modeling_btlm import BTLMLMHeadModel

    config = BTLMConfig(**json.loads((source / "config.json").read_text()))
    config._attn_implementation = implementation
    model = BTLMLMHeadModel(config).eval()
    state = {name: torch.from_numpy(array) for name, array in oracle_weights().items() if "slopes" not in name}
    model.load_state_dict(state, strict=False)
    whole, cached = whole_and_cached
    ids_1T = torch.from_numpy(IDS)[None]
    with torch.no_grad():
        assert_near(model(ids_1T).logits[0].numpy(), whole)
        # padding on the left is no key, whatever the other row's length
        padded, mask = (torch.nn.functional.pad(x, (9, 0)) for x in (ids_1T, torch.ones_like(ids_1T)))
        both = model(padded.expand(2, -1), attention_mask=torch.cat([mask, torch.ones_like(mask)])).logits
        assert_near(both[0, 9:].numpy(), whole)
        output = model(ids_1T[:, :PROMPT], use_cache=True)
        logits = [output.logits[0, -1:]]
        for at in range(PROMPT, LENGTH):
            output = model(ids_1T[:, at : at + 1], past_key_values=output.past_key_values, use_cache=True)
            logits.append(output.logits[0])
    assert_near(torch.cat(logits).numpy(), cached)
