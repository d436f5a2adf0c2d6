"""Compile the kernels with the machine's own C++ compiler, once a machine, and hand them to XLA."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax

_FOLDER = Path(__file__).parent
_SOURCES = ("matmul.cc", "attend.cc")
_TARGETS = ("btlm_matmul", "btlm_matmul_int4", "btlm_matmul_int8", "btlm_attend")
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-w", "-shared", "-fPIC")
_COMPILERS = ("c++", "g++", "clang++")


@functools.cache
def has_kernels() -> bool:
    """Whether products and attention run in the compiled kernels: on a CPU, where there is a compiler.

    Without them the same is computed by XLA, several times slower; one warning says why.
    """
    if jax.default_backend() != "cpu":
        return False
    try:
        library = ctypes.CDLL(str(_compiled()))
    except OSError as error:
        logging.warning("generation on this CPU is slow, for its kernels cannot be compiled: %s", error)
        return False
    for name in _TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return True


def _compiled() -> Path:
    """Return the shared library for this machine, compiled if it is not there.

    Raises:
      OSError: there is no compiler, it failed, or the library cannot be written.
    """
    command = [_compiler(), *_FLAGS, _machine_flag()]
    path = cache_directory() / f"kernels-{_fingerprint(command)}.so"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".kernels-") as scratch:
        made = Path(scratch) / "kernels.so"
        sources = [str(_FOLDER / source) for source in _SOURCES]
        done = subprocess.run(
            [*command, f"-I{jax.ffi.include_dir()}", *sources, "-o", str(made)], capture_output=True, text=True
        )
        if done.returncode:
            raise OSError(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1:]}")
        os.replace(made, path)
    return path


def cache_directory() -> Path:
    """Return the user's own folder for what is made once a machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "btlm_jax"


def _compiler() -> str:
    for name in (os.environ.get("CXX", ""), *_COMPILERS):
        if name and shutil.which(name):
            return name
    raise OSError(f"no C++ compiler was found (looked for $CXX, {', '.join(_COMPILERS)}); install g++ or clang")


def _machine_flag() -> str:
    return "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"


def _fingerprint(command: list[str]) -> str:
    """Return what changes with the sources, the compiler's command, the interface and the processor."""
    digest = hashlib.sha256(" ".join([*command, jax.lib.__version__, platform.machine()]).encode())
    for name in ("lanes.h", *_SOURCES):
        digest.update((_FOLDER / name).read_bytes())
    processor = Path("/proc/cpuinfo")
    if processor.is_file():  # one home directory may serve different machines
        lines = processor.read_text().splitlines()
        digest.update("".join(sorted({x for x in lines if x.startswith(("model name", "flags", "Features"))})).encode())
    return digest.hexdigest()[:16]
