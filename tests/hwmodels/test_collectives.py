"""Collectives: volumes are the closed forms, times are bounded by links, tiers are used as the algorithm says."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.accelerator import load
from hwmodels.cluster import Cluster
from hwmodels.interconnect.collectives import volume
from hwmodels.units import InputError
from hwmodels.work import Collective

A100 = load("a100-sxm-80gb")
NODES = Cluster.build(A100, 64, 8, network={"inter_node": "200 Gb/s"})
KINDS = ["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"]


@given(st.integers(2, 1024))
def test_volumes_are_those_of_bandwidth_optimal_algorithms(n: int) -> None:
    """Thakur, Rabenseifner, Gropp 2005: all-reduce 2 (n-1)/n, all-gather and reduce-scatter (n-1)/n of the buffer."""
    assert volume("all_reduce", n) == pytest.approx(2 * (n - 1) / n)
    assert (
        volume("all_gather", n) == volume("reduce_scatter", n) == volume("all_to_all", n) == pytest.approx((n - 1) / n)
    )


@pytest.mark.parametrize("members", [2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_inside_a_node_a_large_collective_moves_the_optimal_volume_on_the_fabric(kind: str, members: int) -> None:
    cost = NODES.collective(kind, 1e9, members, members)
    assert set(cost.link_bytes) == {"fabric"}
    assert cost.link_bytes["fabric"] == pytest.approx(1e9 * volume(kind, members))
    assert cost.time_s >= cost.link_bytes["fabric"] / 300e9
    assert cost.time_s == pytest.approx(cost.latency_s + cost.link_bytes["fabric"] / cost.bandwidth["fabric"])


@given(
    st.sampled_from(KINDS),
    st.floats(0, 1e10),
    st.sampled_from([(2, 1), (8, 1), (16, 8), (64, 8), (32, 4)]),
)
def test_across_nodes_the_network_is_never_beaten(kind: str, size: float, group: tuple[int, int]) -> None:
    """Each node must send at least its share to the others, and it has `per_node` ports of 25 GB/s for it."""
    devices, per_node = group
    cost = NODES.collective(kind, size, devices, per_node)
    nodes = devices // per_node
    share = {"all_reduce": 2 * (nodes - 1) / nodes, "broadcast": 1.0, "all_to_all": per_node * (nodes - 1) / nodes}
    least = size * share.get(kind, (nodes - 1) / nodes) / per_node
    assert cost.link_bytes["network"] >= least * (1 - 1e-9)
    assert cost.time_s >= least / 25e9
    assert cost.time_s == pytest.approx(
        cost.latency_s + max(amount / cost.bandwidth[tier] for tier, amount in cost.link_bytes.items())
    )
    assert NODES.collective(kind, 2 * size, devices, per_node).time_s >= cost.time_s


def test_more_bandwidth_or_less_latency_is_never_slower() -> None:
    faster = Cluster.build(A100, 64, 8, network={"inter_node": "400 Gb/s", "inter_node_latency": "1 us"})
    for size in (1e3, 1e6, 1e9):
        work = Collective("all_reduce", size, 64, 8)
        assert faster.cost(work).time_s < NODES.cost(work).time_s


def test_a_small_all_reduce_over_many_nodes_takes_the_tree() -> None:
    big = Cluster.build(A100, 1024, 8)
    assert big.collective("all_reduce", 1e6, 1024, 8).algorithm.startswith("tree")
    assert NODES.collective("all_reduce", 1e9, 8, 8).algorithm == "ring"


def test_a_message_goes_over_the_fabric_or_the_network() -> None:
    near, far = NODES.collective("send_recv", 1e8, 2, 2), NODES.collective("send_recv", 1e8, 2, 1)
    assert set(near.link_bytes) == {"fabric"}
    assert set(far.link_bytes) == {"network"}
    assert far.time_s > 5 * near.time_s


def test_nothing_to_do_takes_no_time() -> None:
    cost = NODES.collective("all_reduce", 1e9, 1, 1)
    assert (cost.time_s, cost.link_bytes, cost.core_share) == (0.0, {}, 0.0)


def test_the_kernel_holds_some_cores_and_some_memory_bandwidth() -> None:
    cost = NODES.collective("all_reduce", 1e9, 8, 8)
    assert 0.1 < cost.core_share < 0.3
    assert 0.1 < cost.memory_share < 0.6
    assert cost.energy_j > 0


def test_a_larger_nvlink_domain_keeps_the_group_off_the_network() -> None:
    rack = Cluster.build(A100, 72, 4, nvlink_domain=72)
    assert set(rack.collective("all_reduce", 1e9, 72, 72).link_bytes) == {"fabric"}


def test_bridged_pairs_are_fast_and_the_rest_of_a_pcie_node_is_not() -> None:
    """vidur's node of PCIe A100: 2 devices reach 199 GB/s on the bridge, 4 devices 23.7 GB/s."""
    node = Cluster.build(load("a100-pcie-80gb"), 4, 4)
    bus = {n: 5e8 * volume("all_reduce", n) / node.collective("all_reduce", 5e8, n, n).time_s for n in (2, 4)}
    assert bus[2] == pytest.approx(199e9, rel=0.1)
    assert bus[4] == pytest.approx(23.7e9, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"devices": 0}, "system.devices: 0 must be at least 1"),
        ({"network": {"inter_nod": "400 Gb/s"}}, "system.network.inter_nod is not a known key; allowed are inter_node"),
        ({"network": {"inter_node": "400 W"}}, "'W' in '400 W' is not a unit of bandwidth"),
        ({"network": {"inter_node": "0 Gb/s"}}, "must be greater than zero"),
    ],
)
def test_a_cluster_that_cannot_be_is_one_sentence(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Cluster.build(**{"accelerator": A100, "devices": 16, "devices_per_node": 8, **arguments})  # type: ignore[arg-type]


def test_a_group_that_cannot_be_is_one_sentence() -> None:
    with pytest.raises(InputError, match="per_node must be between 1 and 8"):
        NODES.cost(Collective("all_reduce", 1e6, 16, 16))
    with pytest.raises(InputError, match="finite and not negative"):
        NODES.cost(Collective("all_reduce", float("nan"), 8, 8))


def test_collective_kernels_hold_what_the_link_says() -> None:
    many = replace(NODES, tiers={**NODES.tiers, "fabric": replace(NODES.tiers["fabric"], collective_cores=54)})
    assert many.collective("all_gather", 1e9, 8, 8).core_share == 0.5


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter", "all_reduce"])
@pytest.mark.parametrize("bandwidth", ["300 GB/s", "1 GB/s"])
def test_a_collective_is_no_faster_than_the_memory_that_feeds_it(kind: str, bandwidth: str) -> None:
    slow = load({"base": "a100-sxm-80gb", "set": {"memory.hbm.bandwidth": bandwidth}}, "accelerator")
    cost = Cluster.build(slow, 8, 8).collective(kind, 1e9, 8, 8)
    touched = (2 if kind == "all_gather" else 3) * 1e9 * volume(kind, 8)
    assert cost.time_s >= touched / slow.memory.hbm.rate("stream")
    assert cost.time_s == pytest.approx(cost.latency_s + touched / slow.memory.hbm.rate("stream"), rel=0.01)
    assert cost.time_s > NODES.collective(kind, 1e9, 8, 8).time_s
    assert 0.9 < cost.memory_share <= 1


def test_a_collective_leaves_a_small_chip_half_of_its_cores() -> None:
    small = load({"base": "a100-sxm-80gb", "set": {"matrix.cores": 12}}, "accelerator")
    assert Cluster.build(small, 8, 8).collective("all_gather", 1e9, 8, 8).core_share == 0.5
