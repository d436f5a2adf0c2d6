"""Quantizing a whole model: the result, the inputs it is calibrated on, what is refused, what is in memory."""

import numpy as np
import pytest
from support.published_files import NAMES, ORACLES, oracle_array

from btlm_jax.hub import numpy_network
from btlm_jax.hub.huggingface import HuggingFaceTensors
from btlm_jax.hub.numpy_network import streamed_logits
from btlm_jax.hub.published import EMBEDDING, PublishedConfig, block_shapes, read_published_config, tensor_shapes
from btlm_jax.quantize import quantize_model as quantize_model_module
from btlm_jax.quantize.awq import scaled_block
from btlm_jax.quantize.gptq import gptq
from btlm_jax.quantize.grouped import Int4Matrix, Int8Matrix, dequantize, round_to_nearest, round_to_nearest_int8
from btlm_jax.quantize.hqq import half_quadratic
from btlm_jax.quantize.quantize_model import Method, dequantize_tensor, quantize_model

GROUP = 16  # divides neither n_embd nor n_inner
# Every size different.
SMALL = PublishedConfig(
    vocab_size=101, n_positions=48, n_embd=42, n_layer=2, n_head=3, n_inner=53, layer_norm_epsilon=1e-3,
    initializer_range=0.1, mup_embeddings_scale=3.0, mup_output_alpha=0.7, mup_width_scale=0.5,
    mup_scale_qk_dot_by_d=False, alibi_scaling=1.0, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
IDS_BT = np.random.default_rng(5).integers(0, SMALL.vocab_size, (6, 37))


class Held:
    """Tensors in memory, and the names read so far."""

    def __init__(self, arrays):
        self.arrays, self.names = arrays, []
        self.shapes = {name: array.shape for name, array in arrays.items()}

    def read(self, name):
        self.names.append(name)
        return self.arrays[name]


def random_tensors():
    random = np.random.default_rng(6)
    arrays = {}
    for name, shape in tensor_shapes(SMALL).items():
        center = 1 if ".ln_" in name and name.endswith("weight") else 0
        arrays[name] = (center + 0.3 * random.standard_normal(shape)).astype(np.float32)
    return Held(arrays)


def quantized(config, tensors, **changes):
    options = {
        "method": Method.RTN, "group_size": GROUP, "embedding_bits": 8, "calibration_BT": IDS_BT,
        "report": lambda name: None,
    }  # fmt: skip
    return quantize_model(config, tensors, **options | changes)


def as_tensors(rounded):
    return Held({name: dequantize_tensor(name, value) for name, value in rounded})


def oracle(name):
    config = read_published_config(ORACLES / name / "config.json")
    return config, HuggingFaceTensors(ORACLES / name, config)


@pytest.mark.slow
@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_matrix_is_rounded_and_nothing_else(method, bits):
    tensors, reported = random_tensors(), []
    rounded = dict(quantized(SMALL, tensors, method=method, embedding_bits=bits, report=reported.append))
    assert list(rounded) == list(tensor_shapes(SMALL))
    assert sorted(reported) == sorted(rounded)
    for name, value in rounded.items():
        if name == EMBEDDING:
            assert isinstance(value, {4: Int4Matrix, 8: Int8Matrix}[bits])
            assert value.codes_KM.shape == (SMALL.n_embd, SMALL.vocab_size)
        elif len(tensors.shapes[name]) == 2:
            assert isinstance(value, Int4Matrix) and value.codes_KM.shape == tensors.shapes[name]
            assert value.scale_GM.shape == (-(-tensors.shapes[name][0] // GROUP), tensors.shapes[name][1])
        else:
            assert value.dtype == np.float32
            if not method.is_scaled:
                np.testing.assert_array_equal(value, tensors.arrays[name])
        assert dequantize_tensor(name, value).shape == tensors.shapes[name]


@pytest.mark.parametrize(("method", "rounding"), [(Method.RTN, round_to_nearest), (Method.HQQ, half_quadratic)])
def test_methods_without_calibration_round_each_matrix_by_itself(method, rounding):
    tensors = random_tensors()
    for name, value in quantized(SMALL, tensors, method=method, calibration_BT=None):
        if name != EMBEDDING and isinstance(value, Int4Matrix):
            np.testing.assert_array_equal(dequantize(value), dequantize(rounding(tensors.arrays[name], GROUP)))


def test_the_embedding_is_rounded_along_the_model_dim(monkeypatch):
    monkeypatch.setattr(quantize_model_module, "_EMBEDDING_COLUMNS", 30)
    tensors = random_tensors()
    for bits, rounding in ((4, half_quadratic), (8, round_to_nearest_int8)):
        name, table = next(quantized(SMALL, tensors, embedding_bits=bits))
        expected_DV = dequantize(rounding(tensors.arrays[EMBEDDING].T, GROUP))
        np.testing.assert_array_equal(dequantize_tensor(name, table), expected_DV.T)


@pytest.mark.parametrize("name", NAMES)
def test_awq_scales_leave_the_float_network_as_it_is(name):
    config, tensors = oracle(name)
    arrays = {key: tensors.read(key) for key in tensors.shapes}
    random = np.random.default_rng(7)
    for layer in range(config.n_layer):
        block = {own: arrays[f"transformer.h.{layer}.{own}"] for own in block_shapes(config)}
        inputs = {
            own: np.exp(2 * random.standard_normal(width)) * random.standard_normal((50, width)).astype(np.float32)
            for own, width in (
                ("attn.c_attn", config.n_embd), ("attn.c_proj", config.n_embd), ("mlp.c_fc", config.n_embd),
                ("mlp.c_proj", config.n_inner),
            )
        }  # fmt: skip
        scaled = scaled_block(block, inputs, GROUP)
        for own in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_fc2", "mlp.c_proj"):
            assert np.abs(np.log2(np.abs(scaled[f"{own}.weight"] / block[f"{own}.weight"]))).max() > 0.5, own
        arrays |= {f"transformer.h.{layer}.{own}": array for own, array in scaled.items()}
    for ids_T, expected_TV in zip(oracle_array(name, "input_ids"), oracle_array(name, "logits"), strict=True):
        np.testing.assert_allclose(streamed_logits(config, Held(arrays), ids_T), expected_TV, atol=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_calibrated_methods_keep_the_logits_of_an_oracle_closer(name):
    config, tensors = oracle(name)
    ids_BT = oracle_array(name, "input_ids")

    def distance(method):
        dequantized = as_tensors(quantized(config, tensors, method=method, calibration_BT=ids_BT))
        logits_BTV = np.stack([streamed_logits(config, dequantized, ids_T) for ids_T in ids_BT])
        return np.square(logits_BTV - oracle_array(name, "logits")).mean()

    nearest = distance(Method.RTN)
    assert distance(Method.GPTQ) < 0.8 * nearest
    assert distance(Method.AWQ_GPTQ) < 0.8 * nearest
    assert distance(Method.AWQ) < nearest


def test_calibration_runs_through_what_is_rounded_already():
    """Each matrix's Hessian is that of its inputs in the network whose earlier matrices are rounded."""
    tensors = random_tensors()
    rounded = dict(quantized(SMALL, tensors, method=Method.GPTQ))
    dequantized = as_tensors(rounded.items())
    x_BTD = numpy_network.embed(SMALL, dequantized.arrays[EMBEDDING], IDS_BT)
    checked = []
    for layer in range(SMALL.n_layer):
        prefix = f"transformer.h.{layer}."

        def norm(x_BTD, name, prefix=prefix):
            gain_D, bias_D = dequantized.arrays[f"{prefix}{name}.weight"], dequantized.arrays[f"{prefix}{name}.bias"]
            return numpy_network.layer_norm(SMALL, x_BTD, gain_D, bias_D)

        def linear(x_BTK, name, prefix=prefix):
            matrix = rounded[f"{prefix}{name}.weight"]
            x_RK = x_BTK.reshape(-1, x_BTK.shape[-1])
            expected = gptq(tensors.arrays[f"{prefix}{name}.weight"], GROUP, hessian_KK=x_RK.T @ x_RK)
            np.testing.assert_array_equal(matrix.codes_KM, expected.codes_KM)
            checked.append(name)
            return x_BTK @ dequantize(matrix) + dequantized.arrays[f"{prefix}{name}.bias"]

        x_BTD = numpy_network.block(SMALL, x_BTD, norm=norm, linear=linear)
    assert len(checked) == 5 * SMALL.n_layer


def test_one_block_is_in_memory_at_a_time():
    tensors = random_tensors()
    for name, _ in quantized(SMALL, tensors, method=Method.GPTQ):
        allowed = {EMBEDDING} if name == EMBEDDING else set(list(tensor_shapes(SMALL))[: 1 + 14])
        if name.startswith("transformer.h.0.") or name == EMBEDDING:
            assert set(tensors.names) <= allowed
    assert sorted(tensors.names) == sorted(tensors.shapes)  # each once


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("name", [EMBEDDING, "transformer.h.1.mlp.c_fc2.weight", "transformer.ln_f.bias"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(method, name, value):
    tensors = random_tensors()
    tensors.arrays[name].flat[7] = value
    with pytest.raises(ValueError, match=rf"tensor {name} holds 1 values that are not finite"):
        list(quantized(SMALL, tensors, method=method))


@pytest.mark.parametrize("method", [Method.RTN, Method.GPTQ])
def test_weights_that_are_too_large_are_named(method):
    tensors, name = random_tensors(), "transformer.h.0.attn.c_proj.weight"
    tensors.arrays[name][3, 5] = 1e7
    with pytest.raises(ValueError, match=rf"tensor {name} cannot be quantized: .*too large"):
        list(quantized(SMALL, tensors, method=method))


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("bits", [4, 8])
def test_very_small_weights_are_quantized(method, bits):
    """Scales below float16's normal numbers are rounded to multiples of 2^-24: a code of 127 makes that 4e-6."""
    tensors, random = random_tensors(), np.random.default_rng(8)
    for row, std in enumerate(10.0 ** np.arange(-9, -3)):
        tensors.arrays[EMBEDDING][row] = std * random.standard_normal(SMALL.n_embd)
        tensors.arrays["transformer.h.1.mlp.c_fc.weight"][:, row] = std * random.standard_normal(SMALL.n_embd)
    rounded = dict(quantized(SMALL, tensors, method=method, embedding_bits=bits))
    error_VD = np.abs(dequantize_tensor(EMBEDDING, rounded[EMBEDDING]) - tensors.arrays[EMBEDDING])
    assert error_VD[:6].max() < 128 * 2.0**-25 + 1e-3 * 0.05


@pytest.mark.parametrize("calibration_BT", [None, IDS_BT[:0]])
def test_calibrated_methods_ask_for_their_ids(calibration_BT):
    with pytest.raises(ValueError, match="method=gptq needs calibration token ids"):
        next(quantized(SMALL, random_tensors(), method=Method.GPTQ, calibration_BT=calibration_BT))


def test_an_unknown_width_of_the_embedding_is_refused():
    with pytest.raises(ValueError, match="embedding_bits=5 is not known"):
        next(quantized(SMALL, random_tensors(), embedding_bits=5))
