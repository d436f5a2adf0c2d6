"""How the command starts: help at once, nothing imported that is not used, a reader that leaves early."""

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
    assert {name for name in modules if name.startswith("btlm_jax.")} == {"btlm_jax.cli", "btlm_jax.notices"}
    assert not modules & {*HEAVY, "absl", "ml_collections"}


@pytest.mark.parametrize("verb", ["train", "generate", "convert", "corpus", "tune", "plan", "configs", "build-kernels"])
def test_help_of_a_verb_imports_that_verb_only(verb):
    modules = imported(verb, "--help")
    others = {"train", "generate", "convert", "tune", "plan", "configs", "build_kernels"} - {verb.replace("-", "_")}
    if verb == "corpus":
        others -= {"train"}  # hands it what builds a store
    assert not modules & {f"btlm_jax.cli.{other}" for other in others}
    assert not modules & set(HEAVY)


def test_a_reader_that_leaves_early_causes_no_traceback():
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -m btlm_jax --help | true; echo $?"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("0\n", "")
