"""`btlm build-kernels`: compile the C++ kernels for CPUs ahead of their first use."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from btlm_jax.cli import DONE
from btlm_jax.cli.parse import Flags

BUILD_KERNELS_HELP = """btlm build-kernels: compile the C++ kernels for CPUs ahead, so that no run needs a compiler.

examples:  btlm build-kernels                                      for this CPU, inside the installed package
           btlm build-kernels --architecture=x86-64-v3             for any CPU with AVX2 and FMA
           btlm build-kernels --architecture=x86-64-v4 --directory=btlm_jax/kernels/prebuilt
               in a checkout, before pip wheel --no-deps --wheel-dir=dist . makes a wheel that carries them

Without this command the kernels are compiled when they are first used, for this CPU, into the user's cache. Those that
are inside the package are taken if they are of its sources and need no instructions that the CPU lacks; otherwise a
warning says why not. Kernels for other instructions may round otherwise: runs that must repeat each other to the bit
use the same. The compiler is CXX, or c++, g++ or clang++, whichever is there first.
"""


def build_kernels(arguments: Sequence[str]) -> int:
    """Run `btlm build-kernels`; return the exit code."""
    flags = build_kernels_flags()
    if not flags.parse(arguments):
        return DONE
    from btlm_jax.kernels.build import PREBUILT, build_ahead

    directory = flags.optional_path("directory") or PREBUILT
    start = time.perf_counter()
    paths = build_ahead(directory, architecture=flags.string("architecture"))
    seconds = time.perf_counter() - start
    for path in paths:
        description = json.loads(path.with_suffix(".json").read_text())
        print(f"{path}: {path.stat().st_size:,} bytes for {description['system']}")
        print(f"  compiled with: {' '.join(description['command'])}")
        print(f"  needs: {', '.join(description['instruction_sets'])}")
    print(f"{seconds:.1f} s; " + _taken(directory.resolve() == PREBUILT.resolve()))
    return DONE


def _taken(is_inside_package: bool) -> str:
    if is_inside_package:
        return "this installation takes them from now on"
    return "they are taken when they are in btlm_jax/kernels/prebuilt of an installed package"


def build_kernels_flags() -> Flags:
    """Define the flags of `btlm build-kernels`."""
    flags = Flags(BUILD_KERNELS_HELP)
    flags.define_string("directory", "", "where the libraries go; empty: inside the installed package")
    flags.define_string("architecture", "native", "what the compiler's -march takes (-mcpu on Arm)")
    return flags
