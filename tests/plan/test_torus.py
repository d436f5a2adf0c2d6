"""Collectives by where their devices are, against counting hop by hop what each link carries."""

import itertools
import types

import numpy as np
import pytest
from support.hlo import device_groups as device_groups_array
from support.tpu import needs_libtpu

from btlm_jax.plan.chips import CHIPS, slice_devices
from btlm_jax.plan.executable import Collective, device_groups
from btlm_jax.plan.torus import Torus, gather_seconds, lines_of, time_collective, torus_of

LINK = CHIPS["v5e"].link_bytes


def plane(rows: int, columns: int, *, name: str = "v5e") -> Torus:
    places = itertools.product(range(rows), range(columns))
    devices = [types.SimpleNamespace(coords=(row, column, 0)) for row, column in places]
    return torus_of(devices, chip=CHIPS[name])


def seconds(kind: str, group, torus: Torus, *, num_bytes: int = 8 * 45_000_000_000) -> float:
    groups = (tuple(group),)
    collective = Collective(
        kind=kind, num_bytes=num_bytes, num_devices=len(group), count=3, is_asynchronous=False, groups=groups
    )
    return time_collective(collective, torus).seconds / 3


def test_a_side_of_16_is_a_ring_and_a_shorter_one_a_line():
    torus = plane(16, 16)
    (ring,) = lines_of(tuple(range(16)), torus) or ()
    (line,) = lines_of(tuple(range(8)), torus) or ()
    (spread,) = lines_of((0, 8), torus) or ()
    assert (str(ring), ring.links) == ("ring of 16", 2)
    assert (str(line), line.links) == ("line of 8", 1)
    assert (str(spread), spread.links) == ("ring of 2, every 8th", 0.25)  # 8 pairs share the ring
    assert plane(4, 8).wraps == (False, False, False) and plane(4, 16).wraps == (False, True, False)
    cube = [types.SimpleNamespace(coords=at) for at in itertools.product(range(4), range(4), range(8))]
    assert torus_of(cube, chip=CHIPS["v5p"]).wraps == (True, True, True)
    flat = [types.SimpleNamespace(coords=at) for at in itertools.product(range(2), range(4), range(4))]
    assert torus_of(flat, chip=CHIPS["v5p"]).wraps == (False, False, False)


def test_gathers_over_lines_rings_and_planes():
    """8 x 45 GB, so that one link takes 8 s for all of it."""
    torus = plane(16, 16)
    assert seconds("all-gather", range(16), torus) == pytest.approx(8 * 15 / 16 / 2)
    assert seconds("all-gather", range(8), torus) == pytest.approx(8 * 7 / 8)  # the last of a line has one link
    assert seconds("reduce-scatter", range(8), torus) == pytest.approx(8 * 7 / 8)
    assert seconds("all-reduce", range(8), torus) == pytest.approx(2 * 8 * 7 / 8)
    assert seconds("all-gather", (0, 1), torus) == pytest.approx(8 / 2)
    # The pair first, of 1 / 32 of the bytes, over a quarter of a link; then the ring.
    pairs = [16 * row + column for row in range(16) for column in (0, 8)]
    assert seconds("all-gather", pairs, torus) <= 8 / 32 / 0.25 + 8 * 15 / 16 / 2
    # All of a closed square: at best over all four links into a device, never better.
    whole = seconds("all-gather", range(256), torus)
    assert 8 * 255 / 256 / 4 <= whole < 1.1 * 8 * 255 / 256 / 4
    assert seconds("all-gather", (0, 1, 17), torus) == pytest.approx(8 * 2 / 3)  # no grid: as over one link


@pytest.mark.parametrize("length, is_ring", [(2, False), (8, False), (4, True), (16, True)])
def test_an_exchange_takes_what_its_busiest_link_carries(length, is_ring):
    """Route each device's piece to each other the shorter way around, both ways by halves, and count."""
    carried = np.zeros((2, length))  # of both directions
    for here, there in itertools.permutations(range(length), 2):
        ahead = (there - here) % length
        if is_ring:
            shares = (0.5, 0.5) if 2 * ahead == length else (1, 0) if 2 * ahead < length else (0, 1)
        else:
            shares = (1, 0) if there > here else (0, 1)
        for step in range(ahead):
            carried[0, (here + step) % length] += shares[0]
        for step in range(length - ahead):
            carried[1, (here - step) % length] += shares[1] if is_ring else 0
        for step in range(abs(there - here)):
            carried[1, here - step] += shares[1] if not is_ring else 0
    torus = Torus(
        chip=CHIPS["v5e"], coordinates=tuple((at,) for at in range(length)), sides=(length,), wraps=(is_ring,)
    )
    pieces = seconds("all-to-all", range(length), torus) / 8 * length  # link times of one piece
    assert pieces == pytest.approx(carried.max())


def test_a_permute_goes_over_as_many_links_as_it_is_far():
    torus = plane(4, 16)

    def permute(*pairs) -> float:
        collective = Collective(
            kind="collective-permute", num_bytes=int(LINK), num_devices=64, count=1, is_asynchronous=True, groups=pairs
        )
        return time_collective(collective, torus).seconds

    assert permute((0, 1), (1, 2)) == 1
    assert permute((0, 15)) == 1 and permute((0, 12)) == 4 and permute((0, 48)) == 3  # around the ring; along a line


def test_more_links_are_never_slower():
    torus = plane(16, 16)
    one = gather_seconds(1.0, lines_of(tuple(range(16)), torus) or (), link_bytes=1.0)
    assert gather_seconds(1.0, lines_of(tuple(range(256)), torus) or (), link_bytes=1.0) < one


@pytest.mark.parametrize(
    "attributes",
    [
        "replica_groups=mesh['a'=4,'b'=2,'c'=3] {'a','c'}, dimensions={1}",
        "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}",
        "replica_groups=[4,6]<=[2,3,4]T(2,0,1)",
        "replica_groups=[2,12]<=[24]",
        "replica_groups={{0,2},{1,3}}, to_apply=%sum",
    ],
)
def test_groups_in_every_notation(attributes):
    assert np.array_equal(device_groups(attributes, num_devices=24), device_groups_array(attributes))


@needs_libtpu
def test_the_devices_of_a_slice_have_places():
    torus = torus_of(slice_devices("v5e:4x8"), chip=CHIPS["v5e"])
    assert sorted(torus.sides) == [1, 4, 8] and len(set(torus.coordinates)) == 32
