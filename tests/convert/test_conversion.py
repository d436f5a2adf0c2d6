"""Conversions from end to end, and what is left when one fails."""

import json
import os
import signal
import subprocess
import sys

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from support import llama_cpp
from support.published_files import NAMES, ORACLES, oracle_array, oracle_weights, write_published, write_shards

from btlm_jax import notices
from btlm_jax.cli import main
from btlm_jax.convert import conversion, to_gguf
from btlm_jax.convert import transformers_logits as logits_module
from btlm_jax.convert.conversion import Conversion, convert
from btlm_jax.convert.ggml import FILE_TYPES
from btlm_jax.convert.to_hf import cast_tensor, model_card
from btlm_jax.hub.gguf import GGUFFile
from btlm_jax.hub.native import read_model_directory, read_run
from btlm_jax.hub.numpy_network import streamed_logits
from btlm_jax.hub.published import read_published_config, tensor_shapes
from btlm_jax.hub.source import open_source
from btlm_jax.tokenizers.tokenizer import find_tokenizer


def make(source, target, **changes):
    options = {"format": "hf", "dtype": "float32", "file_type": "F32", "pad_ffn": 1, "max_shard_bytes": 10**9}
    options |= {"method": "rtn", "calibration": None} | changes
    lines = []
    proofs = convert(Conversion(source=source, target=target, **options), log=lines.append)
    assert all(proof.holds for proof in proofs)
    return target, "\n".join(lines)


@pytest.fixture(autouse=True)
def without_transformers(monkeypatch):
    """PyTorch takes seconds to start; the tests that want it say so."""
    monkeypatch.setattr(conversion, "has_transformers", lambda: False)


@pytest.fixture(scope="module", params=NAMES)
def imported(request, tmp_path_factory):
    target, _ = make(ORACLES / request.param, tmp_path_factory.mktemp("native") / "model", format="native")
    return request.param, target


@pytest.mark.slow
def test_an_imported_oracle_gives_the_logits_of_the_original(imported):
    name, directory = imported
    source = open_source(directory)
    for ids_T, expected_TV in zip(oracle_array(name, "input_ids"), oracle_array(name, "logits"), strict=True):
        np.testing.assert_allclose(source.logits(ids_T), expected_TV, atol=2e-5)
        np.testing.assert_allclose(streamed_logits(source.config, source.tensors, ids_T), expected_TV, atol=2e-5)


def test_the_likeliest_tokens_of_an_imported_oracle_are_the_original_s(imported):
    """By induction these are what greedy decoding makes, and that decoding is the whole pass is tested at generate."""
    name, directory = imported
    source = open_source(directory)
    for ids_T in oracle_array(name, "greedy"):
        assert source.logits(ids_T).argmax(-1)[15:-1].tolist() == ids_T[16:].tolist()


@pytest.mark.slow
def test_there_and_back_is_bit_identical(imported, tmp_path):
    name, native = imported
    exported, output = make(native, tmp_path / "hf")
    again, _ = make(exported, tmp_path / "native", format="native")
    assert "the written files" in output
    assert (native / "model.json").read_text() == (again / "model.json").read_text()
    weights = oracle_weights(name)
    assert load_file(exported / "model.safetensors").keys() == weights.keys()
    for key, array in load_file(exported / "model.safetensors").items():
        np.testing.assert_array_equal(array, weights[key])
    first, second = (read_model_directory(directory).params for directory in (native, again))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.slow
def test_a_run_becomes_a_directory_that_transformers_loads(monkeypatch, tiny_run, tmp_path):
    """In float32, test_a_run_goes_through_its_clients_and_back has transformers load it."""
    monkeypatch.setattr(conversion, "has_transformers", lambda: True)
    _, workdir = tiny_run
    exported, output = make(workdir, tmp_path / "hf", dtype="bfloat16", pad_ffn=64, max_shard_bytes=50_000)
    assert "transformers: largest difference" in output
    assert len(list(exported.glob("model-*-of-*.safetensors"))) > 1
    config = json.loads((exported / "config.json").read_text())
    assert (config["n_inner"], config["n_positions"], config["torch_dtype"]) == (64, 48, "bfloat16")
    card = (exported / "README.md").read_text()
    assert "| steps | 10 |" in card and "held-out bits/byte" in card


def test_what_transformers_computes_decides(monkeypatch, tmp_path):
    factor, lengths = 1.0, []

    def computed(directory, ids_T):
        lengths.append(len(ids_T))
        config = read_published_config(directory / "config.json")
        return factor * streamed_logits(config, conversion.HuggingFaceTensors(directory, config), ids_T)

    monkeypatch.setattr(conversion, "has_transformers", lambda: True)
    monkeypatch.setattr(conversion, "transformers_logits", computed)
    _, output = make(ORACLES / "tiny", tmp_path / "hf")
    assert "transformers: largest difference" in output
    make(ORACLES / "tiny", tmp_path / "half", dtype="bfloat16")
    assert lengths[0] > lengths[1] == 12
    factor = 1.001
    with pytest.raises(ValueError, match="does not compute the same, so it was not kept: transformers: largest"):
        make(ORACLES / "tiny", tmp_path / "wrong")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "half"}


def test_a_killed_process_of_transformers_is_said_and_not_what_it_said_before(monkeypatch, tmp_path):
    script = "echo a warning >&2; kill -9 $$"
    monkeypatch.setattr(logits_module, "module_command", lambda module: ["/bin/sh", "-c", script])
    with pytest.raises(OSError, match="with transformers was killed by SIGKILL, perhaps for its memory; nothing was"):
        logits_module.transformers_logits(tmp_path, np.arange(3))
    script = "echo a warning >&2; echo ValueError: no such layer >&2; exit 1"
    with pytest.raises(ValueError, match="cannot run the exported model in .*: ValueError: no such layer"):
        logits_module.transformers_logits(tmp_path, np.arange(3))


def test_a_model_card_has_the_dtype_beside_what_is_known_of_the_weights():
    config = read_published_config(ORACLES / "tiny" / "config.json")
    card = model_card(config, dtype="float16", notes={"weights": "average (ema)", "a|b": "1\n2"})
    assert all(f"\n{row}\n" in card for row in ("| dtype of the weights | float16 |", "| a/b | 1 2 |"))
    assert "| weights | average (ema) |" in card


def test_a_run_there_and_back_is_bit_identical(tiny_run, tmp_path):
    _, workdir = tiny_run
    exported, _ = make(workdir, tmp_path / "hf")
    back, _ = make(exported, tmp_path / "native", format="native")
    jax.tree.map(np.testing.assert_array_equal, read_run(workdir).params, read_model_directory(back).params)
    assert read_run(workdir).tokenizer.encode("def f") == read_model_directory(back).tokenizer.encode("def f")


def test_shards_come_in_and_go_out(tmp_path):
    exported, _ = make(write_shards(tmp_path / "in", oracle_weights()), tmp_path / "hf", max_shard_bytes=100_000)
    tensors = open_source(exported).tensors
    for name in tensors.shapes:
        np.testing.assert_array_equal(tensors.read(name), oracle_weights()[name])


def test_values_too_large_for_float16(tmp_path):
    weights = oracle_weights()
    weights["transformer.h.1.ln_2.bias"][3] = 1e5
    with pytest.raises(ValueError, match=r"transformer.h.1.ln_2.bias has values up to 1e\+05, too large for float16"):
        make(write_published(tmp_path / "in", weights), tmp_path / "hf", dtype="float16")


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (np.nan, "bfloat16", "tensor w holds 1 values that are not finite; it cannot be converted"),
        (-np.inf, "float32", "tensor w holds 1 values that are not finite; it cannot be converted"),
        (3.4e38, "bfloat16", r"tensor w has values up to 3.4e\+38, too large for bfloat16; use --dtype=float32"),
        (1e5, "float16", r"tensor w has values up to 1e\+05, too large for float16; use --dtype=bfloat16"),
    ],
)
def test_a_value_that_cannot_be_cast_is_named(value, dtype, message):
    array = np.array([1, value, 2], np.float32)
    tensors = type("Tensors", (), {"read": lambda self, name: array})()
    with pytest.raises(ValueError, match=message):
        cast_tensor(tensors, "w", array.shape, dtype, lambda name: None).make()


def swap_gate_and_up(monkeypatch):
    shapes = conversion.HuggingFaceTensors.read

    def read(self, name):
        return shapes(self, name.replace("c_fc2.w", "c_fx.w").replace("c_fc.w", "c_fc2.w").replace("c_fx.w", "c_fc.w"))

    monkeypatch.setattr(
        conversion, "HuggingFaceTensors", type("Swapped", (conversion.HuggingFaceTensors,), {"read": read})
    )


@pytest.mark.parametrize("format", ["hf", "jais"])
def test_a_wrong_conversion_is_not_kept(monkeypatch, tmp_path, format):
    swap_gate_and_up(monkeypatch)
    with pytest.raises(ValueError, match="does not compute the same, so it was not kept: the written files: largest"):
        make(ORACLES / "tiny", tmp_path / "out", format=format)
    assert list(tmp_path.iterdir()) == []


def llama_cpp_logits(path, ids_T):
    return llama_cpp.batch_logits(path, ids_T[None])[0]


def assert_as_the_source(source, path, ids_T):
    expected_TV = open_source(source).logits(ids_T)
    tolerance = 1e-5 * max(1, np.abs(expected_TV).max())
    np.testing.assert_allclose(llama_cpp_logits(path, ids_T), expected_TV, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["tiny", "tiny_sp"])
def test_an_oracle_becomes_a_gguf_that_llama_cpp_computes(tmp_path, name):
    path, output = make(ORACLES / name, tmp_path / "m.gguf", format="gguf", pad_ffn=256)
    assert_as_the_source(ORACLES / name, path, oracle_array(name, "input_ids")[0])
    assert "all 32 tensors read back" in output and "same likeliest token at 100.0 %" in output
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_a_model_directory_becomes_the_gguf_of_its_source(imported, tmp_path):
    name, native = imported
    if name == "tiny_pi_fix":
        with pytest.raises(ValueError, match="alibi_scaling=4 cannot be expressed in a Jais model"):
            make(native, tmp_path / "m.gguf", format="gguf")
        assert list(tmp_path.iterdir()) == []
        return
    options = {"format": "gguf", "file_type": "Q8_0", "pad_ffn": 32, "name": "a name", "context_length": 4096}
    from_native, _ = make(native, tmp_path / "m.gguf", **options)
    from_hf, _ = make(ORACLES / name, tmp_path / "from_hf.gguf", **options)
    keys = GGUFFile(from_native).keys
    assert (keys["general.name"], keys["jais.context_length"]) == ("a name", 4096)
    assert from_native.read_bytes() == from_hf.read_bytes()


@pytest.mark.parametrize("file_type", [*FILE_TYPES])
def test_every_file_type_is_proven(tmp_path, file_type):
    needs_256 = file_type.endswith(("_K", "_K_M"))
    source = wide_model(tmp_path / "in") if needs_256 else ORACLES / "tiny_sp"
    _, output = make(source, tmp_path / "m.gguf", format="gguf", file_type=file_type, pad_ffn=256 if needs_256 else 32)
    assert output.count("within the tolerance") == 2


def wide_model(directory):
    """A model of random weights whose rows are as long as the blocks of K-quants."""
    changes = {"n_embd": 256, "n_head": 4, "n_inner": 300, "n_layer": 1, "vocab_size": 128}
    changes |= {"bos_token_id": 7, "eos_token_id": 7}
    config = json.loads((ORACLES / "tiny" / "config.json").read_text()) | changes
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)
    shapes = tensor_shapes(read_published_config(directory / "config.json"))
    weights = {name: 0.1 * random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return write_published(directory, weights, **changes)


def test_a_run_becomes_a_gguf_that_llama_cpp_computes_with_its_ids(tiny_run, tmp_path):
    _, workdir = tiny_run
    path, output = make(workdir, tmp_path / "m.gguf", format="gguf", pad_ffn=256)
    tokenizer = read_run(workdir).tokenizer
    texts = ["def f(x):\n    return x", " two  spaces", "</s>", "\U0001f600"]
    assert llama_cpp.tokenize(path, texts) == [tokenizer.encode(text) for text in texts]
    assert_as_the_source(workdir, path, np.asarray(tokenizer.encode(texts[0] * 3)))
    assert "the file's tokenizer makes the same ids" in output


def test_a_run_becomes_a_jais_directory_whose_weights_compute_the_same(tiny_run, tmp_path):
    _, workdir = tiny_run
    directory, output = make(workdir, tmp_path / "jais", format="jais", pad_ffn=256, max_shard_bytes=50_000)
    assert "the written files: largest difference" in output
    config = json.loads((directory / "config.json").read_text())
    assert (config["model_type"], config["architectures"], config["n_inner"]) == ("jais", ["JAISLMHeadModel"], 256)
    assert config["tie_word_embeddings"] is True
    assert not {"auto_map", "alibi_scaling", "width_scale", "embeddings_scale"} & config.keys()
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    assert "lm_head.weight" in index and "transformer.relative_pe.slopes" not in index
    assert (directory / "tokenizer.json").is_file() and not list(directory.glob("*.py"))
    assert find_tokenizer(directory).encode("def f") == read_run(workdir).tokenizer.encode("def f")


def test_scores_over_the_root_are_folded_for_jais(tmp_path):
    directory, _ = make(ORACLES / "tiny_sp", tmp_path / "jais", format="jais", pad_ffn=32)
    assert json.loads((directory / "config.json").read_text())["mup_scale_qk_dot_by_d"] is True
    name, weights = "transformer.h.0.attn.c_attn.weight", oracle_weights("tiny_sp")
    folded, D = load_file(directory / "model.safetensors")[name], 64
    np.testing.assert_allclose(folded[:, :D], weights[name][:, :D] * 4, rtol=1e-6)  # heads of 16
    np.testing.assert_array_equal(folded[:, D:], weights[name][:, D:])


def spoil_blocks(monkeypatch, change):
    """Change the bytes of the second feed-forward matrix as they are written."""
    encode = to_gguf._encoded

    def spoiled(folded, entry):
        encoded = encode(folded, entry)
        return change(encoded) if entry.name == "blk.1.ffn_up.weight" else encoded

    monkeypatch.setattr(to_gguf, "_encoded", spoiled)


def flipped(encoded):
    encoded[7, 1] ^= 0x20  # a high bit of a block's scale
    return encoded


@pytest.mark.parametrize("file_type", ["F32", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("change", [flipped, lambda encoded: encoded[::-1].copy()], ids=["bit", "rows"])
def test_a_spoiled_gguf_is_not_kept(monkeypatch, tmp_path, file_type, change):
    if file_type == "F32" and change is flipped:
        change = lambda encoded: np.bitwise_xor(encoded, np.uint8(1))  # noqa: E731 the last bit of every byte
    spoil_blocks(monkeypatch, change)
    with pytest.raises(ValueError, match=r"is not the source, so it was not kept: in tensor blk.1.ffn_up.weight"):
        make(ORACLES / "tiny", tmp_path / "m.gguf", format="gguf", file_type=file_type, pad_ffn=32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file_type", ["F32", "Q4_0"])
@pytest.mark.parametrize(
    ("function", "wrong"),
    [
        ("add_head_count", lambda writer, count: writer.add_uint32("jais.attention.head_count", 2 * count)),
        ("add_max_alibi_bias", lambda writer, bias: writer.add_float32("jais.attention.max_alibi_bias", 7.0)),
        ("add_layer_norm_eps", lambda writer, value: writer.add_float32("jais.attention.layer_norm_epsilon", 1e-3)),
    ],
)
def test_a_gguf_with_a_wrong_key_is_not_kept(monkeypatch, tmp_path, function, wrong, file_type):
    monkeypatch.setattr(gguf.GGUFWriter, function, wrong)
    with pytest.raises(ValueError, match="does not compute the same, so it was not kept: the file's values"):
        make(ORACLES / "tiny", tmp_path / "m.gguf", format="gguf", file_type=file_type, pad_ffn=32)
    assert list(tmp_path.iterdir()) == []


def test_a_gguf_that_is_cut_short_is_not_kept(monkeypatch, tmp_path):
    def cut(path):
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size - 100)

    monkeypatch.setattr(to_gguf, "_sync", cut)
    with pytest.raises(ValueError, match="m.gguf is damaged or not a GGUF file"):
        make(ORACLES / "tiny", tmp_path / "m.gguf", format="gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_gguf_with_other_merges_is_not_kept(monkeypatch, tiny_run, tmp_path):
    add = gguf.GGUFWriter.add_token_scores
    monkeypatch.setattr(gguf.GGUFWriter, "add_token_scores", lambda self, scores: add(self, scores[::-1]))
    with pytest.raises(ValueError, match="llama.cpp would make other ids than the tokenizer: for "):
        make(tiny_run[1], tmp_path / "m.gguf", format="gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["jais", "gguf"])
def test_scaled_alibi_cannot_be_expressed(tmp_path, format):
    target = tmp_path / ("m.gguf" if format == "gguf" else "jais")
    with pytest.raises(ValueError, match="alibi_scaling=4 cannot be expressed in a Jais model"):
        make(ORACLES / "tiny_pi_fix", target, format=format)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(monkeypatch, tmp_path):
    def full(folded, entry):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(to_gguf, "_encoded", full)
    with pytest.raises(OSError, match="No space"):
        make(ORACLES / "tiny", tmp_path / "m.gguf", format="gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_gguf_package_is_named_before_anything_is_read(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main(["convert", "--from=nowhere", f"--to={tmp_path / 'm.gguf'}", "--format=gguf"]) == 1
    assert "-m pip install 'btlm_jax[gguf]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("format", "target"), [("native", "out"), ("jais", "out"), ("gguf", "m.gguf")])
def test_nothing_is_left_of_a_source_with_nan(tmp_path, format, target):
    weights = oracle_weights()
    weights["transformer.h.1.mlp.c_proj.weight"][0, 0] = np.nan
    source = write_published(tmp_path / "in", weights)
    with pytest.raises(ValueError, match="c_proj.weight of .* holds 1 values that are not finite"):
        make(source, tmp_path / target, format=format)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(("format", "target"), [("hf", "kept"), ("gguf", "kept.gguf")])
def test_an_existing_target_is_left_alone(tmp_path, format, target):
    (tmp_path / target).write_text("mine")
    with pytest.raises(FileExistsError, match=f"{target} exists; delete it or give another --to"):
        make(ORACLES / "tiny", tmp_path / target, format=format)
    assert (tmp_path / target).read_text() == "mine"
    (tmp_path / target).unlink()
    (tmp_path / target).symlink_to("nowhere")
    with pytest.raises(FileExistsError, match=f"{target} exists; delete it or give another --to"):
        make(ORACLES / "tiny", tmp_path / target, format=format)


STUCK = """
import os, sys, time
from btlm_jax.cli import main
from btlm_jax.convert import conversion
for target in sys.argv[2:]:
    if not os.fork():
        format = "gguf" if target.endswith(".gguf") else "hf"
        stuck = lambda *a, **k: (print("written", target, os.getpid(), flush=True), time.sleep(300))
        setattr(conversion, f"_prove_{format}", stuck)
        main(["convert", f"--from={sys.argv[1]}", f"--to={target}", f"--format={format}"])
while True:
    os.wait()
"""  # conversions that were written and do not end, each in a process


@pytest.mark.slow
def test_a_killed_conversion_leaves_nothing_under_the_name_and_the_next_one_works(tmp_path):
    targets = {"hf": tmp_path / "a" / "hf", "gguf": tmp_path / "b" / "m.gguf"}
    command = [sys.executable, "-c", STUCK, ORACLES / "tiny", *targets.values()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    pids = []
    while len(pids) < 2:
        assert (line := process.stdout.readline())
        if line.startswith("written "):
            pids.append(int(line.split()[-1]))
    before = sorted(tmp_path.rglob("*"))
    for format, target in targets.items():
        with pytest.raises(FileExistsError, match="is being made by another process; wait for it, or give another na"):
            make(ORACLES / "tiny", target, format=format)
    assert sorted(tmp_path.rglob("*")) == before
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    process.communicate()  # ends when it has no child
    for format, target in targets.items():
        assert {path.name for path in target.parent.iterdir()} == {f".{target.name}.partial", f".{target.name}.lock"}
        make(ORACLES / "tiny", target, format=format)
        assert [path.name for path in target.parent.iterdir()] == [target.name]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--to=x"], 2, "--from=DIR is needed"),
        (["--from=x"], 2, "--to=DIR is needed"),
        (["--from=x", "--to=y", "--format=onnx"], 2, "--format=onnx is not known; it may be hf, native, jais, gguf"),
        (["--from=x", "--to=y", "--format=gguf"], 2, "--to=y must be a file that ends in .gguf, as format=gguf"),
        (["--from=x", "--to=y.gguf"], 2, "--to=y.gguf must be a directory, not a .gguf file, as format=hf"),
        (
            ["--from=x", "--to=y.gguf", "--format=gguf", "--file_type=q4"],
            2,
            "--file_type=q4 is not known; it may be F32",
        ),
        (["--from=x", "--to=y", "--file_type=Q4_0"], 2, "--file_type has no effect on --format=hf; it is for gguf"),
        (["--from=x", "--to=y", "--format=native", "--pad_ffn=64"], 2, "it is for hf and jais and gguf"),
        (["--from=nowhere", "--to=y.gguf", "--format=gguf"], 1, "nowhere holds no model: looked for checkpoints/"),
        (["--from=x", "--to=y", "--dtype=int3"], 2, "--dtype=int3 is not known"),
        (["--from=x", "--to=y", "--max_shard_gb=0"], 2, "--max_shard_gb=0 must be above 0 and at most 1e9"),
        (["--from=x", "--to=y", "--max_shard_gb=inf"], 2, "--max_shard_gb=inf must be a finite number"),
        (["--from=x", "--to=y.gguf", "--format=gguf", "--context_length=-1"], 2, "context_length=-1 must be from 1"),
        (["--from=nowhere", "--to=y/z"], 1, "nowhere holds no model: looked for checkpoints/"),
        (["--from=nowhere", "--to=/dev/null/y"], 1, "there is a file where --to=/dev/null/y needs a folder: /dev/null"),
        (["--from=x", "--to=."], 1, ". exists; delete it or give another --to"),
        (
            ["--from=x", "--to=y", "--pad_ffn=9223372036854775807"],
            2,
            "pad_ffn=9223372036854775807 must be at most 65,536",
        ),
        (["--from=x", "--to=gs://bucket/y"], 2, "--to=gs://bucket/y is a URL; a path on this machine is needed"),
        (["--from=x", "--to=y", "--format=int4", "--calibration="], 2, "--calibration= is empty"),
        (["--from=x", "--to=y.gguf", "--format=gguf", "--name=\udce9"], 2, "name='\\udce9' is not valid Unicode"),
        (["--from=x", "--to=\udce9.gguf", "--format=gguf"], 2, "is not valid Unicode; give another --name"),
    ],
)
def test_wrong_command_lines(capsys, monkeypatch, tmp_path, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *arguments]) == code
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_proof_that_is_left_out_is_said(tmp_path):
    notices.begin(strict=())
    make(ORACLES / "tiny", tmp_path / "hf")
    assert notices.counts()["code-not-run"] == 1
    notices.begin(strict=["code-not-run"])
    with pytest.raises(notices.StrictError, match="so the model code was not run"):
        make(ORACLES / "tiny", tmp_path / "strict")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    notices.begin(strict=())
