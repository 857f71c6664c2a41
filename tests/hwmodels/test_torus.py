"""Collectives on tori: closed forms, a brute-force exchange over links, lower bounds, and the pods' own numbers."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.accelerator import load
from hwmodels.cluster import Cluster
from hwmodels.interconnect.links import Link
from hwmodels.interconnect.torus import Torus, group, shape
from hwmodels.units import InputError
from hwmodels.work import Collective

V4, EDGE = load("tpu-v4"), load("systolic-edge")
LINK = Link(600e9, 1e-6, "torus-3d", efficiency=1.0, links=6)  # 100 GB/s each


def whole(*sizes: int) -> Torus:
    return group(sizes, math.prod(sizes), LINK)


@pytest.mark.parametrize(
    ("devices", "dimensions", "sizes"),
    [
        (64, 3, (4, 4, 4)),
        (64, 2, (8, 8)),
        (128, 3, (8, 4, 4)),
        (4096, 3, (16, 16, 16)),
        (8960, 3, (28, 20, 16)),
        (2, 3, (2, 1, 1)),
        (13, 2, (13, 1)),
    ],
)
def test_slices_are_as_cubic_as_can_be(devices: int, dimensions: int, sizes: tuple[int, ...]) -> None:
    assert shape(devices, dimensions) == sizes


def test_a_group_takes_whole_dimensions_first_and_only_those_wrap() -> None:
    assert [(r.size, r.wraps) for r in group((4, 4, 4), 16, LINK).rings] == [(4, True), (4, True)]
    assert [(r.size, r.wraps) for r in group((4, 4, 4), 8, LINK).rings] == [(4, True), (2, False)]
    assert [(r.size, r.wraps) for r in group((8, 8), 4, LINK).rings] == [(4, False)]
    assert [(r.size, r.wraps) for r in group((4, 4, 4), 6, LINK).rings] == [(6, False)]


@pytest.mark.parametrize("d", [3, 4, 8, 16])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_a_cube_gathers_over_all_its_links_at_once(d: int, dimensions: int) -> None:
    """bytes (n-1)/n over two links per dimension."""
    n = d**dimensions
    seconds = whole(*[d] * dimensions).gather_s(1e9)
    assert seconds == pytest.approx(1e9 * (n - 1) / n / (2 * dimensions * 100e9))


@given(st.lists(st.integers(2, 9), min_size=1, max_size=3), st.floats(1.0, 1e10))
def test_no_collective_beats_the_links_of_a_device(sizes: list[int], size: float) -> None:
    ours = whole(*sizes)
    n = ours.devices
    everything = sum(ring.links for ring in ours.rings) * 100e9
    assert ours.gather_s(size) >= size * (n - 1) / n / everything * (1 - 1e-12)
    assert ours.all_to_all_s(size) >= size * (n - 1) / n / everything * (1 - 1e-12)
    # nor the cut across the longest dimension, over which each half sends half of what it holds to the other
    longest = max(ours.rings, key=lambda ring: ring.size)
    half = longest.size // 2 * (n // longest.size)
    cut = longest.links * (n // longest.size) * 100e9
    assert ours.all_to_all_s(size) >= half * size * (n - half) / n / cut * (1 - 1e-12)


@pytest.mark.parametrize("sizes", [(2,), (3,), (4,), (5,), (4, 4), (3, 5), (4, 2), (4, 4, 4), (8, 4, 2)])
def test_all_to_all_equals_every_message_sent_hop_by_hop(sizes: tuple[int, ...]) -> None:
    """Messages walk one dimension after the other, the shorter way round; halfway ones go half each way."""
    ours, load_of, walked = whole(*sizes), {}, 0.0  # type: ignore[var-annotated]
    for source in itertools.product(*map(range, sizes)):
        for target in itertools.product(*map(range, sizes)):
            here = list(source)
            for axis, ring in enumerate(ours.rings):
                d = ring.size
                gap = (target[axis] - source[axis]) % d
                ways = [(1, gap, 1.0)]
                if not ring.wraps:
                    step = 1 if target[axis] > source[axis] else -1
                    ways = [(step, abs(target[axis] - source[axis]), 1.0)]
                elif 2 * gap == d:
                    ways = [(1, gap, 0.5), (-1, gap, 0.5)]
                elif 2 * gap > d:
                    ways = [(-1, d - gap, 1.0)]
                for step, hops, share in ways:
                    at = list(here)
                    for _ in range(hops):
                        link = (tuple(at), axis, step)
                        load_of[link] = load_of.get(link, 0.0) + share
                        walked += share
                        at[axis] = (at[axis] + step) % d
                here[axis] = target[axis]
    n = ours.devices
    each = 1e9 / n  # bytes from one device to one other
    assert ours.all_to_all_s(1e9) == pytest.approx(max(load_of.values()) * each / 100e9)
    assert ours.all_to_all_bytes(1e9) == pytest.approx(walked / n * each)


@given(
    st.sampled_from(["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send_recv"]),
    st.sampled_from([2, 3, 4, 8, 12, 16, 64, 128]),
    st.floats(1.0, 1e10),
)
@settings(deadline=None)
def test_volumes_and_directions(kind: str, devices: int, size: float) -> None:
    cluster = Cluster.build(V4, devices, 4)
    found = cluster.collective(kind, size, devices, devices)
    n = devices
    volumes = {"all_reduce": 2 * (n - 1) / n, "all_gather": (n - 1) / n, "reduce_scatter": (n - 1) / n}
    if kind in volumes:
        assert found.link_bytes["fabric"] == pytest.approx(size * volumes[kind])
    assert found.time_s >= found.latency_s
    assert cluster.collective(kind, 2 * size, devices, devices).time_s >= found.time_s
    faster = Cluster.build(V4, devices, 4, network={"intra_node": 600e9}).collective(kind, size, devices, devices)
    slower = Cluster.build(V4, devices, 4, network={"intra_node_latency": 1e-3}).collective(
        kind, size, devices, devices
    )
    assert faster.time_s <= found.time_s <= slower.time_s
    assert found.time_s == pytest.approx(
        found.latency_s + max(moved / found.bandwidth[tier] for tier, moved in found.link_bytes.items())
    )


def test_a_pod_of_tpu_v4_reduces_at_the_rate_that_its_documentation_gives() -> None:
    """1.1 PB/s for 4096 chips; counted as bytes that every chip sends."""
    found = Cluster.build(V4, 4096, 4).collective("all_reduce", 64e9, 4096, 4096)
    assert 4096 * found.link_bytes["fabric"] / found.time_s == pytest.approx(1.1e15, rel=0.02)


def test_a_torus_crosses_nodes_and_ends_at_its_largest_slice() -> None:
    assert Cluster.build(V4, 64, 4).domain == 64
    assert Cluster.build(V4, 64, 4).torus == (4, 4, 4)
    two = Cluster.build(V4, 8192, 4)
    assert (two.domain, two.torus) == (4096, (16, 16, 16))
    crossing = two.collective("all_reduce", 64e9, 8192, 4096)
    assert crossing.link_bytes["network"] == pytest.approx(2 * 64e9 / 4096 / 2)
    assert Cluster.build(load("tpu-v5p"), 8192, 4).torus == (16, 16, 16)  # not 6144 and the rest
    assert crossing.time_s >= two.collective("all_reduce", 64e9, 4096, 4096).time_s


def test_a_chip_without_a_network_says_what_to_give_when_its_fabric_ends() -> None:
    assert Cluster.build(EDGE, 256, 8).domain == 256
    small = load({"base": "systolic-edge", "set": {"links.fabric.domain": 16}})
    with pytest.raises(
        InputError, match=r"64 devices are more than the 16 on one fabric.*give system\.network\.inter_node"
    ):
        Cluster.build(small, 64, 8)
    joined = Cluster.build(small, 64, 8, network={"inter_node": "400 Gb/s"})
    assert joined.collective(Collective("all_reduce", 1e9, 64, 16).kind, 1e9, 64, 16).link_bytes["network"] > 0
