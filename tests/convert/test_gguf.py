"""The GGUF file in the real llama.cpp: logits of the original code, blocks and ids of llama.cpp; refusals."""

import dataclasses
import functools
import importlib.util
import tracemalloc
import types

import gguf
import numpy as np
import pytest
from support import llama_cpp
from support.published_files import ORACLES, oracle_array
from support.tiny_tokenizers import EOS, NASTY, TEXTS, tiny_byte_level

from btlm_jax import notices
from btlm_jax.convert import ggml
from btlm_jax.convert.fold import FoldedTensors
from btlm_jax.convert.ggml import num_bytes
from btlm_jax.convert.gguf_vocabulary import SentencePieceVocabulary, vocabulary_of
from btlm_jax.convert.prove_gguf import prove_tensors, prove_vocabulary
from btlm_jax.convert.to_gguf import GGUFSettings, gguf_tensors, write_gguf
from btlm_jax.convert.tokenizer_files import PROBES
from btlm_jax.hub.client_files import NO_SETTINGS, ClientSettings
from btlm_jax.hub.gguf import GGUFFile, GGUFTokenizer, gguf_logits
from btlm_jax.hub.huggingface import HuggingFaceTensors
from btlm_jax.hub.numpy_network import streamed_logits
from btlm_jax.hub.published import PublishedConfig, read_published_config, tensor_shapes
from btlm_jax.tokenizers.byte_level import ByteLevelTokenizer, train_byte_level
from btlm_jax.tokenizers.sentencepiece_bpe import SentencePieceTokenizer, train_sentencepiece
from btlm_jax.tokenizers.sentencepiece_proto import BYTE, NORMAL, USER_DEFINED

# As different as llama.cpp allows: heads no power of two, scores over sqrt(head_dim), a width no block divides.
OTHER = PublishedConfig(
    vocab_size=101, n_positions=48, n_embd=96, n_layer=3, n_head=6, n_inner=41, layer_norm_epsilon=1e-3,
    initializer_range=0.1, mup_embeddings_scale=3.0, mup_output_alpha=0.7, mup_width_scale=0.5,
    mup_scale_qk_dot_by_d=False, alibi_scaling=1.0, alibi_train_len=0, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
WIDE = dataclasses.replace(OTHER, n_embd=256, n_head=8, n_inner=300, n_layer=9)  # K-quants want rows of 256


class RandomTensors:
    """The tensors of a random model, made when they are read; `changed` are other ones by name."""

    def __init__(self, config, *, dtype=np.float32, **changed):
        self.shapes, self._dtype, self._changed = tensor_shapes(config), dtype, changed

    def read(self, name):
        random = np.random.default_rng(list(name.encode()))
        scale = 1 if ".ln_" in name or name.endswith(".bias") else 0.15
        array = scale * random.standard_normal(self.shapes[name], np.float32)
        return self._changed.get(name, array).astype(self._dtype)


def write(path, config, tensors, *, tokenizer=None, file_type="F32", settings=None):
    settings = settings or GGUFSettings(
        name="m", context_length=config.n_positions, pad_token_id=None, clients=NO_SETTINGS
    )
    options = {"tokenizer": tokenizer, "file_type": file_type, "pad_ffn": 256, "report": lambda name: None}
    options["settings"] = settings
    write_gguf(path, config=config, tensors=tensors, **options)
    return path


def oracle_model(name):
    config = read_published_config(ORACLES / name / "config.json")
    return config, HuggingFaceTensors(ORACLES / name, config)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The GGUF of an oracle in a file type, written once."""
    folder, paths = tmp_path_factory.mktemp("gguf"), {}

    def get(name, file_type):
        path = folder / f"{name}.{file_type}.gguf"
        return paths.setdefault(path, path if path in paths else write(path, *oracle_model(name), file_type=file_type))

    return get


def special_names(tokenizer) -> list[str]:
    return [EOS] if isinstance(tokenizer, ByteLevelTokenizer) else ["</s>", "<unk>"]


def matrices(path):
    """Every tensor of a file as llama.cpp's own tools read it: name -> (type, shape, bytes)."""
    reader = gguf.GGUFReader(path)
    return {
        tensor.name: (tensor.tensor_type, tuple(tensor.shape[::-1].tolist()), tensor.data) for tensor in reader.tensors
    }


def values(path):
    return {name: gguf.quants.dequantize(data, kind) for name, (kind, _, data) in matrices(path).items()}


def assert_blocks_are_llama_cpp_s(path, floats):
    """Assert that every matrix of a file is, to the bit, what llama.cpp's own quantizer makes of `floats`."""
    stored = {name: (kind, data) for name, (kind, shape, data) in matrices(path).items() if len(shape) == 2}
    expected = llama_cpp.quantize([(floats[name], int(kind), data.nbytes) for name, (kind, data) in stored.items()])
    for (name, (_, data)), bits in zip(stored.items(), expected, strict=True):
        np.testing.assert_array_equal(data.reshape(-1), bits, err_msg=name)


@pytest.mark.parametrize("decode", [llama_cpp.batch_logits, llama_cpp.stepwise_logits])
@pytest.mark.parametrize("name", ["tiny", "tiny_sp"])
def test_llama_cpp_gives_the_original_logits(written, name, decode):
    expected = oracle_array(name, "logits")
    actual = decode(written(name, "F32"), oracle_array(name, "input_ids"))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_llama_cpp_gives_the_logits_of_another_shape(tmp_path, dtype):
    tensors = RandomTensors(OTHER, dtype=np.dtype(dtype))
    ids_BT = np.random.default_rng(0).integers(0, OTHER.vocab_size, (2, OTHER.n_positions))
    expected = np.stack([streamed_logits(OTHER, tensors, ids_T) for ids_T in ids_BT])
    actual = llama_cpp.batch_logits(write(tmp_path / "m.gguf", OTHER, tensors), ids_BT)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))


# Largest differences and shares of equal likeliest tokens: those of llama.cpp's own quantizer, with some room.
@pytest.mark.parametrize(
    "file_type,largest,same", [("F16", 2e-3, 0.99), ("BF16", 1e-2, 0.96), ("Q8_0", 3e-2, 0.93), ("Q4_0", 0.3, 0.6)]
)
def test_small_types_stay_close(written, file_type, largest, same):
    expected = oracle_array("tiny", "logits")
    actual = llama_cpp.batch_logits(written("tiny", file_type), oracle_array("tiny", "input_ids"))
    assert np.abs(actual - expected).max() < largest
    assert (actual.argmax(-1) == expected.argmax(-1)).mean() > same


@pytest.mark.parametrize("file_type,output", [("Q8_0", "Q8_0"), ("Q4_0", "Q8_0")])
def test_blocks_are_those_of_llama_cpp(written, file_type, output):
    path = written("tiny", file_type)
    for name, (kind, shape, _) in matrices(path).items():
        is_vector = len(shape) == 1
        assert kind.name == ("F32" if is_vector else output if name == "output.weight" else file_type), name
    assert_blocks_are_llama_cpp_s(path, values(written("tiny", "F32")))


@pytest.mark.slow
def test_k_quants_are_those_of_llama_cpp(tmp_path):
    tensors = RandomTensors(WIDE)
    floats = values(write(tmp_path / "f32.gguf", WIDE, tensors))
    path = write(tmp_path / "k.gguf", WIDE, tensors, file_type="Q4_K_M")
    assert_blocks_are_llama_cpp_s(path, floats)
    for name, (kind, shape, data) in matrices(path).items():
        if len(shape) == 1:
            assert kind.name == "F32", name
        else:
            error = gguf.quants.dequantize(data, kind) - floats[name]
            assert np.abs(error).max() < 0.1 * np.abs(floats[name]).max(), name
    ids_BT = np.arange(40)[None]
    expected = streamed_logits(WIDE, tensors, ids_BT[0])
    assert np.corrcoef(llama_cpp.batch_logits(path, ids_BT)[0].ravel(), expected.ravel())[0, 1] > 0.97


# Bytes of BTLM-3B-8K as llama-quantize makes it, in gigabytes; our Q4_0 has 8.5 instead of 6.5625 bits in its output.
@pytest.mark.parametrize(
    "file_type,expected", [("BF16", 5.596), ("Q4_K_M", 1.765), ("Q4_0", 1.611 + 50257 * 2560 * 1.9375 / 8e9)]
)
def test_size_of_the_full_model(file_type, expected):
    config = dataclasses.replace(OTHER, vocab_size=50257, n_embd=2560, n_layer=32, n_head=32, n_inner=6912)
    size = sum(num_bytes(tensor.shape, tensor.type_name) for tensor in gguf_tensors(config, file_type=file_type))
    assert size / 1e9 == pytest.approx(
        expected, abs=4e-3
    )  # less than one tensor of another type; the tokenizer takes the rest


def test_ffn_is_padded_with_zeros(written):
    config, tensors = oracle_model("tiny")
    weights = values(written("tiny", "F32"))
    for layer in range(config.n_layer):
        for ours, published in (("ffn_up", "c_fc"), ("ffn_gate", "c_fc2")):
            weight_FD, bias_F = (weights[f"blk.{layer}.{ours}.{kind}"] for kind in ("weight", "bias"))
            stored = tensors.read(f"transformer.h.{layer}.mlp.{published}.weight")
            assert weight_FD.shape == (256, 64)
            np.testing.assert_array_equal(weight_FD[:170], stored.T)
            assert not weight_FD[170:].any() and not bias_F[170:].any()
        down_DF = weights[f"blk.{layer}.ffn_down.weight"]
        assert down_DF.shape == (64, 256) and not down_DF[:, 170:].any()


def sentencepiece_bpe(*, dummy_prefix):
    contents = train_sentencepiece(TEXTS, vocab_size=400)
    if not dummy_prefix:
        return SentencePieceTokenizer(contents)
    from support.tiny_tokenizers import trained

    return trained(model_type="bpe", byte_fallback=True, remove_extra_whitespaces=False, user_defined_symbols=["\n"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: ByteLevelTokenizer(tiny_byte_level().to_str().encode(), eos_id=299),
        lambda: sentencepiece_bpe(dummy_prefix=False),
        lambda: sentencepiece_bpe(dummy_prefix=True),
    ],
    ids=["byte-level", "sentencepiece", "sentencepiece with a dummy prefix"],
)
def test_llama_cpp_makes_the_same_ids(tmp_path, make):
    tokenizer = make()
    vocab_size = tokenizer.vocab_size + 7
    config = dataclasses.replace(OTHER, vocab_size=vocab_size)
    path = write(tmp_path / "m.gguf", config, RandomTensors(config), tokenizer=vocabulary_of(tokenizer))
    texts = [*NASTY, *PROBES, *TEXTS, f"{EOS}</s> [PAD{vocab_size - 1}]"]
    expected = [tokenizer.encode(text) for text in texts]
    assert llama_cpp.tokenize(path, texts) == expected
    names = [f"a{name} b{name}{name}" for name in special_names(tokenizer)]
    assert llama_cpp.prompt_ids(path, [*NASTY, *names]) == [tokenizer.encode_prompt(text) for text in [*NASTY, *names]]
    vocabulary = vocabulary_of(tokenizer, prompt_bos_id=tokenizer.eos_id)
    with_bos = write(tmp_path / "with_bos.gguf", config, RandomTensors(config), tokenizer=vocabulary)
    assert llama_cpp.prompt_ids(with_bos, texts) == [
        [tokenizer.eos_id, *tokenizer.encode_prompt(text)] for text in texts
    ]
    if isinstance(tokenizer, ByteLevelTokenizer):  # llama.cpp stops at two equal names
        tokens = list(vocabulary.tokens)
        tokens[270] = f"[PAD{vocab_size - 1}]"
        clashing = dataclasses.replace(vocabulary, tokens=tuple(tokens))
        other = write(tmp_path / "other.gguf", config, RandomTensors(config), tokenizer=clashing)
        assert len(llama_cpp.tokenize(other, texts)) == len(texts)
    read_back = GGUFTokenizer(GGUFFile(path).keys)
    assert [read_back.encode(text) for text in texts] == expected
    keys = gguf.GGUFReader(path).fields
    assert keys["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_id
    assert keys["tokenizer.ggml.tokens"].contents()[-7:] == [f"[PAD{vocab_size - 7 + at}]" for at in range(7)]
    ids_BT = np.arange(vocab_size - 40, vocab_size)[None]
    expected = streamed_logits(config, RandomTensors(config), ids_BT[0])
    actual = llama_cpp.batch_logits(path, ids_BT)[0]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("name", ["tiny", "tiny_sp"])
def test_a_file_is_read_back_as_llama_cpp_computes_it(written, name):
    path, ids_BT = written(name, "F32"), oracle_array(name, "input_ids")
    expected = llama_cpp.batch_logits(path, ids_BT)
    for ids_T, expected_TV in zip(ids_BT, expected, strict=True):
        found_TV = gguf_logits(GGUFFile(path), ids_T)
        np.testing.assert_allclose(found_TV, expected_TV, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))


def test_ids_are_read_back_as_llama_cpp_makes_them_where_the_tokenizer_makes_others(tmp_path):
    right, symbols = vocabulary_of(sentencepiece_bpe(dummy_prefix=True)), ("<tag>", "ag>eta", "\n\n")
    cutting = dataclasses.replace(
        right,
        pieces=right.pieces + symbols,
        scores=right.scores + (0.0,) * 3,
        types=right.types + (USER_DEFINED,) * 3,
    )
    config = dataclasses.replace(OTHER, vocab_size=len(cutting.pieces))
    path = write(tmp_path / "m.gguf", config, RandomTensors(config), tokenizer=cutting)
    texts = ["<tag>eta eta<tag> eta", "\n\n\n a\n \n\n", "<tag><tag>", *PROBES]
    actual = [GGUFTokenizer(GGUFFile(path).keys).encode(text) for text in texts]
    assert actual == llama_cpp.tokenize(path, texts)
    proven = functools.partial(
        prove_vocabulary,
        GGUFFile(path),
        sentencepiece_bpe(dummy_prefix=True),
        vocab_size=len(cutting.pieces),
        eos_id=right.eos_id,
    )
    with pytest.raises(ValueError, match="llama.cpp would put the id None in front of every prompt, not 5"):
        proven(prompt_bos_id=5)
    with pytest.raises(ValueError, match="llama.cpp would make other ids than the tokenizer: for "):
        proven()


DRAWN = {
    "attn.c_attn": lambda random, shape: random.standard_t(1.2, shape),  # a few values far above the others
    "attn.c_proj": lambda random, shape: np.where(random.random(shape) < 0.02, random.standard_normal(shape), 0),
    "mlp.c_fc": lambda random, shape: 1e-4 * random.standard_normal(shape),  # scales below the smallest float16 steps
    "mlp.c_fc2": lambda random, shape: 1 + 0.01 * random.standard_normal(shape),
    "mlp.c_proj": lambda random, shape: random.exponential(1, shape),
}


@pytest.mark.parametrize("file_type", ggml.FILE_TYPES)
def test_no_right_file_is_further_off_than_its_type_may_round(tmp_path, file_type):
    config, random = dataclasses.replace(WIDE, n_layer=1), np.random.default_rng(0)
    changed = {
        name: DRAWN[kind](random, shape).clip(-6e4, 6e4)
        for name, shape in tensor_shapes(config).items()
        for kind in DRAWN
        if name.endswith(f"{kind}.weight")
    }
    tensors = RandomTensors(config, **changed)
    path = write(tmp_path / "m.gguf", config, tensors, file_type=file_type)
    folded = FoldedTensors(tensors, config, pad_ffn=256)
    errors = prove_tensors(GGUFFile(path), folded, file_type=file_type, report=lambda name: None)
    assert errors.pop("F32") == 0
    assert all(0.25 < error <= 1 for error in errors.values()), errors  # the bounds are not far above either


def test_a_file_says_what_it_is(written):
    keys = {name: field.contents() for name, field in gguf.GGUFReader(written("tiny", "Q4_0")).fields.items()}
    expected = {
        "general.architecture": "jais", "general.file_type": 2, "general.quantization_version": 2,
        "jais.vocab_size": 512, "jais.context_length": 512, "jais.embedding_length": 64, "jais.block_count": 2,
        "jais.feed_forward_length": 256, "jais.attention.head_count": 4, "jais.attention.max_alibi_bias": 8.0,
        "tokenizer.ggml.model": "no_vocab",
    }  # fmt: skip
    assert expected.items() <= keys.items()


def test_settings_of_generation_that_gguf_has_no_place_for_are_said(tmp_path):
    values = {"temperature": 0.5, "top_k": 2.0**40, "top_p": float("nan"), "min_p": "x", "repetition_penalty": -1}
    settings = GGUFSettings(
        name="m", context_length=48, pad_token_id=None, clients=ClientSettings(generation_config=values)
    )
    notices.begin(strict=())
    write(tmp_path / "m.gguf", OTHER, RandomTensors(OTHER), settings=settings)
    assert notices.counts() == {"config-keys-dropped": 4}
    keys = GGUFFile(tmp_path / "m.gguf").keys
    assert {name: value for name, value in keys.items() if "sampling" in name} == {"general.sampling.temp": 0.5}


@pytest.mark.parametrize("place", ["dims", "first size"])
def test_a_tensor_without_values_is_damage(tmp_path, place):
    path = write(tmp_path / "m.gguf", OTHER, RandomTensors(OTHER))
    data = bytearray(path.read_bytes())
    dims = data.index(b"blk.0.attn_norm.weight") + len("blk.0.attn_norm.weight")
    data[dims if place == "dims" else dims + 4] = 0  # 96 as 8 bytes follow the number of dims, 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="m.gguf is damaged"):
        GGUFFile(path)


def test_a_list_that_goes_on_beyond_the_file_is_damage_and_no_endless_loop(tmp_path):
    config = dataclasses.replace(OTHER, vocab_size=300)
    vocabulary = vocabulary_of(ByteLevelTokenizer(tiny_byte_level().to_str().encode(), eos_id=299))
    path = write(tmp_path / "m.gguf", config, RandomTensors(config), tokenizer=vocabulary)
    data = bytearray(path.read_bytes())
    count = data.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8  # behind two types of 4 bytes
    data[count + 7] = 0x10
    path.write_bytes(data)
    with pytest.raises(ValueError, match="m.gguf is damaged or not a GGUF file: it ends inside its keys"):
        GGUFFile(path)


def test_peak_memory_is_far_below_the_file(tmp_path):
    config = dataclasses.replace(OTHER, n_layer=24, n_embd=128, n_head=8)
    tracemalloc.start()
    try:
        path = write(tmp_path / "m.gguf", config, RandomTensors(config))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < path.stat().st_size / 4


WTE, QKV = "transformer.wte.weight", "transformer.h.2.attn.c_attn.weight"
SPOILED = np.full((96, 288), 0.5, np.float32)
SPOILED[95, 287] = np.nan


@pytest.mark.parametrize(
    "config,changed,file_type,message",
    [
        (dataclasses.replace(OTHER, alibi_scaling=4.0), {}, "F32", "alibi_scaling=4"),
        (OTHER, {QKV: SPOILED}, "Q8_0", rf"{QKV} holds values that are not finite"),
        (OTHER, {WTE: np.full((101, 96), np.inf)}, "F32", rf"{WTE} holds values that are not finite"),
        (OTHER, {QKV: SPOILED.T}, "F32", rf"{QKV} has shape \(288, 96\), not \(96, 288\)"),
        (OTHER, {WTE: np.full((101, 96), 3e4)}, "F16", rf"{WTE}: values up to 9e\+04 are too large for F16"),
        (OTHER, {WTE: np.full((101, 96), 2e38)}, "F32", rf"{WTE}: values up to inf are too large"),
        (OTHER, {}, "Q4_K_M", "blocks of 256 values, which do not divide rows of 96"),
        (dataclasses.replace(OTHER, n_embd=90), {}, "Q8_0", "blocks of 32 values, which do not divide rows of 90"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning")
def test_what_cannot_be_expressed_is_refused(tmp_path, config, changed, file_type, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "m.gguf", config, RandomTensors(config, **changed), file_type=file_type)


def test_tensors_of_another_config_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tensor transformer.h.0.mlp.c_fc.weight has shape \(96, 41\).*\(96, 40\)"):
        write(tmp_path / "m.gguf", dataclasses.replace(OTHER, n_inner=40), RandomTensors(OTHER))


def test_a_full_disk_is_named(tmp_path):
    (tmp_path / "m.gguf").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device: .*m.gguf"):
        write(tmp_path / "m.gguf", OTHER, RandomTensors(OTHER))


def test_k_quants_need_a_library(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ggml._llama_cpp_quantizer.cache_clear()
    with pytest.raises(ValueError, match="pip install xllamacpp"):
        write(tmp_path / "m.gguf", WIDE, RandomTensors(WIDE), file_type="Q6_K")
    assert not list(tmp_path.iterdir())  # said before anything is written
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libggml-base.so").write_text("of another system")
    spec = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "llama_cpp" else None)
    with pytest.raises(ValueError, match=r"pip install xllamacpp .*; .*libggml-base.so cannot be used: "):
        ggml._llama_cpp_quantizer()


def test_tokenizers_that_llama_cpp_would_read_otherwise_are_refused(tmp_path):
    from support.tiny_tokenizers import own_pattern, trained

    with pytest.raises(ValueError, match="another pattern than GPT-2's"):
        vocabulary_of(ByteLevelTokenizer(own_pattern().to_str().encode(), eos_id=299))
    with pytest.raises(ValueError, match="has no merges, without which llama.cpp reads no byte-level tokenizer"):
        vocabulary_of(ByteLevelTokenizer(train_byte_level(TEXTS, vocab_size=257), eos_id=256))
    with pytest.raises(ValueError, match="it is not a byte-pair model"):
        vocabulary_of(trained(model_type="unigram", byte_fallback=True))
    with pytest.raises(ValueError, match="removes extra spaces"):
        vocabulary_of(trained(model_type="bpe", byte_fallback=True))
    with pytest.raises(ValueError, match="0 byte pieces, not 256"):
        vocabulary_of(trained(model_type="bpe", vocab_size=150, remove_extra_whitespaces=False))
    with pytest.raises(ValueError, match="space in front of the text .* llama.cpp puts a space after each"):
        vocabulary_of(
            trained(
                model_type="bpe", byte_fallback=True, remove_extra_whitespaces=False, user_defined_symbols=["<tag>"]
            )
        )
    vocabulary = vocabulary_of(sentencepiece_bpe(dummy_prefix=False))
    with pytest.raises(ValueError, match="400 tokens, but the model only 101 embeddings"):
        write(tmp_path / "m.gguf", OTHER, RandomTensors(OTHER), tokenizer=vocabulary)
    with pytest.raises(ValueError, match="eos_id=400 is none of the 400 tokens"):
        dataclasses.replace(vocabulary, eos_id=400)
    with pytest.raises(ValueError, match="257 pieces, 257 scores and 256 types"):
        SentencePieceVocabulary(
            pieces=("x",) * 257, scores=(0.0,) * 257, types=(NORMAL,) + (BYTE,) * 255, add_dummy_prefix=False,
            bos_id=0, add_bos=False, eos_id=0, unk_id=0,
        )  # fmt: skip
