"""How the C++ kernels are built: once a processor, ahead for a named one, and what is said where they cannot be."""

import errno
import functools
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from btlm_jax import notices
from btlm_jax.kernels import build


def test_an_architecture_that_the_compiler_does_not_know_is_refused(tmp_path):
    with pytest.raises(OSError, match="-m(arch|cpu)=nothing failed: .*error"):
        build.build_ahead(tmp_path, architecture="nothing")


@pytest.mark.parametrize(
    "compiler,message",
    [("", "no C++ compiler was found"), ("#!/bin/sh\necho error: no room >&2; exit 1", "failed: error: no room")],
)
def test_without_a_compiler_a_warning_says_what_is_slow(tmp_path, monkeypatch, capsys, compiler, message):
    (tmp_path / "bin").mkdir()
    if compiler:
        (tmp_path / "bin" / "c++").write_text(compiler)
        (tmp_path / "bin" / "c++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    assert build.has_kernels.__wrapped__() is False and build.has_training_kernels.__wrapped__() is False
    said = capsys.readouterr().err
    assert "generation on this CPU is slow, " in said and "training on this CPU takes" in said
    assert said.count(message) == said.count("kernels-not-compiled") == 2 and not list(
        (tmp_path / "cache").rglob("*.so")
    )


@pytest.fixture(scope="module")
def compiled():
    """Let the compiler's work be what it has made for this CPU before; this is the list of what was asked for."""
    libraries = (build._GENERATION, build._TRAINING)
    kept = {library.name: Path(build._kept_or_compiled(library)._name).read_bytes() for library in libraries}
    asked = []

    def copy(command, library):
        assert command == build._command(["c++"], architecture=build.NATIVE)
        asked.append(library.name)
        return kept[library.name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_compile", copy)
        yield asked


def test_kernels_are_compiled_once(tmp_path, monkeypatch, compiled):
    compiled.clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = kept()
    written = first.stat().st_mtime_ns
    assert first.parent == tmp_path / "cache" / "btlm_jax" and kept().stat().st_mtime_ns == written
    assert {path.name for path in first.parent.iterdir()} == {first.name, first.with_suffix(".sha256").name}
    assert compiled == ["kernels"]
    contents = first.read_bytes()
    first.unlink()  # not written over, as it is loaded
    first.write_bytes(contents[:1000])  # as a power cut may leave it
    assert kept() == first and first.read_bytes() == contents
    assert compiled == ["kernels"] * 2
    build._seal(first).write_bytes(b"\xff")
    assert kept() == first and compiled == ["kernels"] * 3
    monkeypatch.setenv("PATH", "")  # no compiler any more
    assert kept() == first and compiled == ["kernels"] * 3


def test_a_library_of_another_system_is_compiled_anew(tmp_path, monkeypatch, compiled):
    """As in a home that a container with a newer libc shares."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "first"))
    name = kept().name
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second"))
    path = tmp_path / "second" / "btlm_jax" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"of another system")
    build._seal(path).write_text(build._digest(path))
    assert kept() == path and path.read_bytes() == (tmp_path / "first" / "btlm_jax" / name).read_bytes()


def test_a_library_that_another_process_has_made_meanwhile_is_loaded_and_not_replaced(tmp_path, monkeypatch, compiled):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "first"))
    theirs, copy = kept(), build._compile
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second"))
    path = tmp_path / "second" / "btlm_jax" / theirs.name

    def compile_beside_another(command, library):
        path.parent.mkdir(parents=True)
        path.write_bytes(theirs.read_bytes())
        build._seal(path).write_text(build._digest(path))
        inodes.append(path.stat().st_ino)
        return copy(command, library)

    inodes = []
    monkeypatch.setattr(build, "_compile", compile_beside_another)
    assert kept() == path and [path.stat().st_ino] == inodes


def kept() -> Path:
    """Load the kernels of generation; return the file that they are loaded from."""
    return Path(build._kept_or_compiled(build._GENERATION)._name)


def test_a_library_that_does_not_load_is_linked_with_the_compilers_own(tmp_path, monkeypatch, compiled):
    """As where the libstdc++ of a conda environment is older than the compiler's."""
    commands, copy = [], build._compile

    def make(command, library):
        commands.append(command)
        usual = [word for word in command if word not in build._WITH_OWN_LIBRARIES]
        return copy(usual, library) if command != usual else b"needs GLIBCXX_3.4.32"

    monkeypatch.setattr(build, "_compile", make)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = kept()
    assert commands == [commands[0], [*commands[0], *build._WITH_OWN_LIBRARIES]]
    assert {path.name for path in first.parent.iterdir()} == {first.name, first.with_suffix(".sha256").name}
    assert kept() == first and len(commands) == 2


def test_a_compiler_may_have_arguments_and_one_that_is_not_there_is_said(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "c++ -DX=1")
    assert build._command(build._compilers()[0], architecture="x")[:2] == ["c++", "-DX=1"]
    assert build._compilers()[1:] == [["c++"], ["g++"], ["clang++"]] and not capsys.readouterr().err
    monkeypatch.setenv("CXX", "nothing-such -m64")
    assert build._compilers()[0] == ["nothing-such", "-m64"]
    assert "there is no nothing-such; others are looked for (compiler-not-found)" in capsys.readouterr().err


def test_other_sources_are_compiled_anew(tmp_path, monkeypatch):
    fingerprint = functools.partial(build._fingerprint, library=build._GENERATION)
    before = fingerprint(["c++"])
    shutil.copytree(build._FOLDER, tmp_path / "sources", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(build, "_FOLDER", tmp_path / "sources")
    assert fingerprint(["c++"]) == before != fingerprint(["c++", "-O2"])
    with open(tmp_path / "sources" / "attend.cc", "a") as file:
        file.write("// other\n")
    assert fingerprint(["c++"]) != before


@pytest.mark.parametrize("obstacle", ["no such folder", "no home directory", "No space left on device"])
def test_where_nothing_can_be_kept_the_kernels_last_as_long_as_the_process(
    tmp_path, monkeypatch, capsys, compiled, obstacle
):
    home = {"no such folder": "/proc/nothing", "no home directory": ""}.get(obstacle, str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.setattr(build.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    if home == str(tmp_path):

        def fail(path, contents):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(build, "write_atomically", fail)
    notices.begin(strict=())
    path = kept()
    assert path.parent.name.startswith("btlm_jax-") and notices.counts() == {"kernels-not-kept": 1}
    assert obstacle in (said := capsys.readouterr().err) or "/proc/nothing" in said
    assert not list(tmp_path.rglob("*.so"))
    shutil.rmtree(path.parent)


@pytest.fixture(scope="module")
def built_once(tmp_path_factory, compiled):
    return build.build_ahead(tmp_path_factory.mktemp("prebuilt"), architecture=build.NATIVE)


@pytest.fixture
def built_ahead(built_once, monkeypatch):
    """Kernels built ahead for this CPU, where they are looked for; compiling anything else fails the test."""
    monkeypatch.setattr(build, "PREBUILT", built_once[0].parent)
    monkeypatch.setattr(build, "_kept_or_compiled", lambda library: pytest.fail(f"{library.name} was compiled again"))
    return built_once


def test_kernels_built_ahead_are_loaded_without_a_compiler(built_ahead, monkeypatch):
    assert [path.name for path in built_ahead] == ["kernels.so", "training.so"]
    monkeypatch.setenv("PATH", "")
    for library in (build._GENERATION, build._TRAINING):
        loaded = build._load(library)
        assert loaded._name == str(build.PREBUILT / f"{library.name}.so")
        assert all(hasattr(loaded, target) for target in library.targets)


def test_kernels_built_ahead_that_do_not_fit_are_ignored_with_one_line(built_ahead, monkeypatch, capsys):
    path = built_ahead[1]
    description = json.loads(path.with_suffix(".json").read_text())
    assert "avx2" in description["instruction_sets"] or build.platform.machine() != "x86_64"
    monkeypatch.setattr(build, "_kept_or_compiled", lambda library: None)
    cases = {
        "this CPU has no avx9000": {"instruction_sets": ["avx9000"]},
        "built for sources 12": {"sources": "12"},
        "built for xla_ffi_version 9.9, and here is 0": {"xla_ffi_version": "9.9"},
        "built for system plan9-mips": {"system": "plan9-mips"},
        "not those that were built": {"sha256": "0"},
    }
    for message, changes in cases.items():
        notices.begin(strict=())
        path.with_suffix(".json").write_text(json.dumps(description | changes))
        build._load(build._TRAINING)
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and message in said and f"{path}, built ahead, is ignored" in said
        assert notices.counts() == {"kernels-ignored": 1}
    path.with_suffix(".json").unlink()
    build._load(build._TRAINING)
    assert "its description cannot be read" in capsys.readouterr().err


def test_an_architecture_names_the_instructions_that_it_needs():
    if build.platform.machine() != "x86_64":
        pytest.skip("names of x86-64")
    needs = {
        name: set(build._instruction_sets(build._command(["c++"], architecture=name)))
        for name in ("x86-64", "x86-64-v3", "x86-64-v4", build.NATIVE)
    }
    assert not needs["x86-64"] and {"avx2", "fma", "f16c", "bmi2"} <= needs["x86-64-v3"] < needs["x86-64-v4"]
    assert needs[build.NATIVE] <= build._cpu_instruction_sets()  # every name is the kernel's


def test_sizes_have_one_home():
    """The sources take the sizes that they share with Python from the command, and define none of them."""
    text = "".join(path.read_text() for path in build._FOLDER.iterdir() if path.suffix in (".cc", ".h"))
    for name, size in build._SIZES.items():
        assert f"-DBTLM_{name}={size}" in build._command(["c++"], architecture=build.NATIVE)
        assert f"BTLM_{name}" in text, name
    assert not re.findall(r"# *(?:define|ifdef|ifndef|if).*BTLM_", text)
