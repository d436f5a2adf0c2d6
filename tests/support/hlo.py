"""Reading the text of compiled programs."""

import math
import re

import numpy as np

_MESH = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"


def device_groups(attributes: str) -> np.ndarray:
    """Return the devices [groups, devices] of a collective, from any of the notations of replica groups."""
    if mesh := re.search(_MESH, attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        devices = _iota(mesh[2] or str(math.prod(sizes.values())), mesh[3]).reshape(list(sizes.values()))
        last = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", mesh[4])]
        return np.moveaxis(devices, last, range(-len(last), 0)).reshape(-1, math.prod(devices.shape[at] for at in last))
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        return _iota(tiled[3], tiled[4]).reshape(int(tiled[1]), int(tiled[2]))
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", attributes)
    assert listed is not None, attributes
    return np.asarray([[int(each) for each in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])])


def _iota(dims: str, order: str | None) -> np.ndarray:
    """Return 0, 1, 2, ... in an array of `dims`, its axes in `order`."""
    shape = [int(dim) for dim in dims.split(",")]
    axes = [int(axis) for axis in order.split(",")] if order else range(len(shape))
    return np.arange(math.prod(shape)).reshape(shape).transpose(axes)
