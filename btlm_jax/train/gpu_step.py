"""What is said at the start of a run on GPUs: how its steps are computed there."""

from __future__ import annotations

import os

import jax

from btlm_jax.attention.gpu import describe_attention
from btlm_jax.train.program import Program


def describe_gpu_step(program: Program) -> str:
    """Return by what attention a program's steps are computed on GPUs, and with which of XLA's options."""
    config, given = program.config, os.environ.get("XLA_FLAGS", "")
    with jax.set_mesh(program.mesh):
        attention = describe_attention(
            config.model, length=config.curriculum.table.block_len, has_documents=config.data.document_mask
        )
    options = " ".join(f"{name.removeprefix('xla_gpu_')}={value}".lower() for name, value in program.options.items())
    beside = f"; XLA_FLAGS has besides, or instead: {given}" if given else ""
    return f"Attention: {attention}\nXLA's options of the step, all xla_gpu_...: {options}{beside}"
