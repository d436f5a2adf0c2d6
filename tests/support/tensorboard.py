"""What a run has written for TensorBoard."""

import struct
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event

from btlm_jax.train import TENSORBOARD


def tensorboard_scalars(workdir: Path) -> set[tuple[str, int]]:
    """Return (tag, step) of every scalar, by reading the TFRecords: length, its checksum, event, its checksum."""
    scalars = set()
    for path in (workdir / TENSORBOARD).iterdir():
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            scalars |= {(value.tag, event.step) for value in event.summary.value}
            data = data[16 + length :]
    return scalars
