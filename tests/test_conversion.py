"""Conversions from end to end, and what is left when one fails."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from published_files import NAMES, ORACLES, oracle_array, oracle_weights, write_published, write_shards
from safetensors.numpy import load_file

from btlm_jax.cli import main
from btlm_jax.convert import conversion
from btlm_jax.convert.conversion import Conversion, convert
from btlm_jax.convert.native import read_model_directory, read_run
from btlm_jax.convert.prove import streamed_logits
from btlm_jax.convert.source import open_source
from btlm_jax.generate import GREEDY, generate


def make(source, target, **changes):
    options = {"format": "hf", "dtype": "float32", "pad_ffn": 1, "max_shard_bytes": 10**9} | changes
    lines = []
    proofs = convert(Conversion(source=source, target=target, **options), say=lines.append)
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


def test_an_imported_oracle_gives_the_logits_of_the_original(imported):
    name, directory = imported
    source = open_source(directory)
    for ids_T, expected_TV in zip(oracle_array(name, "input_ids"), oracle_array(name, "logits"), strict=True):
        np.testing.assert_allclose(source.logits(ids_T), expected_TV, atol=2e-5)
        np.testing.assert_allclose(streamed_logits(source.config, source.tensors, ids_T), expected_TV, atol=2e-5)


def test_an_imported_oracle_continues_as_the_original(imported):
    name, directory = imported
    native = read_model_directory(directory)
    greedy = oracle_array(name, "greedy")
    made = list(
        generate(
            native.facts.network(),
            native.params,
            native.mesh,
            prompts=[list(map(int, row[:16])) for row in greedy],
            num_tokens=24,
            sampling=GREEDY,
            seed=0,
            stop_id=-1,
            cache_dtype="float32",
        )
    )
    assert [[tokens[row] for tokens in made] for row in range(2)] == greedy[:, 16:].tolist()


def test_there_and_back_is_bit_identical(imported, tmp_path):
    name, native = imported
    exported, said = make(native, tmp_path / "hf")
    again, _ = make(exported, tmp_path / "native", format="native")
    assert "the written files" in said
    assert (native / "model.json").read_text() == (again / "model.json").read_text()
    weights = oracle_weights(name)
    assert load_file(exported / "model.safetensors").keys() == weights.keys()
    for key, array in load_file(exported / "model.safetensors").items():
        np.testing.assert_array_equal(array, weights[key])
    first, second = (read_model_directory(directory).params for directory in (native, again))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", conversion.DTYPES)
def test_a_run_becomes_a_directory_that_transformers_loads(monkeypatch, tiny_run, tmp_path, dtype):
    monkeypatch.setattr(conversion, "has_transformers", lambda: True)
    _, workdir = tiny_run
    exported, said = make(workdir, tmp_path / "hf", dtype=dtype, pad_ffn=64, max_shard_bytes=50_000)
    assert "transformers: largest difference" in said
    assert len(list(exported.glob("model-*-of-*.safetensors"))) > 1
    config = json.loads((exported / "config.json").read_text())
    assert (config["n_inner"], config["n_positions"], config["torch_dtype"]) == (64, 48, dtype)
    card = (exported / "README.md").read_text()
    assert "| steps | 10 |" in card and "held-out bits/byte" in card


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


def swap_gate_and_up(monkeypatch):
    shapes = conversion.HuggingFaceTensors.read

    def read(self, name):
        return shapes(self, name.replace("c_fc2.w", "c_fx.w").replace("c_fc.w", "c_fc2.w").replace("c_fx.w", "c_fc.w"))

    monkeypatch.setattr(
        conversion, "HuggingFaceTensors", type("Swapped", (conversion.HuggingFaceTensors,), {"read": read})
    )


def test_a_wrong_conversion_is_not_kept(monkeypatch, tmp_path):
    swap_gate_and_up(monkeypatch)
    with pytest.raises(ValueError, match="does not compute the same, so it was not kept: the written files: largest"):
        make(ORACLES / "tiny", tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_source_with_nan(tmp_path):
    weights = oracle_weights()
    weights["transformer.h.1.mlp.c_proj.weight"][0, 0] = np.nan
    source = write_published(tmp_path / "in", weights)
    with pytest.raises(ValueError, match="c_proj.weight of .* holds 1 values that are not finite"):
        make(source, tmp_path / "out", format="native")
    assert list(tmp_path.iterdir()) == [source]


def test_an_existing_target_is_left_alone(tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(FileExistsError, match="kept exists; delete it or give another --to"):
        make(ORACLES / "tiny", tmp_path / "kept")
    assert (tmp_path / "kept").read_text() == "mine"


def test_a_killed_conversion_leaves_nothing_under_the_name_and_the_next_one_works(tmp_path):
    code = "import sys, time; from btlm_jax.convert import conversion; "
    code += "conversion._prove_hf = lambda *a, **k: (print('written', flush=True), time.sleep(60)); "
    code += "from btlm_jax.cli import main; main(sys.argv[1:])"
    arguments = ["convert", f"--from={ORACLES / 'tiny'}", f"--to={tmp_path / 'hf'}"]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
    assert any(line == "written\n" for line in process.stdout)
    process.kill()
    process.communicate()
    assert [path.name for path in tmp_path.iterdir()] == [".hf.partial"]
    make(ORACLES / "tiny", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--to=x"], 2, "btlm convert needs --from=DIR"),
        (["--from=x"], 2, "btlm convert needs --to=DIR"),
        (["--from=x", "--to=y", "--format=onnx"], 2, "format='onnx' is not known; allowed are hf, native"),
        (["--from=x", "--to=y", "--dtype=int3"], 2, "dtype='int3' is not known"),
        (["--from=x", "--to=y", "--max_shard_gb=0"], 2, "max_shard_bytes=0 must be at least 1"),
        (["--from=nowhere", "--to=y"], 1, "nowhere holds no model: looked for checkpoints/"),
    ],
)
def test_wrong_command_lines(capsys, monkeypatch, tmp_path, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *arguments]) == code
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
