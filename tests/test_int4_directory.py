"""4-bit models from end to end: converting, proving, loading, generating; and damaged ones."""

import json
import shutil

import jax
import numpy as np
import pytest
from published_files import NAMES, ORACLES, oracle_array
from tiny import tiny_config

from btlm_jax.cli import main
from btlm_jax.convert import to_int4
from btlm_jax.convert.conversion import Conversion, convert
from btlm_jax.convert.native import ModelFacts, one_device_mesh, write_model_directory
from btlm_jax.convert.prove import streamed_logits
from btlm_jax.convert.source import open_source
from btlm_jax.cpu import build, cache, tiles
from btlm_jax.cpu.decoder import CpuDecoder
from btlm_jax.loading import load_for_generation
from btlm_jax.model import init_params
from btlm_jax.quantize.directory import Int4Tensors, read_int4_directory
from btlm_jax.quantize.walk import Method, as_published, quantize_model


def make(source, target, **changes):
    options = {"dtype": "float32", "file_type": "F32", "pad_ffn": 1, "max_shard_bytes": 10**9, "method": "rtn"}
    lines, options = [], options | {"calibration": None} | changes
    proofs = convert(Conversion(source=source, target=target, format="int4", **options), say=lines.append)
    assert all(proof.holds for proof in proofs)
    return target, "\n".join(lines)


@pytest.fixture(scope="module", params=NAMES)
def rounded(request, tmp_path_factory):
    return request.param, make(ORACLES / request.param, tmp_path_factory.mktemp("int4") / "m")[0]


def decoded(model, weights, ids_BT, *, prefilled, cache_dtype="float32"):
    """The logits_BTV after positions prefilled - 1 and later: a prefill, then token by token."""
    decoder = CpuDecoder(model, weights, num_rows=len(ids_BT), num_slots=128, cache_dtype=cache_dtype)
    found = [decoder.prefill([row[:prefilled] for row in ids_BT])]
    for end in range(prefilled + 1, ids_BT.shape[1] + 1):
        found.append(decoder.decode([row[:end] for row in ids_BT]))
    return np.stack(found, axis=1)


@pytest.mark.parametrize("way", ["kernels", "XLA"])
@pytest.mark.parametrize("name", NAMES)
def test_decoding_on_a_cpu_gives_the_original_logits(name, way, monkeypatch):
    native = load_for_generation(ORACLES / name, as_int4=False)
    if way == "XLA":
        for module in (cache, tiles):
            monkeypatch.setattr(module, "has_kernels", lambda: False)
    ids_BT, expected = oracle_array(name, "input_ids")[:, :70], oracle_array(name, "logits")[:, 40:70]
    jax.clear_caches()  # both ways are compiled under one name
    found = decoded(native.facts.network(), native.params, ids_BT, prefilled=41)
    jax.clear_caches()
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("form", ["float32", "int4"])
def test_a_residual_multiplier_counts_once(tmp_path, form):
    config = tiny_config(mup__preset="completep", mup__base_num_layers=1, model__vocab_size=300)
    facts = ModelFacts(model=config.model, mup=config.mup, max_length=48, eos_id=0, tokenizer=None, notes={})
    params = init_params(facts.network(), one_device_mesh(), seed=5)
    assert facts.network().parametrization.residual_scale != 1
    write_model_directory(tmp_path / "m", facts=facts, params=params, tokenizer=None)
    ids_T = np.arange(40, 70)
    if form == "int4":
        make(tmp_path / "m", tmp_path / "int4")  # the proof compares
        return
    native = load_for_generation(tmp_path / "m", as_int4=False)
    found_BTV = decoded(native.facts.network(), native.params, ids_T[None], prefilled=3)
    np.testing.assert_allclose(found_BTV[0], open_source(tmp_path / "m").logits(ids_T)[2:], atol=2e-5)


def test_codes_come_back_as_they_were_rounded(rounded):
    name, directory = rounded
    source, stored = open_source(ORACLES / name), Int4Tensors(directory)
    made = quantize_model(
        source.config, source.tensors, method=Method.RTN, group_size=64, embedding_bits=8, calibration_BT=None,
        report=lambda name: None,
    )  # fmt: skip
    for tensor, value in made:
        np.testing.assert_array_equal(stored.read(tensor), as_published(tensor, value), err_msg=tensor)


def test_the_kernels_compute_what_the_codes_stand_for(rounded):
    name, directory = rounded
    model, ids_BT = read_int4_directory(directory), oracle_array(name, "input_ids")
    found = decoded(model.facts.network(), model.weights, ids_BT, prefilled=90)
    for row, ids_T in enumerate(ids_BT):
        expected_TV = streamed_logits(open_source(ORACLES / name).config, Int4Tensors(directory), ids_T)
        np.testing.assert_allclose(found[row], expected_TV[89:], atol=2e-5 * np.abs(expected_TV).max())


def test_an_int8_cache_is_near(rounded):
    name, directory = rounded
    model, ids_BT = read_int4_directory(directory), oracle_array(name, "input_ids")[:, :60]
    exact, near = (
        decoded(model.facts.network(), model.weights, ids_BT, prefilled=30, cache_dtype=dtype)
        for dtype in ("float32", "int8")
    )
    assert 0 < np.abs(exact - near).max() < 0.03 * np.abs(exact).max()


@pytest.mark.parametrize("method", ["gptq", "hqq"])
def test_a_run_writes_text_at_4_bits(capsys, tiny_run, tmp_path, method):
    _, workdir = tiny_run
    target, said = make(workdir, tmp_path / "m", method=method)
    assert f"{method}, groups of 64" in json.loads((target / "model.json").read_text())["notes"]["4 bits"]
    assert "the codes' values, and the kernels" in said
    texts = {}
    for name, flags in {"directory": [f"--checkpoint={target}"], "run": [f"--checkpoint={workdir}", "--int4"]}.items():
        assert main(["generate", *flags, "--prompt=def f", "--num_tokens=9", "--temperature=0"]) == 0
        texts[name] = capsys.readouterr().out
        assert texts[name].startswith("def f")
    if method == "hqq":
        assert texts["directory"] == texts["run"]


def test_a_text_to_calibrate_on(tiny_run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("def area(radius):\n    return 3.14159 * radius ** 2\n" * 200)
    _, workdir = tiny_run
    first, _ = make(workdir, tmp_path / "a", method="gptq", calibration=text)
    other, _ = make(workdir, tmp_path / "b", method="gptq")
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"method": "gptq"}, "is no training run: give --calibration=TEXTFILE, or --method=hqq"),
        ({"method": "gptq", "calibration": ORACLES / "README.md"}, "holds no tokenizer to read"),
        ({"method": "q4"}, "method='q4' is not known; allowed are rtn, hqq, gptq, awq"),
    ],
)
def test_refusals_leave_nothing(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make(ORACLES / "tiny", tmp_path / "m", **changes)
    assert not list(tmp_path.iterdir())


def test_a_short_text_is_refused(tiny_run, tmp_path):
    (tmp_path / "text.txt").write_text("too short")
    with pytest.raises(ValueError, match=r"text.txt has \d+ tokens; at least 512 are needed"):
        make(tiny_run[1], tmp_path / "m", method="gptq", calibration=tmp_path / "text.txt")


def test_the_proof_sees_a_wrong_kernel(tmp_path, monkeypatch):
    read = to_int4.read_int4_directory

    def wrong(directory):
        found = read(directory)
        vectors = found.weights.vectors
        vectors["down.bias"] = vectors["down.bias"] * 1.1
        return found

    monkeypatch.setattr(to_int4, "read_int4_directory", wrong)
    with pytest.raises(ValueError, match="does not compute the same.*the codes' values, and the kernels.*ABOVE"):
        make(ORACLES / "tiny", tmp_path / "m")
    assert not list(tmp_path.iterdir())


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def other_shape(path):
    path = path.parent / "model.json"
    values = json.loads(path.read_text())
    values["model"]["d_ff"] = 300
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    "damage,kind,message",
    [
        (cut, ValueError, r"model.safetensors is damaged: it has [\d,]+ bytes, not"),
        (lambda path: path.write_bytes(b"\xff" * 900), ValueError, "damaged or not a safetensors file"),
        (lambda path: path.unlink(), FileNotFoundError, "is missing: the weights of a 4-bit model"),
        (other_shape, ValueError, "but model.json asks for"),
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
    assert "its format is 'btlm_jax int4 model 1'" in capsys.readouterr().err


def test_kernels_are_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = build._compiled()
    made = first.stat().st_mtime_ns
    assert first.parent == tmp_path / "btlm_jax" and build._compiled().stat().st_mtime_ns == made
    assert [path.name for path in first.parent.iterdir()] == [first.name]


@pytest.mark.parametrize(
    "compiler,message",
    [("", "no C++ compiler was found"), ("#!/bin/sh\necho no room >&2; exit 1", "failed: ['no room']")],
)
def test_without_a_compiler_one_warning_says_so(tmp_path, monkeypatch, caplog, compiler, message):
    (tmp_path / "bin").mkdir()
    if compiler:
        (tmp_path / "bin" / "c++").write_text(compiler)
        (tmp_path / "bin" / "c++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    assert build.has_kernels.__wrapped__() is False
    assert message in caplog.text and not list((tmp_path / "cache").rglob("*.so"))
