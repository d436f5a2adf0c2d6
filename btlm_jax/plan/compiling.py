"""Compile a step for a slice, and cache what is read from the executable: compiling takes minutes."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import json
import os
import re
import time
from pathlib import Path

import jax

from btlm_jax.plan.chips import GIB, Chip
from btlm_jax.plan.executable import Collective, Executable, Operation, read_executable
from btlm_jax.plan.gpus import Gpu, has_cuda_plugin
from btlm_jax.storage.files import cache_directory, hash_json, read_json_object, write_atomically
from btlm_jax.train.flops import compiler_options
from btlm_jax.train.program import Program


class DoesNotFitError(Exception):
    """The compiler needs more memory than a chip has."""

    def __init__(self, *, program: str, needed: int, available: int):
        super().__init__(
            f"needs {needed / GIB:.2f} GiB of a chip's {available / GIB:.2f} GiB, {(needed - available) / GIB:.2f} GiB "
            "too much"
        )
        self.program, self.needed, self.available = program, needed, available


class NoCompilationsLeftError(Exception):
    """A step is not in the cache, and the allowed number of compilations has been made."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """Result of a compilation: bytes of one device, and what the executable's text says."""

    program: str  # cache key: a hash of everything that the result depends on
    argument_bytes: int
    output_bytes: int
    alias_bytes: int  # outputs that reuse donated arguments
    temporary_bytes: int
    code_bytes: int
    executable: Executable
    seconds: float  # of compiling


def default_cache() -> Path:
    """Return the directory of compilations, and of steps measured in one's own runs, where --cache names no other.

    Raises:
      OSError: the user has no home directory.
    """
    return cache_directory() / "plan"


@dataclasses.dataclass(kw_only=True)
class CompileCache:
    """A directory of results of compilations, "does not fit" included, and how many more may be made."""

    directory: Path
    max_compiles: float  # math.inf: as many as needed
    measured: Path | None = None  # directory of steps measured in runs of one's own, which correct its plans
    num_compiled: int = 0
    seconds: float = 0.0  # of those compilations

    def compile_step(
        self, program: Program, traced: jax.stages.Traced, *, topology: str, chip: Chip | Gpu, state_bytes: int
    ) -> CompiledStep:
        """Compile a traced step, or read the cached result of the same program for the same slice.

        Raises:
          DoesNotFitError: saying by how much.
          NoCompilationsLeftError: it is not cached, and `max_compiles` have been made.
          ValueError: the compiler complains about something other than memory.
        """
        key = _key(traced, topology=topology, chip=chip, device=program.mesh.devices.flat[0])
        cached = self.directory / f"{key}.json"
        if not cached.is_file():
            if self.num_compiled >= self.max_compiles:
                raise NoCompilationsLeftError(f"--max_compiles={self.max_compiles} compilations have been made")
            self._compile(program, traced, chip=chip, state_bytes=state_bytes, path=cached)
        values = read_json_object(cached)
        if "needed_bytes" in values:
            raise DoesNotFitError(program=key, needed=values["needed_bytes"], available=chip.hbm_bytes)
        return CompiledStep(program=key, executable=_executable(values.pop("executable")), **values)

    def outlook(self, *, layouts: int, phases: int) -> str:
        """Return how many compilations remain, and an estimate of their minutes, for layouts not yet tried."""
        most = min(layouts * phases, self.max_compiles - self.num_compiled)
        if not self.num_compiled:
            return f"at most {most:.0f} compilations to go"
        minutes = most * self.seconds / self.num_compiled / 60
        return f"{self.num_compiled} compilations made, at most {most:.0f} to go, about {minutes:.0f} min"

    def _compile(
        self, program: Program, traced: jax.stages.Traced, *, chip: Chip | Gpu, state_bytes: int, path: Path
    ) -> None:
        began = time.monotonic()
        self.num_compiled += 1
        try:
            compiled = program.compile(traced)
        except jax.errors.JaxRuntimeError as error:
            result = {"needed_bytes": needed_bytes(str(error), state_bytes=state_bytes, chip=chip)}
        else:
            stats, text = compiled.memory_analysis(), compiled.as_text()
            assert stats is not None and text is not None, "libtpu and the CUDA plugin give both"
            result = {
                "argument_bytes": stats.argument_size_in_bytes,
                "output_bytes": stats.output_size_in_bytes,
                "alias_bytes": stats.alias_size_in_bytes,
                "temporary_bytes": stats.temp_size_in_bytes,
                "code_bytes": stats.generated_code_size_in_bytes,
                "executable": dataclasses.asdict(read_executable(text, num_devices=program.mesh.size)),
                "seconds": time.monotonic() - began,
            }
        self.seconds += time.monotonic() - began
        self.directory.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(result))


def needed_bytes(message: str, *, state_bytes: int, chip: Chip | Gpu) -> int:
    """Return the bytes needed, from either form of the compiler's out-of-memory message: the whole, or a part.

    Raises:
      ValueError: the message is about something else.
    """
    if whole := re.search(r"Used ([\d.]+)G of ([\d.]+)G hbm", message):
        return int(float(whole[1]) * GIB)
    if part := re.search(r"required for HLO (\w+) \(([\d.]+)G\) exceeds available HBM \([\d.]+G\)", message):
        return int(float(part[2]) * GIB) + (state_bytes if part[1] == "temporaries" else 0)
    raise ValueError(f"the step does not compile for {chip.name}: {' '.join(message.split())[:1000]}")


def compiler_versions() -> dict[str, str]:
    """Return the versions of the packages that compile for TPUs."""
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}


def versions_for(chip: Chip | Gpu) -> dict[str, str]:
    """Return the versions of the packages that compile for a chip, or for a GPU that only trace where no plugin is."""
    if not isinstance(chip, Gpu):
        return compiler_versions()
    plugin = ("jax-cuda13-plugin", "nvidia-cudnn-cu13") if has_cuda_plugin() else ()
    return {name: _version(name) for name in ("jax", "jaxlib", *plugin)}


def _version(package: str) -> str:
    """Return the version of an installed package; of one that the system brings, as cuDNN of a container, only that."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "the system's"


def _key(traced: jax.stages.Traced, *, topology: str, chip: Chip | Gpu, device: jax.Device) -> str:
    """Return a hash of everything that the result depends on: program, slice, options, compiler, and our reader."""
    variable = "XLA_FLAGS" if isinstance(chip, Gpu) else "LIBTPU_INIT_ARGS"
    parts = {
        "program": program_text(traced),
        "topology": topology,
        "options": compiler_options(device),
        "environment": os.environ.get(variable, ""),
        "versions": versions_for(chip),
        "reader": ast.dump(ast.parse(Path(__file__).with_name("executable.py").read_text())),  # not its layout
    }
    return hash_json(parts)[:32]


def program_text(traced: jax.stages.Traced) -> str:
    """Return a traced step as StableHLO, without source locations (kernels carry them; nothing depends on them)."""
    name = "jax_traceback_in_locations_limit"
    limit = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        return traced.lower().as_text()
    finally:
        jax.config.update(name, limit)


def _executable(values: dict) -> Executable:
    collectives = tuple(
        Collective(**{**collective, "groups": tuple(map(tuple, collective["groups"]))})
        for collective in values["collectives"]
    )
    return Executable(
        collectives=collectives, operations=tuple(Operation(**operation) for operation in values["operations"])
    )
