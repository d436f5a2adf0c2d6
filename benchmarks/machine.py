"""What a table was measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

_VECTORS = {"avx512_bf16": "AVX-512 with bfloat16", "avx512f": "AVX-512", "avx2": "AVX2"}  # the widest first


def machine(*packages: str) -> str:
    """Return the date, the processor, the memory and the versions of Python and of packages."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = "".join(f", {name} {importlib.metadata.version(name)}" for name in packages)
    return (
        f"{datetime.date.today()}, {processor()}, {os.cpu_count()} cores, {memory:.0f} GiB, "
        f"Python {platform.python_version()}{versions}"
    )


def processor() -> str:
    """Return the processor's name and what its vectors can do."""
    facts = dict(line.split(":", 1) for line in reversed(Path("/proc/cpuinfo").read_text().splitlines()) if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    vectors = [said for flag, said in _VECTORS.items() if flag in facts.get("flags", "").split()]
    return f"{facts.get('model name', platform.machine())} ({vectors[0] if vectors else 'no AVX2'})"


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16, without which PyTorch takes some hundred times longer."""
    return _VECTORS["avx512_bf16"] in processor()


def accelerator(device: str) -> str:
    """Return what to add for a GPU: its name."""
    if device == "cpu":
        return ""
    import torch

    return f", {torch.cuda.get_device_name()}"


def free_bytes(device: str) -> int:
    """Return the memory that is free on a device."""
    if device == "cpu":
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
    import torch

    return torch.cuda.mem_get_info()[0]
