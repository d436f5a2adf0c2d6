"""Training steps that benchmarks time: ours as `btlm train` compiles it, and PyTorch's on equal config and tokens."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from btlm_jax.recipe.config import TrainConfig, train_config_from

CONFIG = Path(__file__).parent.parent / "configs" / "local_cpu.py"
# d_model, num_layers, num_heads, d_ff, vocab_size; head dims 64, 80 (BTLM's own) and 64.
SIZES = {
    "125M": (768, 12, 12, 2048, 50257),
    "540M": (1280, 24, 16, 3416, 50257),
    "1.3B": (2048, 24, 32, 5464, 50257),
}


def read_config(*, batch: int, length: int, dtype: str = "float32", **model) -> TrainConfig:
    """Return the local config with one phase of this shape and other values of its model."""
    spec = importlib.util.spec_from_file_location("config", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    values = module.get_config().to_dict()
    values["curriculum"] = dict(seq_len=(length,), batch_size=(batch,), num_tokens=(1000 * batch * length,))
    values["model"] |= dict(loss_chunk=256, dtype=dtype) | model
    return train_config_from(values)


def config_of_size(size: str, *, batch: int, length: int, dtype: str) -> TrainConfig:
    """Return the config of one of SIZES, or of the local run's model for "4M"."""
    if size not in SIZES:
        return read_config(batch=batch, length=length, dtype=dtype)
    names = ("d_model", "num_layers", "num_heads", "d_ff", "vocab_size")
    model = dict(zip(names, SIZES[size], strict=True))
    return read_config(batch=batch, length=length, dtype=dtype, loss_chunk=512, **model)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A step to call, which returns its loss unfetched, and what is known before the first call."""

    run: Callable
    wait: Callable[[], None]  # until all steps called are done
    peak_bytes: Callable[[], int]  # memory that the device needed so far
    compile_s: float
    predicted_s: float = 0.0  # of ours on a GPU, by published runs of other models; 0 where nothing is predicted


def make_jax_step(config: TrainConfig) -> Step:
    """Compile our step and make its state."""
    import jax

    from btlm_jax.parallel.make_mesh import make_mesh
    from btlm_jax.parallel.mesh import batch_sharding
    from btlm_jax.train.program import make_program
    from btlm_jax.train.step import init_state

    program = make_program(config, make_mesh(devices=jax.devices()[:1], tensor=1))
    (phase,) = config.curriculum.table.phases
    traced = program.trace_train_step(phase)
    began = time.perf_counter()
    compiled = program.compile(traced)
    compile_s = time.perf_counter() - began
    state = init_state(program.model, program.optimizer, program.mesh, seed=1)
    inputs, targets = _tokens(config)
    rows = {"inputs_BT": inputs[None], "targets_BT": targets[None]}
    rows["weights_BT"] = np.ones(rows["inputs_BT"].shape, np.float32)
    arrays = jax.device_put(rows, batch_sharding(program.mesh, program.rules_for(phase)))

    def run():
        nonlocal state
        state, metrics = compiled(state, arrays, np.float32(1e-3))
        return metrics["loss"]

    def peak_bytes() -> int:
        statistics = jax.devices()[0].memory_stats()
        if statistics:
            return statistics["peak_bytes_in_use"]
        memory = compiled.memory_analysis()  # a CPU counts nothing, but its executable knows; the state is in place
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes

    return Step(
        run=run,
        wait=lambda: jax.block_until_ready(state),
        peak_bytes=peak_bytes,
        compile_s=compile_s,
        predicted_s=_predicted_seconds(program, traced),
    )


def _predicted_seconds(program, traced) -> float:
    if program.mesh.devices.flat[0].platform != "gpu":
        return 0.0
    from btlm_jax.plan.run_prediction import predict_steps

    return sum(predict_steps(program, [traced], config_file=CONFIG, measured=None).seconds)


def make_torch_step(config: TrainConfig, *, attention: str, mode: str, device: str, is_medium: bool = False) -> Step:
    """Make PyTorch's step: fused AdamW, clipping, parameters in float32, bfloat16 through autocast.

    With `is_medium` products of float32 may be made in bfloat16.
    """
    import torch
    from torch_btlm import TorchBtlm, parameter_groups

    torch.set_num_threads(os.cpu_count())
    torch.set_float32_matmul_precision(
        "medium" if is_medium else "high"
    )  # of use where something is float32 under autocast
    torch.manual_seed(0)
    (phase,) = config.curriculum.table.phases
    model = TorchBtlm(config, attention=attention, length=phase.seq_len, device=device)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config), betas=(config.optimizer.beta1, config.optimizer.beta2), fused=True
    )
    loss_of = torch.compile(model, dynamic=False) if mode == "compile" else model
    inputs, targets = (torch.tensor(x, dtype=torch.long, device=device) for x in _tokens(config))
    is_bfloat16 = config.model.dtype == "bfloat16"

    def run():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=is_bfloat16):
            loss = loss_of(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        return loss.detach()

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def peak_bytes() -> int:
        return torch.cuda.max_memory_allocated() if device == "cuda" else 0  # PyTorch does not count a CPU's

    return Step(run=run, wait=wait, peak_bytes=peak_bytes, compile_s=0.0)


def _tokens(config: TrainConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs_BT and targets_BT, the same for every framework."""
    (phase,) = config.curriculum.table.phases
    shape = (phase.batch_size, phase.seq_len + 1)
    tokens_BT = np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.int32)
    return tokens_BT[:, :-1], tokens_BT[:, 1:]
