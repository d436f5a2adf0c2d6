"""`btlm generate` over a real run's checkpoint."""

import shutil

import pytest
from published_files import ORACLES

from btlm_jax.cli import main
from btlm_jax.convert.conversion import Conversion, convert
from btlm_jax.generate import GREEDY, continue_tokens
from btlm_jax.serve import load_for_text, printable


def continued(capsys, workdir, *flags) -> str:
    assert main(["generate", f"--checkpoint={workdir}", "--prompt=def f", "--num_tokens=12", *flags]) == 0
    return capsys.readouterr().out


def test_the_stream_is_the_prompt_and_its_continuation(capsys, tiny_run):
    _, workdir = tiny_run
    native = load_for_text(workdir)
    assert native.facts.notes["steps"] == "10"
    tokenizer = native.tokenizer
    prompt = [tokenizer.eos_id, *tokenizer.encode("def f")]
    options = {"prompt": prompt, "num_tokens": 12, "sampling": GREEDY, "seed": 0, "stop_id": tokenizer.eos_id}
    made = continue_tokens(native.facts.network(), native.params, native.mesh, **options)
    want = "def f" + printable(tokenizer.decode(made)) + "\n"
    assert continued(capsys, workdir, "--temperature=0") == want


def test_a_seed_gives_the_same_text(capsys, tiny_run):
    _, workdir = tiny_run
    first, again, other = (continued(capsys, workdir, "--temperature=2", f"--seed={seed}") for seed in (1, 1, 2))
    assert first == again != other


def test_a_save_in_progress_is_left_alone(capsys, tiny_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run[1], workdir, symlinks=True)
    unfinished = workdir / "checkpoints" / "11.orbax-checkpoint-tmp"
    unfinished.mkdir()
    continued(capsys, workdir)
    assert unfinished.is_dir()


def test_every_form_of_a_model_writes_the_same(capsys, tiny_run, tmp_path):
    _, workdir = tiny_run
    wanted = continued(capsys, workdir, "--temperature=0")
    for target, format in ((tmp_path / "hf", "hf"), (tmp_path / "native", "native")):
        options = {"dtype": "float32", "pad_ffn": 1, "max_shard_bytes": 10**9}
        convert(Conversion(source=workdir, target=target, format=format, **options), say=lambda line: None)
        assert continued(capsys, target, "--temperature=0") == wanted


@pytest.mark.parametrize(
    ("folder", "message"), [("", "holds no model: looked for"), ("checkpoints", "is no checkpoint in")]
)
def test_a_directory_without_a_model(capsys, tmp_path, folder, message):
    (tmp_path / folder).mkdir(exist_ok=True)
    assert main(["generate", f"--checkpoint={tmp_path}"]) == 1
    assert message in capsys.readouterr().err


def test_a_model_without_a_tokenizer(capsys):
    assert main(["generate", f"--checkpoint={ORACLES / 'tiny'}"]) == 1
    assert "holds no tokenizer, which text needs" in capsys.readouterr().err
