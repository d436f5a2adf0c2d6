"""The whole train step lowered and exported for CUDA, on simulated CPU devices: its text is read, nothing compiled."""

import dataclasses
import re
import types

import jax
import numpy as np
import pytest
from jax import export
from support.attention import CUDNN
from support.tiny import tiny_config

from btlm_jax.parallel.make_mesh import make_run_mesh
from btlm_jax.parallel.mesh import batch_sharding
from btlm_jax.train.flops import compiler_options
from btlm_jax.train.gpu_step import describe_gpu_step
from btlm_jax.train.program import make_program
from btlm_jax.train.step import abstract_batch

FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
LENGTHS = (36, 72)  # no width of a head
LAYOUTS = {
    "fsdp 8": dict(mesh__tensor=1, mesh__context=1),
    "fsdp 2 x context 2 x tensor 2": dict(mesh__tensor=2, mesh__context=2),
}


@pytest.fixture
def hopper(monkeypatch):
    """Let JAX and the package believe that Hopper GPUs and cuDNN 9.10 are here, as far as lowering asks."""
    monkeypatch.setattr(f"{CUDNN}.check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(f"{CUDNN}.check_compute_capability", lambda capability: float(capability) <= 9.0)
    monkeypatch.setattr(f"{CUDNN}.is_cuda_compute_capability_equal", lambda capability: False)
    for module in (
        "attention", "attention.remat_names", "model.loss", "model.projection", "kernels", "parallel.collectives",
    ):  # fmt: skip
        monkeypatch.setattr(f"btlm_jax.{module}.platform", lambda: "gpu")


def exported(phase_index: int, **changes) -> export.Exported:
    """Export the step of a phase of the tiny config in bfloat16 for CUDA."""
    tokens = 16 * LENGTHS[0]
    config = tiny_config(
        model__dtype="bfloat16", curriculum__seq_len=LENGTHS, curriculum__num_tokens=(6 * tokens, 4 * tokens),
        optimizer__warmup_tokens=2 * tokens, **changes,
    )  # fmt: skip
    mesh = make_run_mesh(config.mesh, curriculum=config.curriculum.table, devices=jax.devices())
    program = make_program(config, mesh)
    phase = config.curriculum.table.phases[phase_index]
    jitted = jax.jit(program.make_train_step(phase), donate_argnums=0)
    sharding = batch_sharding(mesh, program.rules_for(phase))
    batch = abstract_batch((1, phase.batch_size, phase.seq_len), sharding, document_mask=False)
    rate = jax.ShapeDtypeStruct((), np.float32)
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in (FORWARD, BACKWARD)]
    with jax.set_mesh(mesh):
        return export.export(jitted, platforms=("cuda",), disabled_checks=checks)(program.state, batch, rate)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("phase_index", [0, 1])
def test_the_step_attends_by_cudnn_and_runs_its_forward_pass_once(hopper, layout, phase_index):
    """On each device with whole sequences of its heads, and in no other way."""
    program = exported(phase_index, model__remat="matmuls_saved", **LAYOUTS[layout])
    assert program.nr_devices == 8 and program.platforms == ("cuda",)
    text = program.mlir_module()
    kernels = re.findall(r"custom_call @(__cudnn[\w$]+)", text)
    assert sorted(kernels) == [FORWARD, BACKWARD]
    T = LENGTHS[phase_index]
    assert f"x{T}x{T}x" not in text  # no array of scores


def test_the_start_says_how_steps_are_computed(hopper, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    config = tiny_config(model__d_model=160, model__num_heads=2, model__dtype="bfloat16")
    program = make_program(
        config, make_run_mesh(config.mesh, curriculum=config.curriculum.table, devices=jax.devices())
    )
    options = compiler_options(types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3"))
    said = describe_gpu_step(dataclasses.replace(program, options=options))
    attention, flags = said.splitlines()
    assert attention == "Attention: gpu, cuDNN's kernel: heads of 80 widened to 96 by ALiBi's lanes"
    assert " enable_latency_hiding_scheduler=true " in flags and "exclude_nondeterministic" not in flags
    assert flags.endswith("; XLA_FLAGS has besides, or instead: --xla_gpu_deterministic_ops=true")
