"""Rebuild the published runs that `btlm plan` is calibrated by, and hold its prediction against what was measured.

    python benchmarks/plan_calibration.py                      # the table, from what was compiled before
    python benchmarks/plan_calibration.py --compile            # every run again that has no parts of this libtpu
    python benchmarks/plan_calibration.py --compile v6e-8-mistral-7b

Each run of btlm_jax/plan/calibration.json is a plain decoder (RMSNorm, SwiGLU, RoPE, JAX's splash attention, AdamW, a
scan over layers, sharded by XLA) at the published shapes, mesh, recomputation and compiler options, compiled for the
published slice. No TPU is needed, but libtpu is (pip install 'btlm_jax[tpu]'), and 1 to 3 minutes of 2 cores a run.
Finished runs are kept in the file, so that the same command goes on after an interruption.

The table has, of every run: seconds measured; `old`, the compiler's cycles and the attention kernels alone, which is
what btlm plan estimated before it was calibrated, and measured / old; the roofline and measured / roofline; seconds
predicted by the other runs, with the error. Another file with --file tries changes out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from btlm_jax.plan.calibration import CALIBRATION_FILE, Parts, Point, left_out, published_points
from btlm_jax.plan.chips import CHIPS, GIB, chip_of, slice_devices
from btlm_jax.plan.compiling import compiler_versions, needed_bytes
from btlm_jax.plan.estimate import step_parts
from btlm_jax.plan.executable import read_executable
from btlm_jax.plan.flop_count import count_step_work
from btlm_jax.plan.torus import time_collective, torus_of
from btlm_jax.storage.files import read_json_object, write_atomically
from btlm_jax.train.flops import peak_flops

BLOCK, LANES = 512, 128  # of attention: positions; the head dim that chips.py's bundles are of
SHALLOW = (4, 8)  # layers, of a step that does not fit as it is built here: its parts are taken on to its depth
REPORT = Path(__file__).parent / "results" / "plan_calibration.md"
STACKED = (P(None, "fsdp", "tensor"), P(None, "tensor", "fsdp"))  # from d_model, and back to it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    """Shapes of a published model."""

    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    is_tied: bool

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], P]]:
        """Return shape and sharding of every parameter; those of layers are stacked."""
        L, D, F, V = self.num_layers, self.d_model, self.d_ff, self.vocab_size
        Q, K = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        into, back = STACKED
        layers = {"q": ((L, D, Q), into), "k": ((L, D, K), into), "v": ((L, D, K), into), "o": ((L, Q, D), back)}
        layers |= {"gate": ((L, D, F), into), "up": ((L, D, F), into), "down": ((L, F, D), back)}
        layers |= {"norm_1": ((L, D), P()), "norm_2": ((L, D), P())}
        ends = {"embedding": ((V, D), P("tensor", "fsdp")), "norm": ((D,), P())}
        return layers | ends | ({} if self.is_tied else {"readout": ((D, V), P("fsdp", "tensor"))})


def make_loss(decoder: Decoder, mesh: Mesh, *, seq_len: int, policy, uses_iota: bool, loss_chunks: int):
    """Return the loss of tokens_BT as a function of parameters, tokens and targets."""
    heads, kv_heads, width = decoder.num_heads, decoder.num_kv_heads, decoder.head_dim
    activations = NamedSharding(mesh, P("fsdp", None, "tensor"))
    of_heads = P("fsdp", "tensor", None, None)
    local = (heads // mesh.shape["tensor"], max(1, kv_heads // mesh.shape["tensor"]))
    sizes = splash_attention.BlockSizes(
        **dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), BLOCK)
    )
    mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((seq_len, seq_len))] * local[0])
    kernel = splash_attention.make_splash_mha_single_device(mask, block_sizes=sizes)

    def attend(q_BNTH, k_BKSH, v_BKSH):
        run = jax.shard_map(
            jax.vmap(kernel), mesh=mesh, in_specs=(of_heads, of_heads, of_heads), out_specs=of_heads, check_vma=False
        )
        return run(q_BNTH, k_BKSH, v_BKSH)

    def split(x_BTM, count):
        return x_BTM.reshape(*x_BTM.shape[:2], count, width).swapaxes(1, 2)

    def rotate(x_BNTH):
        half = width // 2
        angle_TH = jnp.arange(seq_len)[:, None] * 1e4 ** (-jnp.arange(half) / half)
        first, second = jnp.split(x_BNTH.astype(jnp.float32), 2, -1)
        cos, sin = jnp.cos(angle_TH), jnp.sin(angle_TH)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(jnp.bfloat16)

    def normalize(x_BTD, gain_D):
        x = x_BTD.astype(jnp.float32)
        return (x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * gain_D).astype(jnp.bfloat16)

    def block(x_BTD, layer):
        x_BTD = jax.lax.with_sharding_constraint(checkpoint_name(x_BTD, "input"), activations)
        w = {name: value.astype(jnp.bfloat16) for name, value in layer.items()}
        h = normalize(x_BTD, layer["norm_1"])
        q, k, v = (checkpoint_name(h @ w[name], name) for name in ("q", "k", "v"))
        q = rotate(split(q, heads)) * width**-0.5
        o_BNTH = attend(q.astype(jnp.bfloat16), rotate(split(k, kv_heads)), split(v, kv_heads))
        o_BTM = o_BNTH.swapaxes(1, 2).reshape(*x_BTD.shape[:2], heads * width)
        x_BTD = x_BTD + checkpoint_name(o_BTM @ w["o"], "o")
        h = normalize(x_BTD, layer["norm_2"])
        gate, up = checkpoint_name(h @ w["gate"], "gate"), checkpoint_name(h @ w["up"], "up")
        x_BTD = x_BTD + (jax.nn.silu(gate) * up) @ w["down"]
        return jax.lax.with_sharding_constraint(x_BTD, activations), None

    def losses(x_BTD, table_DV, targets_BT):
        logits = (x_BTD @ table_DV.astype(jnp.bfloat16)).astype(jnp.float32)
        picked = jnp.where(jnp.arange(decoder.vocab_size) == targets_BT[..., None], logits, 0).sum(-1)
        return (jax.nn.logsumexp(logits, -1) - picked).sum()

    def loss(params, tokens_BT, targets_BT):
        table_VD = params["embedding"].astype(jnp.bfloat16)
        if uses_iota:
            x_BTD = jax.nn.one_hot(tokens_BT, decoder.vocab_size, dtype=jnp.bfloat16) @ table_VD
        else:
            x_BTD = table_VD[tokens_BT]
        ends = ("embedding", "readout", "norm")
        layers = {name: value for name, value in params.items() if name not in ends}
        x_BTD, _ = jax.lax.scan(jax.checkpoint(block, policy=policy), x_BTD, layers)
        x_BTD = normalize(x_BTD, params["norm"])
        table_DV = params["embedding"].T if decoder.is_tied else params["readout"]
        if loss_chunks == 1:
            return losses(x_BTD, table_DV, targets_BT) / targets_BT.size
        B, T, D = x_BTD.shape
        chunks = (
            x_BTD.reshape(B, loss_chunks, T // loss_chunks, D).swapaxes(0, 1),
            targets_BT.reshape(B, loss_chunks, T // loss_chunks).swapaxes(0, 1),
        )
        add = jax.checkpoint(lambda total, chunk: (total + losses(chunk[0], table_DV, chunk[1]), None))
        return jax.lax.scan(add, jnp.zeros(()), chunks)[0] / targets_BT.size

    return loss


def remat_policy(values: dict):
    """Return the checkpoint policy of a run: what its backward pass finds saved, on the chip or on the host."""
    policies = jax.checkpoint_policies
    if values["saved"] == "products":
        return policies.checkpoint_dots_with_no_batch_dims
    if values["is_offloaded"]:
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=values["saved"],
            offload_src="device", offload_dst="pinned_host",
        )  # fmt: skip
    return policies.save_only_these_names(*values["saved"])


def trace_step(values: dict, *, num_layers: int) -> tuple[jax.stages.Traced, Mesh]:
    """Trace a run's train step, at so many layers."""
    devices = slice_devices(values["topology"])
    mesh = jax.make_mesh(
        (values["mesh"]["fsdp"], values["mesh"]["tensor"]), ("fsdp", "tensor"), devices=devices,
        axis_types=(AxisType.Auto, AxisType.Auto),
    )  # fmt: skip
    decoder = Decoder(**{**values["model"], "num_layers": num_layers})
    loss = make_loss(
        decoder, mesh, seq_len=values["seq_len"], policy=remat_policy(values["remat"]),
        uses_iota=values["uses_iota_embedding"], loss_chunks=values["loss_chunks"],
    )  # fmt: skip
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))

    def step(state, tokens_BT, targets_BT):
        params, moments = state
        value, gradient = jax.value_and_grad(loss)(params, tokens_BT, targets_BT)
        updates, moments = optimizer.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    def abstract(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    params = {name: abstract(shape, jnp.float32, spec) for name, (shape, spec) in decoder.shapes.items()}
    specs = {leaf.shape: leaf.sharding for leaf in params.values()}
    moments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=specs.get(leaf.shape, NamedSharding(mesh, P()))
        ),
        jax.eval_shape(optimizer.init, params),
    )
    rows = values["batch_per_chip"] * len(devices)
    tokens = abstract((rows, values["seq_len"]), jnp.int32, P("fsdp"))
    with jax.set_mesh(mesh):
        state_shardings = jax.tree.map(lambda leaf: leaf.sharding, (params, moments))
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, None))
        return jitted.trace((params, moments), tokens, tokens), mesh


@contextlib.contextmanager
def kernels_left_out() -> Iterator[None]:
    """Trace Pallas kernels without what they compute: to compile that takes longest, and nothing of it is read."""
    make = pallas.pallas_call
    jax.clear_caches()  # of the kernels as they are
    with mock.patch.object(pallas, "pallas_call", lambda _, **options: make(lambda *refs: None, **options)):
        yield
    jax.clear_caches()


def compile_run(values: dict, *, num_layers: int) -> tuple[Parts, float]:
    """Compile a run at so many layers; return the parts of its step, and the FLOPs that it executes.

    Raises:
      MemoryError: it does not fit.
    """
    chip = chip_of(values["topology"])
    traced, mesh = trace_step(values, num_layers=num_layers)
    work = count_step_work(traced.jaxpr.jaxpr)
    with kernels_left_out():
        traced, _ = trace_step(values, num_layers=num_layers)
    try:
        with jax.set_mesh(mesh):
            compiled = traced.lower().compile(compiler_options=values["options"])
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error), state_bytes=0, chip=chip)
        raise MemoryError(f"needs {needed / GIB:.1f} of {chip.hbm_bytes / GIB:.1f} GiB") from error
    text = compiled.as_text()
    assert text is not None, "libtpu gives it"
    executable = read_executable(text, num_devices=mesh.size)
    devices = list(mesh.devices.flat)
    torus, peak = torus_of(devices, chip=chip), peak_flops(devices[0]).flops
    exchanges = [time_collective(each, torus) for each in executable.collectives]
    parts = step_parts(executable, work, exchanges, slopes_XN=None, chip=chip, num_chips=mesh.size, peak=peak)
    tiles = math.ceil(values["model"]["head_dim"] / LANES)
    return dataclasses.replace(parts, attention=parts.attention * tiles), work.flops


def measure_parts(values: dict) -> dict:
    """Return what is added to a run's entry: parts, HFU, how it was compiled."""
    began, depth = time.process_time(), values["model"]["num_layers"]
    try:
        parts, flops = compile_run(values, num_layers=depth)
        depths = [depth]
    except MemoryError as error:
        print(f"  at {depth} layers it {error}: taken from {SHALLOW[0]} and {SHALLOW[1]} layers")
        (few, few_flops), (more, more_flops) = (compile_run(values, num_layers=layers) for layers in SHALLOW)
        share = (depth - SHALLOW[0]) / (SHALLOW[1] - SHALLOW[0])
        ends = dataclasses.asdict(few), dataclasses.asdict(more)
        parts = Parts(**{name: ends[0][name] + share * (ends[1][name] - ends[0][name]) for name in ends[0]})
        flops = few_flops + share * (more_flops - few_flops)
        depths = list(SHALLOW)
    chip = values["topology"].partition(":")[0]
    device = slice_devices(values["topology"])[0]
    chips = values["mesh"]["fsdp"] * values["mesh"]["tensor"]
    return {
        "chip": chip,
        "parts": {name: float(f"{value:.6g}") for name, value in dataclasses.asdict(parts).items()},
        "executed_flops": flops,
        "hfu": round(flops / chips / peak_flops(device).flops / values["step_seconds"], 4),
        "compiled_layers": depths,
        "compile_cpu_seconds": round(time.process_time() - began),
        "versions": compiler_versions(),
    }


def make_report(points: list[Point]) -> str:
    """Return the table of predicted and measured steps."""
    lines = [
        "| run | measured, s | old, s | measured / old | roofline, s | measured / roofline | exchanges, s "
        "| by the others, s | error | HFU |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    logs = []
    for point, predicted in left_out(points):
        parts = point.parts
        old = parts.products + parts.elementwise + parts.attention
        logs.append(math.log(point.measured / predicted))
        lines.append(
            f"| {point.name} | {point.measured:.3f} | {old:.2f} | {point.measured / old:.2f} | {parts.roofline:.2f} | "
            f"{point.ratio:.2f} | {parts.exchanged:.2f} | {predicted:.2f} | {predicted / point.measured - 1:+.0%} | "
            f"{point.hfu:.1%} |"
        )
    old_logs = [
        math.log(each.measured / (each.parts.products + each.parts.elementwise + each.parts.attention))
        for each in points
    ]
    if not points:
        return "No run has been compiled: give --compile."
    rms, old_rms = (math.expm1(float(np.sqrt(np.mean(np.square(each))))) for each in (logs, old_logs))
    lines += ["", f"Root mean square error: {rms:.0%} leaving one out, {old_rms:.0%} of the old estimate."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of runs, with --compile; without names those that lack parts")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--file", type=Path, default=CALIBRATION_FILE)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    content = read_json_object(arguments.file)
    if unknown := set(arguments.names) - {each["name"] for each in content["points"]}:
        parser.error(f"no such runs: {', '.join(sorted(unknown))}")
    for values in content["points"] if arguments.compile else ():
        is_asked = values["name"] in arguments.names if arguments.names else _is_missing(values)
        if not is_asked:
            continue
        print(f"compiling {values['name']} for {values['topology']}", flush=True)
        added = measure_parts(values)
        content = read_json_object(arguments.file)  # as it is now: another run may have been added meanwhile
        (values,) = (each for each in content["points"] if each["name"] == values["name"])
        values |= added
        values.pop("compiled", None)  # what was said of parts that these replace
        best = {}
        for each in content["points"]:
            if "hfu" in each and each["hfu"] > best.get(each["chip"], {"hfu": 0.0})["hfu"]:
                best[each["chip"]] = {"hfu": each["hfu"], "run": each["name"]}
        content["best_hfu"] = {name: best[name] for name in CHIPS if name in best}
        write_atomically(arguments.file, json.dumps(content, indent=1) + "\n")
    report = make_report(list(published_points(arguments.file)))
    print(report)
    if arguments.compile and arguments.file == CALIBRATION_FILE:
        write_atomically(REPORT, report + "\n")


def _is_missing(values: dict) -> bool:
    return values.get("versions") != compiler_versions()


if __name__ == "__main__":
    main()
