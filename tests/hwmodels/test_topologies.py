"""What groups reach on each topology: links counted one by one, published machines, and how groups share ports."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from cosim.calibrate.rows import read_collectives
from cosim.parallel.groups import group
from hwmodels.accelerator import load
from hwmodels.cluster import Cluster
from hwmodels.interconnect import cube_mesh
from hwmodels.interconnect.links import Link
from hwmodels.interconnect.topology import Place, reach
from hwmodels.units import InputError
from hwmodels.work import Collective

PUBLISHED = Path(__file__).parents[2] / "cosim" / "validate" / "published"
PORT = 10e9
PLAIN = Link(PORT, 5e-6, "fat-tree", efficiency=1.0, radix=8, switch_latency_s=1e-6, p2p_efficiency=1.0)
V100, H100 = load("v100-sxm2-16gb"), load("h100-sxm-80gb")


def spread_over_leaves(link: Link, nodes: int, ports: int, active: int, below: int) -> float:
    """Rate of a member in an even exchange, from the messages over each leaf's uplinks and over each port."""
    up: dict[int, float] = {}
    leaves = {node: node // below for node in range(nodes)}
    for source, target in itertools.permutations(range(nodes), 2):
        if leaves[source] != leaves[target]:
            up[leaves[source]] = up.get(leaves[source], 0.0) + active / nodes
    own = (nodes - 1) / nodes
    slowest = max(
        own * max(1.0, active / ports) / PORT,
        *(x * link.oversubscription / (below * ports * PORT) for x in up.values()),
    )
    return own / slowest


@pytest.mark.parametrize("over", [1.0, 3.0])
@pytest.mark.parametrize(("nodes", "ports", "active"), [(24, 1, 1), (12, 2, 2), (12, 2, 1), (24, 2, 2), (12, 1, 4)])
def test_an_even_exchange_in_a_fat_tree_is_as_fast_as_its_busiest_uplink(
    nodes: int, ports: int, active: int, over: float
) -> None:
    link = replace(PLAIN, oversubscription=over, devices_per_port=active if active > ports else 1)
    devices = ports * link.devices_per_port
    below = int(8 * over / (1 + over)) // ports
    found = reach(replace(link, bandwidth_bytes_per_s=PORT / link.devices_per_port), Place(nodes, 1, active, devices))
    assert nodes % below == 0
    assert found.spread == pytest.approx(spread_over_leaves(link, nodes, ports, active, below))


def test_a_ring_leaves_each_leaf_once_so_oversubscription_hurts_exchanges_and_not_rings() -> None:
    thin = replace(PLAIN, oversubscription=3.0)  # six nodes below a leaf, two uplinks
    found = reach(thin, Place(24))
    assert found.ring == PORT
    assert found.spread == pytest.approx(PORT / 3 * 23 / 18)
    apart = reach(thin, Place(4, step=6))  # a group with a member below each leaf, as five groups more
    assert apart.ring == pytest.approx(PORT / 3)


def test_rails_keep_more_nodes_below_one_switch_than_a_plain_tree() -> None:
    """Eight ports per node below 64-port switches: 32 nodes share each rail's leaf, and 4 a plain leaf."""
    plain = Link(PORT, 5e-6, "fat-tree", switch_latency_s=1e-6)
    rails = replace(plain, topology="rail-optimised")
    reached = {nodes: [reach(x, Place(nodes, 1, 8, 8)).far_s for x in (rails, plain)] for nodes in (4, 32, 33, 512)}
    microseconds = {nodes: [round(s * 1e6) for s in far] for nodes, far in reached.items()}
    assert microseconds == {4: [5, 5], 32: [5, 7], 33: [7, 7], 512: [7, 9]}


def test_a_dragonfly_without_detours_has_one_link_to_the_next_group() -> None:
    """Radix 7: two ports of devices, two global links per router, four routers: groups of 8, and 9 of them at most
    (Kim, Dally, Scott, Abts 2008).
    """
    fly = replace(PLAIN, topology="dragonfly", radix=7)
    whole = Place(72)
    assert reach(fly, whole).spread == PORT  # 64 of 72 messages of 8 devices over 8 links
    assert reach(replace(fly, routing="valiant"), whole).spread == pytest.approx(PORT / 2 * 71 / 64)
    # every device to the same place in the next group: 8 devices on one link, or on half of all eight
    next_group = Place(9, step=8)
    assert reach(fly, next_group).ring == pytest.approx(PORT / 8)
    assert reach(replace(fly, routing="valiant"), next_group).ring == pytest.approx(PORT / 2)
    assert reach(fly, Place(8)).ring == reach(fly, Place(8)).spread == PORT
    assert [round(reach(fly, Place(n)).far_s * 1e6) for n in (2, 8, 72)] == [5, 6, 8]


def test_a_pcie_tree_is_a_fat_tree_of_small_switches() -> None:
    """Four cards below a switch with one uplink: their ring passes it once each way; an exchange between switches
    shares it.
    """
    tree = replace(PLAIN, radix=5, oversubscription=4.0)
    assert reach(tree, Place(4)).spread == PORT
    assert reach(tree, Place(8)).ring == PORT
    assert reach(tree, Place(8)).spread == pytest.approx(PORT / 4 * 7 / 4)
    assert reach(tree, Place(2, step=4)).ring == pytest.approx(PORT / 4)  # four pairs across, one uplink


def test_direct_links_to_seven_others_are_a_seventh_each() -> None:
    """MI300X: 448 GB/s are seven links of 64 GB/s; a pair has one of them, a node all (AMD CDNA 3 white paper)."""
    link = Link(448e9, 1e-6, "all-to-all", efficiency=1.0, domain=8, p2p_efficiency=1.0)
    assert reach(link, Place(2)).ring == reach(link, Place(2)).message == pytest.approx(64e9)
    assert reach(link, Place(8)).ring == reach(link, Place(8)).spread == pytest.approx(448e9)
    assert reach(link, Place(8)).message == pytest.approx(64e9)


# The hybrid cube mesh of a DGX-1.


def test_every_device_of_the_cube_mesh_has_six_links_of_which_rings_use_all() -> None:
    for device in range(8):
        assert sum(cube_mesh._LINKS.get((device, other), 0) for other in range(8)) == 6
    assert [cube_mesh.rings(tuple(range(n))) for n in range(2, 9)] == [1, 2, 4, 0, 2, 4, 6]
    assert cube_mesh.rings((0, 3)) == 2
    assert cube_mesh.rings((4, 5, 6, 7)) == 4


@pytest.mark.parametrize("n", range(2, 9))
def test_rings_of_the_cube_mesh_are_those_that_nccl_finds(n: int) -> None:
    """vTrain's nccl-tests on a node of V100: 22.5, 45, 85, 37, 46, 87 and 135 GB/s on 2 to 8 devices, where six links
    were one constant away from each.
    """
    node = Cluster.build(V100, 8, 8)
    rows = [r for r in read_collectives(PUBLISHED / "collectives.csv") if r.label == "v100_node"]
    errors = []
    for row in rows:
        work = row.works[0]
        assert isinstance(work, Collective)
        if work.devices == n and work.bytes >= 2**24:
            errors.append(abs(node.collective_cost(work).time_s / row.time_s - 1))
    assert len(errors) > 50
    assert sum(errors) / len(errors) < 0.06


# Switches that add up.


def test_nvlink_sharp_reaches_what_nccl_reports() -> None:
    """Eight H100: 480 GB/s of bus bandwidth with reduction in the switches, 370 without (NVIDIA/nccl-tests issues 212
    and 309); and a run has to allow it.
    """
    size = 8 * 2.0**30
    bus = {}
    for sharp in (False, True):
        node = Cluster.build(H100, 8, 8, network={"in_network_reduction": sharp})
        found = node.collective("all_reduce", size, 8, 8)
        bus[found.algorithm] = 1.75 * size / found.time_s
    assert bus["in-network"] == pytest.approx(480e9, rel=0.03)
    assert bus["ring"] == pytest.approx(370e9, rel=0.06)
    capable = load({"base": "h100-sxm-80gb", "set": {"links.fabric.in_network_reduction": True}}, "accelerator")
    assert Cluster.build(capable, 8, 8).collective("all_reduce", size, 8, 8).algorithm == "ring"
    allowed = Cluster.build(capable, 8, 8, network={"algorithms": ["ring", "in-network"]})
    assert allowed.collective("all_reduce", size, 8, 8).algorithm == "in-network"


def test_switches_that_sustain_less_while_they_add_up_are_slower() -> None:
    slow = load({"base": "h100-sxm-80gb", "set": {"calibration.links.fabric.reduction_efficiency": 0.3}}, "accelerator")
    allowed = {"in_network_reduction": True, "algorithms": ["in-network"]}
    times = [Cluster.build(chip, 8, 8, network=allowed).collective("all_reduce", 1e9, 8, 8) for chip in (H100, slow)]
    assert times[1].time_s > 2 * times[0].time_s


def test_four_nodes_of_h100_reach_what_was_measured() -> None:
    """32 H100 with a 400 Gb/s port each: 320 GB/s of bus bandwidth at 8 GB without reduction in switches
    (NVIDIA/nccl issue 1221).
    """
    found = Cluster.build(H100, 32, 8).collective("all_reduce", 8e9, 32, 8)
    assert 2 * 31 / 32 * 8e9 / found.time_s == pytest.approx(320e9, rel=0.08)


def test_sharp_between_nodes_halves_what_each_port_sends() -> None:
    nodes = {sharp: Cluster.build(H100, 512, 8, network={"in_network_reduction": sharp}) for sharp in (False, True)}
    sent = {sharp: x.collective("all_reduce", 1e9, 512, 8).link_bytes["network"] for sharp, x in nodes.items()}
    assert sent[True] == pytest.approx(1e9 / 8)
    assert sent[False] / sent[True] == pytest.approx(2.0, rel=0.03)


# Groups on tiers.


def test_a_data_parallel_group_per_place_uses_a_port_per_device() -> None:
    """Eight tensor-parallel ranks per node, so eight data-parallel groups of one member per node: each its own port."""
    cluster = Cluster.build(H100, 64, 8)
    one = cluster.collective_cost(Collective("all_reduce", 1e9, 8, 1, stride=8))
    eight = cluster.collective_cost(Collective("all_reduce", 1e9, 8, 1, stride=8, concurrent=8))
    assert one.time_s == eight.time_s
    assert set(one.link_bytes) == {"network"}
    together = cluster.collective_cost(Collective("all_reduce", 8e9, 64, 8))  # all devices, eight times the buffer
    assert eight.link_bytes["network"] == pytest.approx(together.link_bytes["network"], rel=0.15)


def test_two_devices_behind_one_port_share_it_only_when_both_send() -> None:
    """A DGX-1 has four 100 Gb/s ports for eight devices."""
    cluster = Cluster.build(V100, 64, 8)
    alone = cluster.collective_cost(Collective("all_gather", 1e9, 8, 1, stride=8)).bandwidth["network"]
    four = cluster.collective_cost(Collective("all_gather", 1e9, 8, 1, stride=8, concurrent=4)).bandwidth["network"]
    eight = cluster.collective_cost(Collective("all_gather", 1e9, 8, 1, stride=8, concurrent=8)).bandwidth["network"]
    assert alone == four == pytest.approx(12.5e9 * 0.85)
    assert eight == pytest.approx(6.25e9 * 0.85)
    message = [cluster.collective_cost(Collective("send_recv", 1e9, 2, 1, 8, n)).bandwidth["network"] for n in (1, 8)]
    assert message[0] == pytest.approx(2 * message[1])


@pytest.mark.parametrize(("members", "stride"), [(4, 1), (4, 4), (4, 16), (2, 16), (8, 8), (64, 1), (16, 4)])
def test_groups_are_laid_out_domain_by_domain(members: int, stride: int) -> None:
    """Of 64 devices in nodes of 8: who shares a node, and how many groups do, found by numbering the devices."""
    work = group(members, stride, 8, 64).collective("all_gather", 1e9)
    blocks = [range(first, first + members * stride) for first in range(0, 64, members * stride)]
    found = [[device for device in block if device % stride == lane] for block in blocks for lane in range(stride)]
    assert {len({device // 8 for device in one}) for one in found} == {-(-members // work.per_node)}
    assert {sum(device < 8 for device in one) for one in found} <= {0, work.per_node}
    if members > work.per_node:  # where they cross the network
        assert sum(any(device < 8 for device in one) for one in found) == work.concurrent
    assert Cluster.build(H100, 64, 8).collective_cost(work).time_s > 0


def test_stages_far_apart_meet_above_their_leaf() -> None:
    """All nodes below a leaf send to the next stage at once, over two uplinks for six."""
    near, far = (reach(replace(PLAIN, oversubscription=3.0), Place(2, step)) for step in (1, 6))
    assert near.message == PORT
    assert far.message == pytest.approx(PORT / 3)


def test_a_bridge_joins_neighbours_and_not_every_second_card() -> None:
    node = Cluster.build(load("a100-pcie-80gb"), 4, 4)
    near = node.collective_cost(Collective("all_reduce", 1e8, 2, 2))
    apart = node.collective_cost(Collective("all_reduce", 1e8, 2, 2, stride=2))
    assert apart.time_s > 5 * near.time_s


def test_a_group_that_does_not_fit_is_one_sentence() -> None:
    cluster = Cluster.build(H100, 64, 8)
    with pytest.raises(InputError, match="a stride of 4 does not fit on the 8 devices of one fabric"):
        cluster.collective_cost(Collective("all_reduce", 1e6, 4, 4, stride=4))
    with pytest.raises(InputError, match="3 groups at once must be between 1 and 2"):
        cluster.collective_cost(Collective("all_reduce", 1e6, 8, 4, concurrent=3))


def test_a_rack_of_72_needs_no_network() -> None:
    """GB200 NVL72: the all-reduce of 72 devices stays on NVLink and is faster than over eighteen nodes of four."""
    chip = load("gb200")
    rack, nodes = Cluster.build(chip, 72, 4, nvlink_domain=72), Cluster.build(chip, 72, 4, nvlink_domain=4)
    assert set(rack.collective("all_reduce", 1e9, 72, 72).link_bytes) == {"fabric"}
    assert rack.collective("all_reduce", 1e9, 72, 72).time_s < nodes.collective("all_reduce", 1e9, 72, 4).time_s / 3


@pytest.mark.parametrize(("devices", "domain"), [(4, 4), (36, 36), (72, 72), (128, 64), (144, 72), (576, 72), (2, 2)])
@pytest.mark.parametrize("name", ["gb200", "gb300"])
def test_a_rack_joins_its_nodes_unless_the_run_says_otherwise(name: str, devices: int, domain: int) -> None:
    """As many whole nodes of four as divide the devices evenly, 72 devices at most."""
    assert Cluster.build(load(name), devices, 4).domain == domain
    assert Cluster.build(load(name), devices, 4, nvlink_domain=2).domain == 2


def test_a_board_of_eight_joins_no_smaller_nodes() -> None:
    assert Cluster.build(H100, 16, 4).domain == 4
    assert Cluster.build(load("gh200-sxm"), 16, 1).domain == 1


def test_bytes_on_a_link_cost_that_links_energy() -> None:
    plain = Cluster.build(H100, 16, 8).collective("all_gather", 1e9, 16, 8)
    dear = load({"base": "h100-sxm-80gb", "set": {"links.network.energy_per_byte": "500 pJ"}}, "accelerator")
    more = Cluster.build(dear, 16, 8).collective("all_gather", 1e9, 16, 8)
    per_byte = H100.power.energy_per_byte_j["link"]
    assert more.energy_j - plain.energy_j == pytest.approx(plain.link_bytes["network"] * (500e-12 - per_byte))
