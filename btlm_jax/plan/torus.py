"""Seconds of a collective by where its devices are: which links a group has, alone or shared with other groups."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import jax

from btlm_jax.plan.chips import Chip
from btlm_jax.plan.executable import BETWEEN_SLICES, Collective


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Torus:
    """Where the devices of a mesh are, in its order, and which sides of the slice are closed to rings."""

    chip: Chip
    coordinates: tuple[tuple[int, ...], ...]
    sides: tuple[int, ...]
    wraps: tuple[bool, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """A collective with its time."""

    kind: str
    num_bytes: int
    num_devices: int
    count: int
    is_asynchronous: bool
    way: str  # a group's extents along the sides of the slice: "ring of 16 x line of 2, every 8th"
    seconds: float  # a step, alone on its links


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A group's extent along one side of the slice."""

    num_devices: int
    stride: int  # between neighbours in the group; as many groups share the links between them
    is_ring: bool

    @property
    def links(self) -> float:
        """Links into a device that the group has for itself."""
        return (2 if self.is_ring else 1) / self.stride

    def __str__(self) -> str:
        kind = "ring" if self.is_ring else "line"
        return f"{kind} of {self.num_devices}" + (f", every {self.stride}th" if self.stride > 1 else "")


def torus_of(devices: Sequence[jax.Device], *, chip: Chip) -> Torus:
    """Return the torus of a mesh's devices, `mesh.devices.flat`.

    A side of 16 is closed on v5e and v6e; on v4 and v5p all sides are, of slices whose sides are multiples of 4.
    """
    coordinates = tuple(tuple(device.coords) for device in devices)
    sides = tuple(1 + max(values) for values in zip(*coordinates, strict=True))
    if chip.is_cube:
        closed = all(side % 4 == 0 for side in sides)
        return Torus(chip=chip, coordinates=coordinates, sides=sides, wraps=(closed,) * len(sides))
    return Torus(chip=chip, coordinates=coordinates, sides=sides, wraps=tuple(side == 16 for side in sides))


def time_collective(collective: Collective, torus: Torus) -> Exchange:
    """Return a collective with its time, over links or, between slices, over the network."""
    each = collective
    once = _seconds_once(each.kind, each.num_bytes, each.groups, each.num_devices, torus)
    return Exchange(
        kind=each.kind, num_bytes=each.num_bytes, num_devices=each.num_devices, count=each.count,
        is_asynchronous=each.is_asynchronous, way=_way(each, torus), seconds=each.count * once,
    )  # fmt: skip


def lines_of(group: tuple[int, ...], torus: Torus) -> tuple[Line, ...] | None:
    """Return a group's extent along each side where it has one; None where it is no grid with equal steps."""
    places = [torus.coordinates[device] for device in group]
    values = [sorted(set(each)) for each in zip(*places, strict=True)]
    if math.prod(map(len, values)) != len(group) or set(places) != set(itertools.product(*values)):
        return None
    lines = []
    for at, side, wraps in zip(values, torus.sides, torus.wraps, strict=True):
        steps = {after - before for before, after in itertools.pairwise(at)}
        if len(steps) > 1:
            return None
        if steps:
            (stride,) = steps
            is_ring = wraps and stride * len(at) == side
            lines.append(Line(num_devices=len(at), stride=stride, is_ring=is_ring))
    return tuple(lines)


@functools.lru_cache(maxsize=4096)
def _seconds_once(
    kind: str, num_bytes: int, groups: tuple[tuple[int, ...], ...], num_devices: int, torus: Torus
) -> float:
    n, link = num_devices, torus.chip.link_bytes
    if kind.startswith(BETWEEN_SLICES):  # each chip sends, and receives, by its share of the host's network
        passes = 2 if kind.endswith("all-reduce") else 1
        return passes * num_bytes * (n - 1) / n / torus.chip.network_bytes
    if kind == "collective-permute":
        return num_bytes * max((_hops(pair, torus) for pair in groups), default=1) / link
    return max(_seconds_in_group(kind, num_bytes, group, torus) for group in groups)


def _seconds_in_group(kind: str, num_bytes: int, group: tuple[int, ...], torus: Torus) -> float:
    n, link = len(group), torus.chip.link_bytes
    lines = lines_of(group, torus)
    if lines is None:
        lines = (Line(num_devices=n, stride=1, is_ring=False),)
    if kind == "all-to-all":
        # A side at a time. Over the middle of a line half of the devices send half of what they have: bytes x n / 4
        # over one link; on a ring over two in each direction.
        return sum(num_bytes * each.num_devices / (8 if each.is_ring else 4) * each.stride / link for each in lines)
    passes = 2 if kind == "all-reduce" else 1
    return passes * gather_seconds(num_bytes, lines, link_bytes=link)


def gather_seconds(num_bytes: float, lines: Sequence[Line], *, link_bytes: float) -> float:
    """Return the seconds of gathering an array of `num_bytes`, or of reducing it to its pieces.

    Side after side in the best order; or in as many parts as there are sides, each beginning with another side, so that
    all links are in use.
    """
    n = math.prod(line.num_devices for line in lines)

    def stages(order: Sequence[Line], piece: float) -> list[float]:
        seconds = []
        for line in order:
            seconds.append(piece * (line.num_devices - 1) / (line.links * link_bytes))
            piece *= line.num_devices
        return seconds

    one_by_one = min(sum(stages(order, num_bytes / n)) for order in itertools.permutations(lines))
    turned = [stages([*lines[at:], *lines[:at]], num_bytes / n / len(lines)) for at in range(len(lines))]
    return min(one_by_one, sum(max(stage) for stage in zip(*turned, strict=True)))


def _hops(pair: tuple[int, ...], torus: Torus) -> int:
    """Return over how many links of one side a permute goes; as many messages share each of them."""
    apart = []
    for here, there, side, wraps in zip(
        torus.coordinates[pair[0]], torus.coordinates[pair[-1]], torus.sides, torus.wraps, strict=True
    ):
        distance = abs(here - there)
        apart.append(min(distance, side - distance) if wraps else distance)
    return max(1, *apart)


def _way(collective: Collective, torus: Torus) -> str:
    if collective.kind.startswith(BETWEEN_SLICES):
        return "network"
    if collective.kind == "collective-permute":
        return f"{max((_hops(pair, torus) for pair in collective.groups), default=1)} links"
    lines = lines_of(collective.groups[0], torus) if collective.groups else None
    return "scattered" if lines is None else " x ".join(map(str, lines))
