"""What a run has written for TensorBoard."""

import struct
from collections.abc import Iterator
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from btlm_jax.train import TENSORBOARD


def tensorboard_scalars(workdir: Path) -> set[tuple[str, int]]:
    """Return (tag, step) of every scalar."""
    return {(value.tag, step) for step, value in _values(workdir) if value.HasField("simple_value")}


def tensorboard_points(workdir: Path) -> list[tuple[str, int]]:
    """Return (tag, step) of every scalar that TensorBoard shows: a start hides what is before it, from its step on."""
    points: list[tuple[str, int]] = []
    for event in _events(workdir):
        if event.session_log.status:
            points = [(tag, step) for tag, step in points if step < event.step]
        points += [(value.tag, event.step) for value in event.summary.value if value.HasField("simple_value")]
    return sorted(points)


def tensorboard_texts(workdir: Path) -> dict[tuple[str, int], str]:
    """Return (tag, step) -> text."""
    texts = ((step, value) for step, value in _values(workdir) if value.metadata.plugin_data.plugin_name == "text")
    return {(value.tag, step): value.tensor.string_val[0].decode() for step, value in texts}


def tensorboard_hyperparameters(workdir: Path) -> dict[str, bool | float | str]:
    """Return name -> value."""
    (start,) = (value for _, value in _values(workdir) if value.tag == "_hparams_/session_start_info")
    data = HParamsPluginData.FromString(start.metadata.plugin_data.content)
    values = data.session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in values.items()}


def _values(workdir: Path) -> Iterator[tuple]:
    """Yield (step, value)."""
    for event in _events(workdir):
        yield from ((event.step, value) for value in event.summary.value)


def _events(workdir: Path) -> Iterator[Event]:
    """Yield the events, by reading the TFRecords: length, its checksum, event, its checksum."""
    for path in sorted((workdir / TENSORBOARD).iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
