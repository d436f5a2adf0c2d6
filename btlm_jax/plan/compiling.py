"""Compile a step for a slice and keep what was read out of the result, because compiling takes minutes."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import time
from pathlib import Path

import jax

from btlm_jax.files import write_atomically
from btlm_jax.plan.chips import GIB, Chip
from btlm_jax.plan.executable import Collective, Executable, read_executable
from btlm_jax.program import Program, compiler_options


class DoesNotFitError(Exception):
    """The compiler needs more memory than a chip has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """What a compilation said: bytes of a device, and what its text says."""

    argument_bytes: int
    output_bytes: int
    alias_bytes: int  # outputs that take the place of donated arguments
    temporary_bytes: int
    code_bytes: int
    executable: Executable
    seconds: float  # that compiling took


def compile_step(
    program: Program, traced: jax.stages.Traced, *, topology: str, chip: Chip, state_bytes: int, cache: Path
) -> CompiledStep:
    """Compile a traced step, or read from `cache` what compiling the same program for the same slice said.

    Raises:
      DoesNotFitError: saying by how much; that is not kept.
    """
    kept = cache / f"{_key(traced, topology=topology, device=program.mesh.devices.flat[0])}.json"
    if kept.is_file():
        return _from_json(kept.read_text())
    began = time.monotonic()
    try:
        compiled = program.compile(traced)
    except jax.errors.JaxRuntimeError as error:
        raise DoesNotFitError(out_of_memory(str(error), state_bytes=state_bytes, chip=chip)) from error
    stats = compiled.memory_analysis()
    step = CompiledStep(
        argument_bytes=stats.argument_size_in_bytes,
        output_bytes=stats.output_size_in_bytes,
        alias_bytes=stats.alias_size_in_bytes,
        temporary_bytes=stats.temp_size_in_bytes,
        code_bytes=stats.generated_code_size_in_bytes,
        executable=read_executable(compiled.as_text(), num_devices=program.mesh.size),
        seconds=time.monotonic() - began,
    )
    cache.mkdir(parents=True, exist_ok=True)
    write_atomically(kept, json.dumps(dataclasses.asdict(step)))
    return step


def out_of_memory(message: str, *, state_bytes: int, chip: Chip) -> str:
    """Return how much is missing, from either form of the compiler's complaint: about everything, or a part.

    Raises:
      ValueError: it complains about something else.
    """
    if whole := re.search(r"Used ([\d.]+)G of ([\d.]+)G hbm", message):
        needed = float(whole[1])
    elif part := re.search(r"required for HLO (\w+) \(([\d.]+)G\) exceeds available HBM \([\d.]+G\)", message):
        needed = float(part[2]) + (state_bytes / GIB if part[1] == "temporaries" else 0)
    else:
        raise ValueError(f"the step does not compile for {chip.name}: {message.splitlines()[0][:500]}")
    available = chip.hbm_bytes / GIB
    return f"needs {needed:.2f} GiB of a chip's {available:.2f} GiB, {needed - available:.2f} GiB too much"


def _key(traced: jax.stages.Traced, *, topology: str, device: jax.Device) -> str:
    """Return a hash of all that decides the result: the program, the slice, the options and the compiler."""
    parts = {
        "program": traced.lower().as_text(),
        "topology": topology,
        "options": compiler_options(device),
        "environment": os.environ.get("LIBTPU_INIT_ARGS", ""),
        "versions": [importlib.metadata.version(name) for name in ("jaxlib", "libtpu")],
        "reader": Path(__file__).with_name("executable.py").read_text(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _from_json(text: str) -> CompiledStep:
    values = json.loads(text)
    read = values.pop("executable")
    collectives = tuple(Collective(**collective) for collective in read["collectives"])
    return CompiledStep(executable=Executable(collectives=collectives, num_cycles=read["num_cycles"]), **values)
