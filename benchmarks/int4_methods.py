"""What 4 bits cost: the held-out loss of a trained model by method, group size, embedding bits, and with an int8 cache.

Command: python benchmarks/int4_methods.py --run=WORKDIR [--output=benchmarks/results/int4_methods.md]
The run is a finished `btlm train` workdir; its held-out split is the witness, its train split gives the calibration
text. Every row sees the same tokens, so its distance from float32 is known far better than its loss: the error given is
over held-out blocks. KL is the divergence of the next token's distribution from float32's, in nats a token.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from machine import machine

from btlm_jax.data.loader import read_rows
from btlm_jax.data.reader import open_store
from btlm_jax.data.store import HELDOUT, TRAIN
from btlm_jax.hub.native import abstract_params
from btlm_jax.hub.source import NativeSource, load_native
from btlm_jax.hub.tensor_names import read_params
from btlm_jax.model import Btlm
from btlm_jax.model.loss import logits
from btlm_jax.model.projection import project_scheduled
from btlm_jax.parallel.mesh import FSDP, RULES
from btlm_jax.quantize.quantize_model import Method, dequantize_tensor, quantize_model
from btlm_jax.recipe.mup import make_parametrization
from btlm_jax.train.finish import heldout_batches
from btlm_jax.train.heldout import SourceLoss, evaluate_heldout, make_eval_step

BATCH = 8
KL_BLOCKS = 8  # of each source
CALIBRATION_BLOCKS = 32


class Int8CacheBtlm(Btlm):
    """The network as if its keys and values came from an int8 cache: one scale a token and head, absmax / 127."""

    def _attend(self, q_BTNH, k_BSNH, v_BSNH, starts_BT):
        return super()._attend(q_BTNH, _int8(k_BSNH), _int8(v_BSNH), starts_BT)


def _int8(x_BSNH):
    scale_BSN1 = jnp.abs(x_BSNH).max(-1, keepdims=True).astype(jnp.float32) / 127
    steps_BSNH = x_BSNH / jnp.where(scale_BSN1 > 0, scale_BSN1, 1)
    return (jnp.rint(steps_BSNH) * scale_BSN1).astype(x_BSNH.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """How a network with some parameters reads the held-out text."""

    total: SourceLoss
    loss_B: np.ndarray  # float64, nats of each held-out block
    weight_B: np.ndarray
    log_probabilities_RV: np.ndarray  # float32, of the positions that KL is taken over


class Bench:
    """A trained model and its text."""

    def __init__(self, workdir: Path):
        self.native = load_native(workdir)
        self.source = NativeSource(self.native)
        self.store = open_store(workdir / self.native_store(workdir), expected_fingerprint="")

    @staticmethod
    def native_store(workdir: Path) -> str:
        """Return where the run's config says that its store is."""
        return json.loads((workdir / "config.json").read_text())["data"]["store"]

    def calibration(self) -> np.ndarray:
        """Return ids_BT of blocks evenly spread over the train split."""
        reader = self.store.split(TRAIN)
        starts = [(int(number), 0) for number in np.linspace(0, len(reader) - 1, CALIBRATION_BLOCKS)]
        return read_rows(reader, starts, seq_len=reader.block_len)["inputs_BT"]

    def float_params(self) -> dict:
        """Return the trained parameters, by way of their published form."""
        return self.params_of({name: self.source.tensors.read(name) for name in self.source.tensors.shapes})

    def quantized(self, *, method: Method, group_size: int, embedding_bits: int, ids_BT: np.ndarray) -> dict:
        """Return our parameters with the values that the codes stand for."""
        made = quantize_model(
            self.source.config,
            self.source.tensors,
            method=method,
            group_size=group_size,
            embedding_bits=embedding_bits,
            calibration_BT=ids_BT if method.is_calibrated else None,
            report=lambda name: None,
        )
        return self.params_of({name: dequantize_tensor(name, rounded) for name, rounded in made})

    def params_of(self, arrays: dict[str, np.ndarray]) -> dict:
        """Return our parameter tree of published tensors."""
        shapes = abstract_params(self.native.metadata, self.native.mesh)
        params = read_params(_Held(arrays), self.source.config, shapes=shapes, report=lambda name: None)
        return jax.device_put(params, self.native.mesh.devices.item())

    def reader(self, network: type[Btlm], *, dtype: str):
        """Return params -> Measured, for a network that computes in `dtype`."""
        config = dataclasses.replace(self.native.metadata.model, dtype=dtype)
        model = network(
            config=config,
            parametrization=make_parametrization(self.native.metadata.mup, config),
            rules=RULES,
            project=project_scheduled,
            alibi_train_len=self.native.metadata.alibi_train_len,
        )
        eval_step = jax.jit(make_eval_step(model, loss_chunk=config.loss_chunk))

        @jax.jit
        def log_probabilities(params, inputs_BT):
            hidden_BTD = model.apply({"params": params}, inputs_BT)
            table_VD = params["embedding"]["embedding"]
            return jax.nn.log_softmax(logits(hidden_BTD, table_VD, output_scale=model.parametrization.output_scale))

        def read(params: dict) -> Measured:
            blocks = []

            def kept(params, batch):
                blocks.append(eval_step(params, batch))
                return blocks[-1]

            with jax.set_mesh(self.native.mesh):
                everything = self.store.split(HELDOUT).split.num_blocks
                result = evaluate_heldout(kept, params, self.batches(everything), manifest=self.store.manifest)
                found = [
                    np.asarray(log_probabilities(params, batch["inputs_BT"]))[np.asarray(batch["weights_BT"]) > 0]
                    for _, batch in self.batches(KL_BLOCKS)
                ]
            loss_B, weight_B = (
                np.concatenate([np.asarray(sums[name], np.float64) for sums in blocks])
                for name in ("loss_B", "weight_B")
            )
            return Measured(
                total=result.total, loss_B=loss_B, weight_B=weight_B, log_probabilities_RV=np.concatenate(found)
            )

        return read

    def batches(self, blocks_per_source: int):
        """Yield held-out batches."""
        return heldout_batches(
            self.store,
            batch_size=BATCH,
            blocks_per_source=blocks_per_source,
            prefetch=2,
            sharding=NamedSharding(self.native.mesh, PartitionSpec(FSDP)),
        )


class _Held:
    """Tensors in memory; see `published.Tensors`."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        self._arrays = arrays
        self.shapes = {name: array.shape for name, array in arrays.items()}

    def read(self, name: str) -> np.ndarray:
        return self._arrays[name]


def row_of(what: str, found: Measured, exact: Measured) -> str:
    """Return a line of the table."""
    weight = exact.weight_B.sum()
    difference_B = found.loss_B - exact.loss_B
    more = difference_B.sum() / weight
    error = math.sqrt(np.square(difference_B - more * exact.weight_B).sum()) / weight
    p_RV, q_RV = exact.log_probabilities_RV, found.log_probabilities_RV
    kl = (np.exp(p_RV) * (p_RV - q_RV)).sum(-1, dtype=np.float64).mean()
    same = (p_RV.argmax(-1) == q_RV.argmax(-1)).mean()
    return (
        f"| {what} | {found.total.loss:.4f} | {found.total.bits_per_byte:.4f} | {more:+.4f} ± {error:.4f} "
        f"| {1e3 * kl:.3f} | {100 * same:.1f} |"
    )


HEADER = (
    "| weights | nats/token | bits/byte | nats/token above float32 | KL, 1e-3 nats | same likeliest token, % |\n"
    "|---|---|---|---|---|---|"
)


def rows(bench: Bench):
    """Yield the table's lines."""
    as_float32, as_bfloat16 = bench.reader(Btlm, dtype="float32"), bench.reader(Btlm, dtype="bfloat16")
    with_int8_cache = bench.reader(Int8CacheBtlm, dtype="float32")
    params, ids_BT = bench.float_params(), bench.calibration()
    exact = as_float32(params)
    yield HEADER
    yield row_of("float32", exact, exact)
    yield row_of("bfloat16", as_bfloat16(params), exact)
    yield row_of("float32, int8 cache", with_int8_cache(params), exact)
    del params

    def quantized(method: Method, *, group_size: int, embedding_bits: int) -> dict:
        return bench.quantized(method=method, group_size=group_size, embedding_bits=embedding_bits, ids_BT=ids_BT)

    def int4_row(method: Method, *, group_size: int, embedding_bits: int) -> str:
        params = quantized(method, group_size=group_size, embedding_bits=embedding_bits)
        what = f"int4 {method}, groups of {group_size}, embedding int{embedding_bits}"
        return row_of(what, as_float32(params), exact)

    for method in Method:
        yield int4_row(method, group_size=64, embedding_bits=8)
    params = quantized(Method.GPTQ, group_size=64, embedding_bits=8)
    yield row_of("int4 gptq, groups of 64, embedding int8, int8 cache", with_int8_cache(params), exact)
    yield int4_row(Method.GPTQ, group_size=64, embedding_bits=4)
    for group_size in (128, 32):
        for method in (Method.RTN, Method.GPTQ):
            yield int4_row(method, group_size=group_size, embedding_bits=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="workdir of a finished `btlm train`")
    parser.add_argument("--output", type=Path, help="write the table there too")
    arguments = parser.parse_args()
    bench, lines = Bench(arguments.run), []
    for line in rows(bench):
        print(line, flush=True)
        lines.append(line)
    if arguments.output:
        title, command = "# What 4 bits cost", "`python benchmarks/int4_methods.py --run=WORKDIR`"
        arguments.output.write_text("\n".join([title, "", command, "", machine("jax"), "", *lines, ""]))


if __name__ == "__main__":
    main()
