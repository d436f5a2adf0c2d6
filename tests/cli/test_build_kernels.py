"""`btlm build-kernels`: what it says and where it writes; compiling itself is tests/kernels/test_build.py's."""

import json

import pytest

from btlm_jax.cli import main
from btlm_jax.kernels import build


@pytest.fixture
def built(monkeypatch):
    """Stand in for the compiler; return what was asked of it."""
    calls = []

    def build_ahead(directory, *, architecture):
        calls.append((directory, architecture))
        if architecture == "z80":
            raise OSError("c++ -march=z80 failed: bad value")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "kernels.so").write_bytes(b"12345")
        description = {"system": "linux-x", "command": ["c++", "-O3"], "instruction_sets": ["avx2", "fma"]}
        (directory / "kernels.json").write_text(json.dumps(description))
        return [directory / "kernels.so"]

    monkeypatch.setattr(build, "build_ahead", build_ahead)
    return calls


def test_it_says_what_was_built_with_what_and_for_which_cpu(built, tmp_path, capsys):
    assert main(["build-kernels", f"--directory={tmp_path / 'new'}", "--architecture=x86-64-v3"]) == 0
    assert built == [(tmp_path / "new", "x86-64-v3")]
    shown = capsys.readouterr().out
    assert f"{tmp_path / 'new' / 'kernels.so'}: 5 bytes for linux-x" in shown
    assert "compiled with: c++ -O3" in shown and "needs: avx2, fma" in shown
    assert "when they are in btlm_jax/kernels/prebuilt" in shown


def test_without_a_directory_they_go_into_the_package(built, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")
    assert main(["build_kernels"]) == 0
    assert built == [(tmp_path / "prebuilt", "native")]
    assert "this installation takes them from now on" in capsys.readouterr().out


def test_a_compiler_that_refuses_is_an_error(built, tmp_path, capsys):
    assert main(["build-kernels", f"--directory={tmp_path}", "--architecture=z80"]) == 1
    assert "c++ -march=z80 failed: bad value" in capsys.readouterr().err
