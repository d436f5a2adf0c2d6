"""How the command starts: help at once, nothing imported that is not used, a reader that leaves early."""

import os
import subprocess
import sys

import pytest
from support.tiny import REPOSITORY

HEAVY = ("jax", "flax", "orbax", "grain", "numpy", "fsspec", "matplotlib", "ftfy", "tiktoken", "sentencepiece", "torch")


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)


def imported(*arguments: str) -> set[str]:
    """Return the modules that are in memory after a command in a process of its own."""
    code = (
        "import sys; before = set(sys.modules); from btlm_jax.cli import main\n"
        f"assert main({list(arguments)}) == 0\n"
        "print(); print('MODULES', *(set(sys.modules) - before))"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_help_imports_no_verb():
    modules = imported("--help")
    assert {name for name in modules if name.startswith("btlm_jax.")} == {
        *("btlm_jax.cli", "btlm_jax.notices", "btlm_jax.stopping")
    }
    assert not modules & {*HEAVY, "absl", "ml_collections"}


@pytest.mark.parametrize(
    "verb", ["train", "generate", "evaluate", "convert", "corpus", "tune", "plan", "configs", "build-kernels"]
)
def test_help_of_a_verb_imports_that_verb_only(verb):
    modules = imported(verb, "--help")
    others = {"train", "generate", "evaluate", "convert", "tune", "plan", "configs", "build_kernels"} - {
        verb.replace("-", "_")
    }
    if verb == "corpus":
        others -= {"train"}  # hands it what builds a store
    assert not modules & {f"btlm_jax.cli.{other}" for other in others}
    assert not modules & set(HEAVY)


@pytest.mark.parametrize("arguments", [["--help"], ["configs"], ["generate", "--help"], ["corpus", "build", "--help"]])
def test_a_reader_that_leaves_early_ends_the_command_quietly(arguments):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "btlm_jax", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) in ((0, ""), (141, ""))


def test_a_full_output_is_named():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "btlm_jax", "--help"]
        done = subprocess.run(command, cwd=REPOSITORY, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    said = "btlm: error: standard output cannot be written: [Errno 28] No space left on device\n"
    assert (done.returncode, done.stderr) == (1, said)
