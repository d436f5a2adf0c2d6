"""One of two processes that share the checkpoints of a workdir: python -m support.checkpoint_pair PORT INDEX WORKDIR.

Saves three, has the newest ones damaged, restores, cannot write its part, can write it again. Then both measure a part
of an evaluation, are interrupted and go on. Prints what came of it.
"""

import contextlib
import dataclasses
import json
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from support.tiny import tiny_config

from btlm_jax import notices
from btlm_jax.evaluate.processes import wait_for_halving
from btlm_jax.evaluate.results import Results, Work
from btlm_jax.hub import given_model
from btlm_jax.parallel.make_mesh import make_mesh
from btlm_jax.parallel.mesh import FSDP
from btlm_jax.stopping import AgreedError
from btlm_jax.train.checkpoint import Checkpointer, Position
from btlm_jax.train.step import WINDOW, History, TrainState

SIZE = 4096


def make_state(mesh, number: float) -> TrainState:
    """A state of which each process has half of the parameters, on two devices."""

    def put(values, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    zero = np.zeros((), np.int32)
    history = History(put(np.zeros((3, WINDOW), np.float32)), put(zero), put(zero), put(zero))
    w = np.random.default_rng(int(number)).normal(size=(SIZE, 2)).astype(np.float32)
    return TrainState(put(np.int32(number)), {"w": put(w, FSDP, None)}, (), history)


def damage(workdir: Path) -> None:
    """Flip a bit of checkpoint 9, and take away what process 1 wrote of checkpoint 6."""
    path = max((workdir / "checkpoints" / "9" / "state").rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)
    shutil.rmtree(workdir / "checkpoints" / "6" / "state" / "ocdbt.process_1")


def measure_twice(folder: Path) -> dict:
    """Measure a part of three units, interrupted after the first; return what came of it."""
    results, asked = Results(folder, identity={}), []

    def make(work: Work) -> dict:
        work.begin([1, 1, 1], unit_name="units")
        for number in range(3):
            if work.done(number) is None:
                asked.append(number)
                work.add(number, [number, "one"])
                if len(asked) == 1:
                    raise KeyboardInterrupt
        wait_for_halving()
        return {"values": [work.done(number) for number in range(3)]}

    with contextlib.suppress(KeyboardInterrupt):
        results.measure("part", {}, make)
    found = [results.measure("part", {}, make)["values"] for _ in range(2)]
    return {"values": found, "asked": asked, "files": len(list(folder.glob("*.json"))), "is_there": folder.exists()}


def main(port: str, index: int, workdir: Path) -> dict:
    """Do all of it; return what to print."""
    jax.distributed.initialize(f"localhost:{port}", 2, index)
    notices.begin(strict=())
    config = tiny_config(checkpoint__keep_last=50)
    mesh = make_mesh(devices=jax.devices(), tensor=1)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make_state(mesh, 0))

    def position(step: int) -> Position:
        tokens = config.curriculum.table.tokens_seen(step)
        return Position(step=step, tokens_seen=tokens, store_fingerprint="abc")

    own = jax.device_put(np.arange(8), jax.local_devices()[0])  # as the weights of a model directory
    placed = given_model._on_mesh(own, NamedSharding(mesh, PartitionSpec(FSDP)))
    parts = [np.asarray(shard.data).tolist() for shard in placed.addressable_shards]
    checkpointer = Checkpointer(workdir, config=config.checkpoint)
    for step in (3, 6, 9):
        checkpointer.save_or_go_on(make_state(mesh, step), position=position(step), config=config)
    checkpointer.wait()
    if index == 0:
        damage(workdir)
    multihost_utils.sync_global_devices("damaged")
    (found, state), said = checkpointer.newest(
        lambda step: (step, checkpointer.restore_state(step, abstract=abstract)), steps=checkpointer.steps()
    )
    mine = np.concatenate([np.asarray(state.params["w"].addressable_data(number)) for number in range(2)])
    expected = np.random.default_rng(3).normal(size=(SIZE, 2)).astype(np.float32)
    is_same = bool((mine == expected[index * SIZE // 2 :][: SIZE // 2]).all())

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if index == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    began, failed = time.monotonic(), ""
    try:
        for step in (6, 9):
            checkpointer.save_or_go_on(make_state(mesh, step), position=position(step), config=config)
            checkpointer.finish(make_state(mesh, step), position=position(step), config=config)
    except AgreedError as error:
        failed = error.reason
    seconds = time.monotonic() - began
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    checkpointer.close()

    checkpointer = Checkpointer(workdir, config=config.checkpoint)  # as the next start
    checkpointer.save_or_go_on(make_state(mesh, 9), position=position(9), config=config)
    checkpointer.finish(make_state(mesh, 9), position=position(9), config=config)
    steps = checkpointer.steps()
    checkpointer.delete_after(3)
    left = checkpointer.steps()
    checkpointer.close()
    return {
        "measured": measure_twice(workdir / f"results-{index}"),
        "found": found, "said": said, "same": is_same, "failed": failed, "seconds": seconds, "steps": steps,
        "left": left, "parts": parts, "notices": dict(notices.counts()),
        "position": dataclasses.asdict(position(3))["step"],
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))))
    sys.stdout.flush()
