"""Configs of both generations of keys, and what must be refused."""

import dataclasses
import json

import pytest
from support.published_files import ORACLES, oracle_weights

from btlm_jax.hub.published import read_published_config, tensor_shapes

TINY = json.loads((ORACLES / "tiny" / "config.json").read_text())


def read(tmp_path, **changes):
    values = {key: value for key, value in (TINY | changes).items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(values))
    return read_published_config(tmp_path / "config.json")


def test_the_older_keys_say_the_same(tmp_path):
    new = ("mup_embeddings_scale", "mup_output_alpha", "mup_width_scale", "mup_scale_qk_dot_by_d")
    old = {"embeddings_scale": 14.6, "output_logits_scale": 0.222, "width_scale": 0.1, "scale_qk_dot_by_d": True}
    config = read(tmp_path, **dict.fromkeys(new, ...), **old)
    assert config.output_scale == pytest.approx(0.222, rel=1e-15)
    alpha = {"mup_output_alpha": pytest.approx(2.22, rel=1e-15)}
    assert dataclasses.asdict(config) == dataclasses.asdict(read(tmp_path)) | alpha
    for left_out in (("mup_output_alpha",), ()):  # of both generations; 0.222 / 0.1 is not 2.22 to the last bit
        config = read(tmp_path, **dict.fromkeys(left_out, ...), output_logits_scale=0.222)
        assert config.output_scale == pytest.approx(0.222, rel=1e-15)


def test_keys_left_out_have_the_values_of_the_published_code(tmp_path):
    left_out = ("mup_embeddings_scale", "mup_output_alpha", "mup_width_scale", "mup_scale_qk_dot_by_d", "n_inner")
    left_out += ("vocab_size", "n_positions", "initializer_range")
    config = read(tmp_path, **dict.fromkeys(left_out, ...))
    assert (config.vocab_size, config.n_positions, config.initializer_range) == (50257, 1024, 0.02)
    assert (config.mup_embeddings_scale, config.output_scale, config.mup_scale_qk_dot_by_d) == (1.0, 1.0, False)
    assert config.n_inner == 4 * 64


def test_a_trained_length_is_read(tmp_path):
    for length in (1, 8192, 2**31 - 1):
        config = read(tmp_path, alibi_scaling={"type": "linear", "train_seq_len": length})
        assert (config.alibi_train_len, config.alibi_scaling) == (length, 1.0)


def test_shapes_are_those_of_the_original():
    original = {name: array.shape for name, array in oracle_weights().items()}
    shapes = tensor_shapes(read_published_config(ORACLES / "tiny" / "config.json"))
    assert original == shapes | {"transformer.relative_pe.slopes": (4, 1)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'"),
        ({"activation_function": "gelu"}, "activation_function='gelu' cannot be computed"),
        ({"activation_function": ...}, "activation_function='gelu_new' cannot be computed"),
        ({"position_embedding_type": "learned"}, "position_embedding_type='learned'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"alibi_scaling": {"type": "dynamic", "train_seq_len": 64}}, "alibi_scaling="),
        ({"n_head": 5}, "n_embd=64 is not divisible by n_head=5"),
        ({"n_layer": "two"}, "n_layer='two' must be a whole number from 1 to 2147483647"),
        ({"n_layer": None}, "n_layer=None must be a whole number"),
        *[({"alibi_scaling": bad}, "alibi_scaling=") for bad in (["linear", 2], "linear", False, 2.0, {})],
        ({"alibi_scaling": {"type": "linear", "factor": 2.0, "train_seq_len": 64}}, "alibi_scaling="),
        ({"alibi_scaling": {"type": "linear", "factor": float("inf")}}, "alibi_scaling="),
        *[
            ({"alibi_scaling": {"type": "linear", "train_seq_len": bad}}, "alibi_scaling=")
            for bad in (0, -8, 2.5, 2**31)
        ],
        ({"n_layer": 2**40}, "n_layer=1099511627776 must be a whole number"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon=nan must be a number above 0"),
        ({"mup_output_alpha": 10**400}, "must be a number above 0"),
        (
            {"mup_width_scale": ..., "mup_output_alpha": ..., "width_scale": 0, "output_logits_scale": 0.2},
            "width_scale=0",
        ),
        ({"mup_scale_qk_dot_by_d": "yes"}, "mup_scale_qk_dot_by_d='yes' must be true or false"),
        ({"eos_token_id": 512}, "eos_token_id=512 must be an id from 0 to 511"),
        ({"bos_token_id": "<s>"}, "bos_token_id='<s>' must be an id from 0 to 511"),
        ({"width_scale": 0.5}, "mup_width_scale=0.1 contradicts the older key's 0.5"),
    ],
)
def test_what_cannot_be_computed_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match="config.json") as error:
        read(tmp_path, **changes)
    assert message in str(error.value)


def test_no_config_and_no_json(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        read_published_config(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_published_config(tmp_path / "config.json")
