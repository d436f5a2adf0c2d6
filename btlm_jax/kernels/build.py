"""Compile the kernels with the machine's own C++ compiler, once a machine, and hand them to XLA."""

from __future__ import annotations

import atexit
import ctypes
import dataclasses
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

from btlm_jax.storage.files import cache_directory, write_atomically

_FOLDER = Path(__file__).parent
_HEADERS = ("lanes.h", "wide.h", "causal.h")
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-w", "-shared", "-fPIC")
_COMPILERS = ("c++", "g++", "clang++")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Library:
    """Kernels that are compiled together, as they are needed together."""

    name: str
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    slow_without: str


_GENERATION = _Library(
    name="kernels",
    sources=("matmul.cc", "attend.cc"),
    targets=("btlm_matmul", "btlm_matmul_int4", "btlm_matmul_int8", "btlm_attend"),
    slow_without="generation on this CPU is slow",
)
_TRAINING = _Library(
    name="training",
    sources=("causal_forward.cc", "causal_backward.cc"),
    targets=("btlm_causal_forward", "btlm_causal_backward"),
    slow_without="attention of training on this CPU takes up to twice as long",
)


@functools.cache
def has_kernels() -> bool:
    """Whether products and attention of generation run in the compiled kernels: on a CPU, where there is a compiler.

    Without them the same is computed by XLA, several times slower; one warning says why.
    """
    return _is_registered(_GENERATION)


@functools.cache
def has_training_kernels() -> bool:
    """Whether there are the compiled kernels of attention/cpu.py, as `has_kernels` has it."""
    return _is_registered(_TRAINING)


def _is_registered(library: _Library) -> bool:
    """Hand a library's kernels to XLA, if that can be."""
    if jax.default_backend() != "cpu":
        return False
    try:
        loaded = ctypes.CDLL(str(_compiled(library)))
    except OSError as error:
        logging.warning("%s, for its kernels cannot be compiled: %s", library.slow_without, error)
        return False
    for name in library.targets:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, name)), platform="cpu")
    return True


def _compiled(library: _Library) -> Path:
    """Return the shared library for this machine, compiled if it is not there, or not as it was when it was made.

    Raises:
      OSError: there is no compiler, or none that can compile it.
    """
    place, failures = _place(), []
    for compiler in _compilers():
        command = [compiler, *_FLAGS, _machine_flag()]
        path = place / f"{library.name}-{_fingerprint(command, library)}.so"
        seal = path.with_suffix(".sha256")
        if path.is_file() and seal.is_file() and seal.read_text() == _digest(path):
            return path
        print(f"compiling the kernels for this processor with {compiler}, once", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=place, prefix=".kernels-") as scratch:
            made = Path(scratch) / "kernels.so"
            sources = [str(_FOLDER / source) for source in library.sources]
            done = subprocess.run(
                [*command, f"-I{jax.ffi.include_dir()}", *sources, "-o", str(made)], capture_output=True, text=True
            )
            if done.returncode == 0:
                write_atomically(path, made.read_bytes())
                write_atomically(seal, _digest(path))
                return path
            said = done.stderr.strip().splitlines()
            failures.append(f"{' '.join(command)} failed: {next((x for x in said if 'error' in x), said[-1:])}")
    raise OSError("; ".join(failures))


def _place() -> Path:
    """Return where to keep the library: the user's cache, or, where nothing can be kept, until this process ends."""
    try:
        directory = cache_directory()
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError:
        directory = Path(tempfile.mkdtemp(prefix="btlm_jax-"))
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def _compilers() -> list[str]:
    named = [name for name in (os.environ.get("CXX", ""), *_COMPILERS) if name and shutil.which(name)]
    if not named:
        raise OSError(f"no C++ compiler was found (looked for $CXX, {', '.join(_COMPILERS)}); install g++ or clang")
    return list(dict.fromkeys(named))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _machine_flag() -> str:
    return "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"


def _fingerprint(command: list[str], library: _Library) -> str:
    """Return what changes with the sources, the compiler's command, the interface and the processor."""
    digest = hashlib.sha256(" ".join([*command, jax.lib.__version__, platform.machine()]).encode())
    for name in (*_HEADERS, *library.sources):
        digest.update((_FOLDER / name).read_bytes())
    processor = Path("/proc/cpuinfo")
    if processor.is_file():  # one home directory may serve different machines
        lines = processor.read_text().splitlines()
        digest.update("".join(sorted({x for x in lines if x.startswith(("model name", "flags", "Features"))})).encode())
    return digest.hexdigest()[:16]
