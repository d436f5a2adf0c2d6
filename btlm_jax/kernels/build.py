"""Compile the C++ kernels, at first use or ahead, and hand them to XLA.

Where a library is looked for, in this order:

1. built ahead, in PREBUILT beside this file (`build_ahead`, which `btlm build-kernels` and the wheel's build call), if
   it is of these sources, this interface of XLA and instructions that this CPU has; if not, one warning says why
2. the user's cache, where step 3 keeps it, for this very processor
3. compiled now, for this processor, with the machine's own compiler: 10 to 20 seconds, once a machine

Kernels for other instructions may round otherwise (fused multiply-adds, the order of sums), so runs that must repeat
each other to the bit use kernels built for one architecture.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

from btlm_jax import ending_of, notices
from btlm_jax.storage.files import cache_directory, read_json_object, write_atomically

# Sizes that the sources and Python share; the sources are compiled with each as BTLM_<its name>.
TILE_OUTPUTS = 32  # outputs of a tile of weights (matmul.cc, tiles.py)
GROUP_INPUTS = 64  # inputs of a 4- or 8-bit matrix that share a scale (matmul.cc, tiles.py)
QUERY_TILE = 64  # queries whose scores are in the cache at a time (causal.h, attention/cpu.py)
HEAD_DIM_MULTIPLE = 16  # a head dim is padded to whole vectors of so many floats (causal.h, attention/cpu.py)

NATIVE = "native"  # the architecture of the CPU that compiles
_FOLDER = Path(__file__).parent
PREBUILT = _FOLDER / "prebuilt"
_HEADERS = ("simd.h", "wide.h", "causal.h")
_SIZES = {
    "TILE_OUTPUTS": TILE_OUTPUTS,
    "GROUP_INPUTS": GROUP_INPUTS,
    "QUERY_TILE": QUERY_TILE,
    "HEAD_DIM_MULTIPLE": HEAD_DIM_MULTIPLE,
}
_FLAGS = (
    *("-std=c++17", "-O3", "-fno-fast-math", "-fno-math-errno", "-fno-trapping-math", "-w", "-shared", "-fPIC"),
    *(f"-DBTLM_{name}={size}" for name, size in _SIZES.items()),
)
_COMPILERS = ("c++", "g++", "clang++")
_NO_COMPILER = f"no C++ compiler was found (looked for $CXX, {', '.join(_COMPILERS)}); install g++ or clang"
# Tried where a library does not load: a conda environment's libstdc++ may be older than the compiler's.
_WITH_OWN_LIBRARIES = ("-static-libstdc++", "-static-libgcc")
# What a compiler defines where it may use an instruction set, and the name of that set in /proc/cpuinfo.
_INSTRUCTION_SETS = {
    "__SSE3__": "pni", "__SSSE3__": "ssse3", "__SSE4_1__": "sse4_1", "__SSE4_2__": "sse4_2", "__POPCNT__": "popcnt",
    "__FMA4__": "fma4", "__XOP__": "xop", "__TBM__": "tbm",
    "__AVX__": "avx", "__AVX2__": "avx2", "__FMA__": "fma", "__F16C__": "f16c", "__BMI__": "bmi1", "__BMI2__": "bmi2",
    "__LZCNT__": "abm", "__MOVBE__": "movbe", "__ADX__": "adx", "__GFNI__": "gfni", "__AVXVNNI__": "avx_vnni",
    "__AVX512F__": "avx512f", "__AVX512BW__": "avx512bw", "__AVX512CD__": "avx512cd", "__AVX512DQ__": "avx512dq",
    "__AVX512VL__": "avx512vl", "__AVX512IFMA__": "avx512ifma", "__AVX512VBMI__": "avx512vbmi",
    "__AVX512VBMI2__": "avx512_vbmi2", "__AVX512VNNI__": "avx512_vnni", "__AVX512BITALG__": "avx512_bitalg",
    "__AVX512VPOPCNTDQ__": "avx512_vpopcntdq", "__AVX512BF16__": "avx512_bf16", "__AVX512FP16__": "avx512_fp16",
    "__ARM_FEATURE_ATOMICS": "atomics", "__ARM_FEATURE_DOTPROD": "asimddp", "__ARM_FEATURE_MATMUL_INT8": "i8mm",
    "__ARM_FEATURE_FP16_VECTOR_ARITHMETIC": "asimdhp", "__ARM_FEATURE_BF16_VECTOR_ARITHMETIC": "bf16",
    "__ARM_FEATURE_SVE": "sve", "__ARM_FEATURE_SVE2": "sve2",
}  # fmt: skip


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
    targets=(
        *("btlm_matmul", "btlm_matmul_int4", "btlm_matmul_int8"),
        *("btlm_scores", "btlm_scores_int4", "btlm_scores_int8", "btlm_attend"),
    ),
    slow_without="generation on this CPU is slow",
)
_TRAINING = _Library(
    name="training",
    sources=("causal_forward.cc", "causal_backward.cc", "elementwise.cc", "transpose.cc"),
    targets=(
        *("btlm_causal_forward", "btlm_causal_backward", "btlm_transpose"),
        *("btlm_swiglu_forward", "btlm_swiglu_backward", "btlm_cross_entropy"),
    ),
    slow_without="training on this CPU takes up to twice as long",
)


_digests: dict[str, str] = {}  # of the libraries that XLA has, by name


@functools.cache
def has_kernels() -> bool:
    """Whether products and attention of generation run in the compiled kernels: on a CPU, where there is a compiler.

    Without them the same is computed by XLA, several times slower; one warning says why.
    """
    return _is_registered(_GENERATION)


@functools.cache
def has_training_kernels() -> bool:
    """Whether the compiled kernels of training are there, under the same conditions as `has_kernels`."""
    return _is_registered(_TRAINING)


def multiplies_bfloat16() -> bool:
    """Whether training's products of bfloat16 are made by this CPU's instructions (docs/internals/cpu-kernels.md)."""
    return bool({"avx512_bf16", "amx_bf16"} & _cpu_instruction_sets()) and has_training_kernels()


def cpu_facts() -> dict[str, str]:
    """Return what of this CPU decides the last bits of sums: its threads, its instructions, and our kernels."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    instructions = sorted(_cpu_instruction_sets() & set(_INSTRUCTION_SETS.values()))
    return {
        "threads": str(count),  # XLA's pool has so many
        "instructions": " ".join(instructions) or platform.machine(),
        "training_kernels": _digests.get(_TRAINING.name, "none"),
    }


def build_ahead(directory: Path, *, architecture: str) -> list[Path]:
    """Compile all kernels into `directory`, each library beside a JSON file that says what it fits; return the paths.

    In PREBUILT, inside the package, they are found at run time; another directory is for whoever packages them.
    `architecture` is what the compiler's -march takes (-mcpu on Arm): "x86-64-v3", "x86-64-v4", or NATIVE. Existing
    files are replaced.

    Raises:
      OSError: there is no compiler, none that can compile for the architecture, or the directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    return [_build_ahead(library, directory, architecture=architecture) for library in (_GENERATION, _TRAINING)]


def _build_ahead(library: _Library, directory: Path, *, architecture: str) -> Path:
    path, failures = directory / f"{library.name}.so", []
    for words in _compilers():
        if not shutil.which(words[0]):
            continue
        command = _command(words, architecture=architecture)
        try:
            contents = _compile(command, library)
        except OSError as error:
            failures.append(str(error))
            continue
        description = {
            **_requirements(library),
            "architecture": architecture,
            "command": command,
            "instruction_sets": _instruction_sets(command),
            "sha256": hashlib.sha256(contents).hexdigest(),
        }
        write_atomically(path, contents)
        write_atomically(path.with_suffix(".json"), json.dumps(description, indent=1) + "\n")
        return path
    raise OSError("; ".join(failures) or _NO_COMPILER)


def _is_registered(library: _Library) -> bool:
    """Hand a library's kernels to XLA, if that can be."""
    if jax.default_backend() != "cpu":
        return False
    try:
        loaded = _load(library)
    except OSError as error:
        notices.report(
            "kernels-not-compiled", f"{library.slow_without}, for its kernels cannot be compiled or loaded: {error}"
        )
        return False
    _digests[library.name] = _digest(Path(loaded._name))[:16]
    for name in library.targets:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, name)), platform="cpu")
    return True


def _load(library: _Library) -> ctypes.CDLL:
    """Load a library built ahead if it fits, otherwise one that is compiled on this machine.

    Raises:
      OSError: it must be compiled, and cannot be.
    """
    path = PREBUILT / f"{library.name}.so"
    if path.is_file():
        try:
            _check_fits(path, library)
            return ctypes.CDLL(str(path))
        except OSError as error:
            notices.report("kernels-ignored", f"{path}, built ahead, is ignored: {error}")
    return _kept_or_compiled(library)


def _check_fits(path: Path, library: _Library) -> None:
    """Refuse a library built ahead that is not of these sources, or not for this interface, system or CPU.

    Raises:
      OSError: it is not, and what would fit.
    """
    try:
        description = read_json_object(path.with_suffix(".json"))
    except (OSError, ValueError) as error:
        raise OSError(f"its description cannot be read ({error}); run btlm build-kernels again") from error
    instruction_sets = description.get("instruction_sets")
    if not isinstance(instruction_sets, list) or not all(isinstance(name, str) for name in instruction_sets):
        raise OSError("its description does not say which instructions it needs; run btlm build-kernels again")
    for name, needed in _requirements(library).items():
        if description.get(name) != needed:
            raise OSError(f"it was built for {name} {description.get(name)}, and here is {needed}")
    here = _cpu_instruction_sets()
    if here and (lacking := sorted(set(instruction_sets) - here)):
        raise OSError(f"it was built for {description.get('architecture')}, and this CPU has no {', '.join(lacking)}")
    if description.get("sha256") != _digest(path):
        raise OSError("its contents are not those that were built; run btlm build-kernels again")


def _requirements(library: _Library) -> dict[str, str]:
    """Return what must be the same where a library is built and where it is used, beside the CPU's instructions."""
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for name in (*_HEADERS, *library.sources):
        digest.update((_FOLDER / name).read_bytes())
    header = (Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text()
    version = ".".join(re.findall(r"#define XLA_FFI_API_(?:MAJOR|MINOR) (\d+)", header))
    return {
        "sources": digest.hexdigest(),
        "xla_ffi_version": version,
        "system": f"{sys.platform}-{platform.machine()}",
    }


def _instruction_sets(command: list[str]) -> list[str]:
    """Return the instruction sets that a compiler's command may use, by their names in /proc/cpuinfo."""
    listing = subprocess.run(
        [*command, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True, check=True
    ).stdout
    defined = {line.split()[1] for line in listing.splitlines()}
    return sorted(name for macro, name in _INSTRUCTION_SETS.items() if macro in defined)


def _cpu_instruction_sets() -> set[str]:
    """Return what this CPU can do by /proc/cpuinfo; nothing where there is no such file (macOS)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {name for line in lines if line.startswith(("flags", "Features")) for name in line.split(":")[1].split()}


def _kept_or_compiled(library: _Library) -> ctypes.CDLL:
    """Load the library for this processor: of the compilers in their order the first one's that is kept, or is made.

    Raises:
      OSError: there is no compiler, or none whose library can be loaded.
    """
    try:
        cache, obstacle = cache_directory(), ""
    except OSError as error:
        cache, obstacle = None, str(error)
    failures, is_installed = [], False
    for words in _compilers():
        commands = [[*_command(words, architecture=NATIVE), *more] for more in ((), _WITH_OWN_LIBRARIES)]
        names = [f"{library.name}-{_fingerprint(command, library)}.so" for command in commands]
        for path in [cache / name for name in names] if cache else ():
            try:
                if _is_sealed(path):
                    return ctypes.CDLL(str(path))
            except FileNotFoundError:
                continue
            except OSError as error:  # such as one that another system's compiler left in a home that both share
                failures.append(str(error))
        if not shutil.which(words[0]):
            continue
        is_installed = True
        print(f"compiling the kernels for this processor with {' '.join(words)}, once", file=sys.stderr)
        for command, name in zip(commands, names, strict=True):
            try:
                contents = _compile(command, library)
            except OSError as error:
                failures.append(str(error))
                break
            try:
                return _keep_and_load(contents, name=name, cache=cache, obstacle=obstacle)
            except OSError as error:
                failures.append(str(error))
    if not is_installed:
        failures.insert(0, _NO_COMPILER)
    raise OSError("; ".join(dict.fromkeys(failures)))


def _keep_and_load(contents: bytes, *, name: str, cache: Path | None, obstacle: str) -> ctypes.CDLL:
    """Load a library that was compiled, from the user's cache or, where it cannot be kept there, a temporary folder.

    Raises:
      OSError: it cannot be loaded.
    """
    if cache is not None:
        path = cache / name
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(OSError):  # of one that does not load
                if _is_sealed(path):  # by another process meanwhile: a file that others have loaded stays as it is
                    return ctypes.CDLL(str(path))
            write_atomically(path, contents)
            write_atomically(_seal(path), hashlib.sha256(contents).hexdigest())
            return ctypes.CDLL(str(path))
        except OSError as error:  # a full or read-only disk, a quota, a file system without execution
            obstacle = str(error)
            with contextlib.suppress(OSError):
                _seal(path).unlink(missing_ok=True)
                path.unlink(missing_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="btlm_jax-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / name).write_bytes(contents)
    loaded = ctypes.CDLL(str(folder / name))
    notices.report("kernels-not-kept", f"compiled kernels are for this start only, set XDG_CACHE_HOME: {obstacle}")
    return loaded


def _is_sealed(path: Path) -> bool:
    """Return whether a kept library has the hash beside it.

    Raises:
      OSError: one of the two is not there, or cannot be read.
    """
    return _seal(path).read_bytes() == _digest(path).encode()


def _seal(path: Path) -> Path:
    """Return the file beside a kept library that has its hash."""
    return path.with_suffix(".sha256")


def _compile(command: list[str], library: _Library) -> bytes:
    """Return the contents of a library.

    Raises:
      OSError: the compiler refuses, with the first line that says why.
    """
    with tempfile.TemporaryDirectory(prefix="btlm_jax-kernels-") as scratch:
        output = Path(scratch) / "kernels.so"
        sources = [str(_FOLDER / source) for source in library.sources]
        process = subprocess.run(
            [*command, f"-I{jax.ffi.include_dir()}", *sources, "-o", str(output)], capture_output=True, text=True
        )
        if process.returncode == 0:
            return output.read_bytes()
    lines = process.stderr.strip().splitlines() or [ending_of(process.returncode)]
    raise OSError(f"{' '.join(command)} failed: {next((line for line in lines if 'error' in line), lines[-1])}")


def _compilers() -> list[list[str]]:
    """Return the words of the compilers' commands, installed or not: that of $CXX first."""
    own = shlex.split(os.environ.get("CXX", ""))
    if own and not shutil.which(own[0]):
        notices.report("compiler-not-found", f"CXX={os.environ['CXX']}: there is no {own[0]}; others are looked for")
    return [*([own] if own else []), *([name] for name in _COMPILERS if [name] != own)]


def _command(words: list[str], *, architecture: str) -> list[str]:
    flag = "-march" if platform.machine() in ("x86_64", "AMD64") else "-mcpu"
    return [*words, *_FLAGS, f"{flag}={architecture}"]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _fingerprint(command: list[str], library: _Library) -> str:
    """Return a hash of the sources, the compiler's command, XLA's interface and the processor: a name in the cache."""
    digest = hashlib.sha256(
        " ".join([*command, importlib.metadata.version("jaxlib"), *_requirements(library).values()]).encode()
    )
    processor = Path("/proc/cpuinfo")
    if processor.is_file():  # one home directory may serve different machines
        lines = processor.read_text().splitlines()
        digest.update("".join(sorted({x for x in lines if x.startswith(("model name", "flags", "Features"))})).encode())
    return digest.hexdigest()[:16]
