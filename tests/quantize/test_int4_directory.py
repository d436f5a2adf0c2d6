"""4-bit models from end to end: converting, proving, loading, generating; and damaged ones."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from support.published_files import NAMES, ORACLES, oracle_array
from support.tiny import tiny_config

from btlm_jax.cli import main
from btlm_jax.convert import conversion, to_int4
from btlm_jax.convert.conversion import Conversion, convert
from btlm_jax.data.loader import read_rows
from btlm_jax.data.reader import open_store
from btlm_jax.decode import cpu_cache as cache
from btlm_jax.decode.cpu_decoder import CpuDecoder
from btlm_jax.evaluate.checkpoint import Checkpoint
from btlm_jax.evaluate.texts import load_to_generate
from btlm_jax.generate.loading import load_for_generation
from btlm_jax.hub.given_model import open_given_model
from btlm_jax.hub.native import ModelMetadata, one_device_mesh, read_model_directory, write_model_directory
from btlm_jax.hub.numpy_network import streamed_logits
from btlm_jax.hub.source import open_source
from btlm_jax.kernels import tiles
from btlm_jax.model import init_params
from btlm_jax.quantize import int4_directory
from btlm_jax.quantize import quantize_model as quantize_model_module
from btlm_jax.quantize.int4_directory import Int4Tensors, read_int4_directory
from btlm_jax.quantize.quantize_model import Method, dequantize_tensor, quantize_model


def make(source, target, **changes):
    options = {"dtype": "float32", "file_type": "F32", "pad_ffn": 1, "max_shard_bytes": 10**9, "method": "rtn"}
    lines, options = [], options | {"calibration": None, "format": "int4"} | changes
    proofs = convert(Conversion(source=source, target=target, **options), log=lines.append)
    assert all(proof.holds for proof in proofs)
    return target, "\n".join(lines)


@pytest.fixture(scope="module", params=NAMES)
def rounded(request, tmp_path_factory):
    return request.param, make(ORACLES / request.param, tmp_path_factory.mktemp("int4") / "m")[0]


def decoded(model, weights, ids_BT, *, prefilled, cache_dtype="float32"):
    """The logits_BTV after positions prefilled - 1 and later: a prefill, then token by token."""
    decoder = CpuDecoder(model, weights, num_rows=len(ids_BT), num_slots=128, cache_dtype=cache_dtype)
    logits_BV = [decoder.prefill([row[:prefilled] for row in ids_BT])]
    for end in range(prefilled + 1, ids_BT.shape[1] + 1):
        logits_BV.append(decoder.decode([row[:end] for row in ids_BT]))
    return np.stack(logits_BV, axis=1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "way"), [*((name, "kernels") for name in NAMES), (NAMES[0], "XLA")])
def test_decoding_on_a_cpu_gives_the_original_logits(name, way, monkeypatch):
    native = load_for_generation(ORACLES / name, as_int4=False)
    if way == "XLA":
        for module in (cache, tiles):
            monkeypatch.setattr(module, "has_kernels", lambda: False)
    ids_BT, expected = oracle_array(name, "input_ids")[:, :70], oracle_array(name, "logits")[:, 40:70]
    jax.clear_caches()  # both ways are compiled under one name
    actual = decoded(native.metadata.network(), native.params, ids_BT, prefilled=41)
    jax.clear_caches()
    np.testing.assert_allclose(actual, expected, atol=2e-5)


def to_answer_tasks(directory):
    """What `btlm evaluate --tasks` has of a model directory; tasks need its tokenizer, its logits do not."""
    given = open_given_model(directory, step=0)
    checkpoint = Checkpoint(
        name="m", directory=directory, is_fetched=False, form=given.form, step=0, identity="", metadata=given.metadata,
        tokenizer=given.tokenizer, given=given,
    )  # fmt: skip
    return load_to_generate(checkpoint, dtype="model", as_int4=False)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["float32", "int4", "native"])
def test_a_residual_multiplier_counts_once(tmp_path, form):
    config = tiny_config(mup__preset="completep", mup__base_num_layers=1, model__vocab_size=300)
    facts = {"max_length": 48, "eos_id": 0, "tokenizer": None, "prompt_bos_id": None, "notes": {}}
    metadata = ModelMetadata(model=config.model, mup=config.mup, **facts)
    params = init_params(metadata.network(), one_device_mesh(), seed=5)
    assert metadata.network().parametrization.residual_scale != 1
    write_model_directory(tmp_path / "m", metadata=metadata, params=params, tokenizer=None)
    ids_T = np.arange(40, 70)
    if form != "float32":
        make(tmp_path / "m", tmp_path / form, format=form)  # the proof compares
    if form == "native":
        again = read_model_directory(tmp_path / form)
        assert again.metadata == metadata
        jax.tree.map(np.testing.assert_array_equal, again.params, params)
    if form != "float32":
        return
    expected_TV = open_source(tmp_path / "m").logits(ids_T)[2:]
    for native in (load_for_generation(tmp_path / "m", as_int4=False), to_answer_tasks(tmp_path / "m")):
        found_BTV = decoded(native.metadata.network(), native.params, ids_T[None], prefilled=3)
        np.testing.assert_allclose(found_BTV[0], expected_TV, atol=2e-5)


@pytest.mark.slow
def test_codes_come_back_as_they_were_rounded(rounded):
    name, directory = rounded
    source, stored = open_source(ORACLES / name), Int4Tensors(directory)
    tensors = quantize_model(
        source.config, source.tensors, method=Method.RTN, group_size=64, embedding_bits=8, calibration_BT=None,
        report=lambda name: None,
    )  # fmt: skip
    for tensor, value in tensors:
        np.testing.assert_array_equal(stored.read(tensor), dequantize_tensor(tensor, value), err_msg=tensor)


@pytest.mark.slow
def test_the_kernels_compute_what_the_codes_stand_for(rounded):
    name, directory = rounded
    model, ids_BT = read_int4_directory(directory), oracle_array(name, "input_ids")
    actual = decoded(model.metadata.network(), model.weights, ids_BT, prefilled=90)
    for row, ids_T in enumerate(ids_BT):
        expected_TV = streamed_logits(open_source(ORACLES / name).config, Int4Tensors(directory), ids_T)
        np.testing.assert_allclose(actual[row], expected_TV[89:], atol=2e-5 * np.abs(expected_TV).max())


def test_an_int8_cache_is_near(tmp_path):
    directory, _ = make(ORACLES / NAMES[0], tmp_path / "m")
    model, ids_BT = read_int4_directory(directory), oracle_array(NAMES[0], "input_ids")[:, :60]
    exact, near = (
        decoded(model.metadata.network(), model.weights, ids_BT, prefilled=30, cache_dtype=dtype)
        for dtype in ("float32", "int8")
    )
    assert 0 < np.abs(exact - near).max() < 0.03 * np.abs(exact).max()


@pytest.mark.slow
def test_rows_of_mixed_lengths_prefill_decode_and_grow():
    """Prompts that are whole pieces, and a cache that grows while they are decoded, against whole forward passes."""
    native, source = load_for_generation(ORACLES / "tiny", as_int4=False), open_source(ORACLES / "tiny")
    lengths, num_new, num_slots = (256, 505, 1), 12, 512
    rows = np.random.default_rng(0).integers(0, native.metadata.model.vocab_size, (3, 520))
    expected = [source.logits(row[: length + num_new]) for row, length in zip(rows, lengths, strict=True)]
    decoder = CpuDecoder(
        native.metadata.network(), native.params, num_rows=3, num_slots=num_slots, cache_dtype="float32"
    )
    found_BV = decoder.prefill([row[:length] for row, length in zip(rows, lengths, strict=True)])
    for new in range(num_new):
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(found_BV[row], expected[row][length - 1 + new], atol=2e-5)
        if max(lengths) + new + 1 > num_slots:
            num_slots *= 2
            decoder.grow(num_slots)
        found_BV = decoder.decode([row[: length + new + 1] for row, length in zip(rows, lengths, strict=True)])
    assert num_slots == 1024


@pytest.mark.slow
def test_weights_stay_in_the_dtype_of_the_model(monkeypatch, tmp_path):
    monkeypatch.setattr(conversion, "has_transformers", lambda: False)  # its proof is another test's
    options = dict(file_type="F32", pad_ffn=1, max_shard_bytes=10**9, method="rtn", calibration=None)
    target = tmp_path / "hf"
    convert(
        Conversion(source=ORACLES / "tiny", target=target, format="hf", dtype="bfloat16", **options), log=lambda _: None
    )
    weights = {source: load_for_generation(source, as_int4=False).params for source in (ORACLES / "tiny", target)}
    assert weights[ORACLES / "tiny"].down.data.dtype == "float32"
    assert weights[target].down.data.dtype == weights[target].embedding.data.dtype == "uint32"  # pairs of bfloat16


def test_calibration_is_spread_over_the_training_data(tiny_run):
    _, workdir = tiny_run
    ids_BT = to_int4.calibration_ids(workdir, None, text=None)
    reader = open_store(to_int4.store_of_run(workdir).location, expected_fingerprint="").split("train")
    ends = read_rows(reader, [(0, 0), (len(reader) - 1, 0)], seq_len=ids_BT.shape[1])["inputs_BT"]
    np.testing.assert_array_equal(ids_BT[[0, -1]], ends)
    assert len(ids_BT) == 32 and len(np.unique(ids_BT, axis=0)) > 1


def test_calibration_takes_each_part_of_the_training_data_once(tiny_run, monkeypatch):
    _, workdir = tiny_run
    reader = open_store(to_int4.store_of_run(workdir).location, expected_fingerprint="").split("train")
    monkeypatch.setattr(to_int4, "_CALIBRATION_LENGTH", 16)
    monkeypatch.setattr(to_int4, "_CALIBRATION_ROWS", 10**5)
    starts = [(block, start) for block in range(len(reader)) for start in range(0, reader.block_len, 16)]
    rows = read_rows(reader, starts, seq_len=16)
    is_text_B = rows["weights_BT"].any(1)
    assert 3 * len(reader) == len(starts) and not is_text_B.all()  # of a stream's last block the end is padding
    ids_BT = to_int4.calibration_ids(workdir, None, text=None)
    np.testing.assert_array_equal(ids_BT, rows["inputs_BT"][is_text_B])


def test_calibration_without_the_run_s_store_says_what_to_give(tiny_run, tmp_path, monkeypatch):
    _, workdir = tiny_run
    given = to_int4.store_of_run(workdir)
    monkeypatch.setattr(to_int4, "_CALIBRATION_ROWS", 2)
    with pytest.raises(ValueError, match="has 96 tokens to calibrate on; at least 512 are needed: give --calibration="):
        to_int4.calibration_ids(workdir, None, text=None)
    for changes, kind, message in (
        ({"location": tmp_path / "store"}, FileNotFoundError, r"store of the run .* is not here .*: "),
        ({"fingerprint": "f00"}, ValueError, r"is not the one that the run .* was trained on: its .*, not f00; "),
    ):
        changed = dataclasses.replace(given, **changes)
        monkeypatch.setattr(to_int4, "store_of_run", lambda _, changed=changed: changed)
        with pytest.raises(kind, match=message + "give --calibration=TEXTFILE, or --method=hqq"):
            to_int4.calibration_ids(workdir, None, text=None)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "hqq"])
def test_a_run_writes_text_at_4_bits(capsys, tiny_run, tmp_path, method):
    _, workdir = tiny_run
    target, output = make(workdir, tmp_path / "m", method=method)
    assert f"{method}, groups of 64" in json.loads((target / "model.json").read_text())["notes"]["4 bits"]
    assert "the codes' values, and the kernels" in output
    texts = {}
    for name, flags in {"directory": [f"--checkpoint={target}"], "run": [f"--checkpoint={workdir}", "--int4"]}.items():
        assert main(["generate", *flags, "--prompt=def f", "--num_tokens=9", "--temperature=0"]) == 0
        texts[name] = capsys.readouterr().out
        assert texts[name].startswith("def f")
    if method == "hqq":
        assert texts["directory"] == texts["run"]


@pytest.mark.slow
def test_a_text_to_calibrate_on(tiny_run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("def area(radius):\n    return 3.14159 * radius ** 2\n" * 200)
    _, workdir = tiny_run
    first, output = make(workdir, tmp_path / "a", method="gptq", calibration=text)
    assert f"tokens of {text}, in rows of 512" in output
    other, _ = make(workdir, tmp_path / "b", method="gptq")
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"method": "gptq"}, "is no training run: give --calibration=TEXTFILE, or --method=hqq"),
        ({"method": "gptq", "calibration": ORACLES / "README.md"}, "holds no tokenizer to read"),
        ({"method": "hqq", "calibration": ORACLES / "README.md"}, "says nothing about method=hqq; it is for gptq, awq"),
        ({"method": "gptq", "calibration": ORACLES}, "is no file; give a text"),
        ({"method": "q4"}, "method='q4' is not known; allowed are rtn, hqq, gptq, awq"),
    ],
)
def test_refusals_leave_nothing(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make(ORACLES / "tiny", tmp_path / "m", **changes)
    assert not list(tmp_path.iterdir())


def test_of_a_large_text_the_beginning_is_read(tiny_run, tmp_path):
    lines, tokenizer = "area = 3.14159 * radius ** 2\n" * 500, open_source(tiny_run[1]).tokenizer
    (tmp_path / "text.txt").write_bytes(lines.encode() + b" " * (1 << 21) + b"\xff")
    ids_BT = to_int4.calibration_ids(tmp_path, tokenizer, text=tmp_path / "text.txt")
    assert ids_BT.ravel()[:3000].tolist() == tokenizer.encode(lines)[:3000]


def test_a_short_text_is_refused(tiny_run, tmp_path):
    (tmp_path / "text.txt").write_text("too short")
    with pytest.raises(ValueError, match=r"text.txt has \d+ tokens; at least 512 are needed"):
        make(tiny_run[1], tmp_path / "m", method="gptq", calibration=tmp_path / "text.txt")


def test_the_proof_sees_a_wrong_kernel(tmp_path, monkeypatch):
    read = to_int4.read_int4_directory

    def wrong(directory):
        model = read(directory)
        vectors = model.weights.vectors
        vectors["down.bias"] = vectors["down.bias"] * 1.1
        return model

    monkeypatch.setattr(to_int4, "read_int4_directory", wrong)
    with pytest.raises(ValueError, match="does not compute the same.*the codes' values, and the kernels.*ABOVE"):
        make(ORACLES / "tiny", tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_zeros_are_no_rounded_model(tmp_path, monkeypatch):
    def zeroed(config, tensors, **options):
        for name, value in quantize_model(config, tensors, **options):
            is_embedding = name.endswith("wte.weight")
            yield name, dataclasses.replace(value, scale_GM=0 * value.scale_GM) if is_embedding else value

    monkeypatch.setattr(to_int4, "quantize_model", zeroed)
    with pytest.raises(ValueError, match="does not compute the same.*the 4-bit model.*ABOVE"):
        make(ORACLES / "tiny", tmp_path / "m")


def scaled_group(module, name, monkeypatch, factor):
    """Have one group's scale come out of a function of the quantizer or of the writer times a factor."""
    made = getattr(module, name)

    def spoiled(*arguments, **options):
        result = made(*arguments, **options)
        if isinstance(result, np.ndarray):  # of the writer, tile_factors: [tile, group, output in the tile]
            result = result.copy()
            result[0, -1, 3] *= factor
            return result
        scale_GM = result.scale_GM.copy()
        scale_GM[-1, 3] *= factor
        return dataclasses.replace(result, scale_GM=scale_GM)

    monkeypatch.setattr(module, name, spoiled)


@pytest.mark.parametrize(
    ("module", "name", "method", "factor", "message"),
    [
        (quantize_model_module, "round_to_nearest", "rtn", 1.25, "the codes of 1 groups are not near its weights"),
        (quantize_model_module, "half_quadratic", "hqq", 0.75, "the codes of 1 groups are not near its weights"),
        (quantize_model_module, "gptq", "gptq", 1.5, "the codes of 1 groups are not near its weights"),
        (quantize_model_module, "round_to_nearest_int8", "rtn", 1.25, "the codes of 1 groups are not near its weights"),
        (int4_directory, "tile_factors", "rtn", 1.001, "is not the quantized source, so it was not kept: tensor"),
    ],
)
def test_a_wrong_scale_of_one_group_is_seen(tmp_path, monkeypatch, tiny_run, module, name, method, factor, message):
    scaled_group(module, name, monkeypatch, factor)
    source = tiny_run[1] if method == "gptq" else ORACLES / "tiny"
    with pytest.raises(ValueError, match=message):
        make(source, tmp_path / "m", method=method)
    assert not list(tmp_path.iterdir())


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def other_model(name, value):
    def damage(path):
        path = path.parent / "model.json"
        values = json.loads(path.read_text())
        values["model"][name] = value
        path.write_text(json.dumps(values))

    return damage


def other_header(change):
    def damage(path):
        contents = path.read_bytes()
        length = int.from_bytes(contents[:8], "little")
        header = json.loads(contents[8 : 8 + length])
        text = json.dumps(change(header) or header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + contents[8 + length :])

    return damage


def other_entry(**changes):
    return other_header(lambda header: header["transformer.ln_f.bias"].update(changes))


def without_entry(path):
    other_header(lambda header: header.update({"other": header.pop("transformer.ln_f.bias")}))(path)


@pytest.mark.parametrize(
    "damage,kind,message",
    [
        (cut, ValueError, r"model.safetensors is damaged or not .*, of [\d,]+ bytes: .*file not fully covered"),
        (
            lambda path: path.write_bytes(b"\xff" * 900),
            ValueError,
            "is damaged or not a safetensors file, of 900 bytes",
        ),
        (lambda path: path.unlink(), FileNotFoundError, "is missing: the weights of a 4-bit model"),
        (other_model("d_ff", 300), ValueError, "asks for a model of .*d_ff 300, but model.safetensors is of one of"),
        (other_model("num_layers", 1), ValueError, "num_layers 1, .* but model.safetensors is of one of"),
        (other_model("vocab_size", 511), ValueError, "vocab_size 511, num_layers 2"),
        (other_entry(dtype="U32"), ValueError, r"ln_f.bias in .* is uint32 \(64,\), but model.json asks for float32"),
        (other_entry(shape=[8, 8]), ValueError, r"is float32 \(8, 8\), but model.json asks for float32 \(64,\)"),
        (without_entry, ValueError, "has no tensor transformer.ln_f.bias; model.json does not belong to it"),
        (
            other_entry(dtype="BF16"),
            ValueError,
            "is damaged or not a safetensors file.*invalid shape, data type, or offset",
        ),
        (other_entry(data_offsets=[0, 256]), ValueError, "is damaged or not a safetensors file.*offset"),
        (
            other_entry(shape=[3]),
            ValueError,
            "is damaged or not a safetensors file.*invalid shape, data type, or offset",
        ),
        (other_header(lambda header: [1]), ValueError, "is damaged or not a safetensors file.*header"),
    ],
)
def test_damaged_directories(rounded, tmp_path, damage, kind, message):
    directory = tmp_path / "m"
    shutil.copytree(rounded[1], directory)
    damage(directory / "model.safetensors")
    with pytest.raises(kind, match=message):
        read_int4_directory(directory)


def test_other_conversions_refuse_a_rounded_model(rounded, capsys, tmp_path):
    assert main(["convert", f"--from={rounded[1]}", f"--to={tmp_path / 'hf'}"]) == 1
    assert "a 4-bit model is only for btlm generate and evaluate" in capsys.readouterr().err
    with pytest.raises(ValueError, match="has 4 bits already; leave out --int4"):
        load_for_generation(rounded[1], as_int4=True)
