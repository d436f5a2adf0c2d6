"""`btlm generate` over a real run's checkpoint."""

import shutil

import pytest

from btlm_jax.cli import main
from btlm_jax.generate import GREEDY, continue_tokens
from btlm_jax.serve import load_trained, printable


def continued(capsys, workdir, *flags) -> str:
    assert main(["generate", f"--checkpoint={workdir}", "--prompt=def f", "--num_tokens=12", *flags]) == 0
    return capsys.readouterr().out


def test_the_stream_is_the_prompt_and_its_continuation(capsys, tiny_run):
    _, workdir = tiny_run
    trained = load_trained(workdir)
    assert trained.step == 10
    tokenizer = trained.tokenizer
    prompt = [tokenizer.eos_id, *tokenizer.encode("def f")]
    options = {"prompt": prompt, "num_tokens": 12, "sampling": GREEDY, "seed": 0, "stop_id": tokenizer.eos_id}
    made = continue_tokens(trained.model, trained.params, trained.mesh, **options)
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


@pytest.mark.parametrize("empty", [False, True])
def test_a_directory_without_checkpoints(capsys, tmp_path, empty):
    if empty:
        (tmp_path / "checkpoints").mkdir()
    assert main(["generate", f"--checkpoint={tmp_path}"]) == 1
    assert f"there is no checkpoint in {tmp_path}" in capsys.readouterr().err
