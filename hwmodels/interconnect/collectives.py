"""Collectives by algorithm over one or two tiers of links: bytes per device and tier, steps, time alone.

Volumes are the closed forms of ring and tree algorithms (Thakur, Rabenseifner, Gropp 2005; NCCL's double binary
trees): all_reduce moves 2 (n-1)/n of the buffer per device, all_gather, reduce_scatter and all_to_all (n-1)/n,
broadcast and send_recv the message. On a torus, `torus.py`.
"""

import math
from dataclasses import dataclass

from hwmodels.interconnect import torus
from hwmodels.interconnect.links import Link
from hwmodels.work import Collective

_REDUCING = ("all_reduce", "reduce_scatter")


@dataclass(frozen=True, slots=True)
class CollectiveCost:
    """What a collective costs when it runs alone: time_s = latency_s + the longest of link_bytes[tier] /
    bandwidth[tier].

    link_bytes: bytes that one device sends on each tier ("fabric", "network"). bandwidth: bytes per second and device
    that it could take alone there. core_share, memory_share: fractions of the cores and of the sustained memory
    bandwidth that its kernel holds while it runs. energy_j: dynamic energy of one device. algorithm: the one chosen.
    """

    time_s: float
    latency_s: float
    link_bytes: dict[str, float]
    bandwidth: dict[str, float]
    core_share: float
    memory_share: float
    energy_j: float
    algorithm: str


@dataclass(frozen=True, slots=True)
class Plan:
    """One algorithm's way: fixed part, and bytes per device and rate for each tier that it uses."""

    algorithm: str
    latency_s: float
    link_bytes: dict[str, float]
    bandwidth: dict[str, float]

    @property
    def time_s(self) -> float:
        """Seconds alone; tiers work at once, pipelined in chunks."""
        return self.latency_s + max(
            (amount / self.bandwidth[tier] for tier, amount in self.link_bytes.items()), default=0.0
        )


def volume(kind: str, members: int) -> float:
    """Bytes that each of `members` devices sends, as a fraction of the buffer, by the bandwidth-optimal algorithm."""
    if members <= 1:
        return 0.0
    if kind in ("broadcast", "send_recv"):
        return 1.0
    share = (members - 1) / members
    return 2.0 * share if kind == "all_reduce" else share


def plans(work: Collective, fabric: Link, network: Link, whole: tuple[int, ...] = ()) -> list[Plan]:
    """The algorithms that can do `work`; its `per_node` members share `fabric`, and `network` joins the nodes.

    `whole`: the sizes of the torus that the fabric is, if it is one.
    """
    if work.devices <= 1:
        return [Plan("none", 0.0, {}, {})]
    nodes = math.ceil(work.devices / work.per_node)
    local = work.devices / nodes
    if whole and local > 1:
        return [_torus(work, nodes, torus.group(whole, work.per_node, fabric), fabric, network)]
    if work.kind == "send_recv":
        return [_point_to_point(work, "network" if nodes > 1 else "fabric", network if nodes > 1 else fabric)]
    if work.kind == "all_to_all":
        return [_all_to_all(work, nodes, local, fabric, network)]
    found = [_ring(work, nodes, local, fabric, network)]
    if work.kind == "all_reduce":
        found.append(_tree(work, nodes, local, fabric, network))
    return found


def memory_bytes(work: Collective, link_bytes: dict[str, float]) -> float:
    """Bytes that the kernel moves in one device's memory: each byte sent is read and one received is written, and a
    sum reads one more.
    """
    sent = min(max(link_bytes.values(), default=0.0), 2.0 * work.bytes)  # not what a torus only passes on
    return (3.0 if work.kind in _REDUCING else 2.0) * sent


def _rate(link: Link, sent: float, buffer: float) -> float:
    """Bytes per second and device, with the part of the copying in local memory that is not hidden."""
    if link.copy_bytes_per_s == 0.0 or sent == 0.0:
        return link.sustained_bytes_per_s
    return 1.0 / (1.0 / link.sustained_bytes_per_s + buffer / sent / link.copy_bytes_per_s)


def _point_to_point(work: Collective, tier: str, link: Link) -> Plan:
    rate = link.bandwidth_bytes_per_s * link.p2p_efficiency
    return Plan("send_recv", link.p2p_launch_s + link.latency_s, {tier: work.bytes}, {tier: rate})


def _all_to_all(work: Collective, nodes: int, local: float, fabric: Link, network: Link) -> Plan:
    sent, rates = {}, {}
    latency = fabric.launch_s if local > 1 else network.launch_s
    if local > 1:
        sent["fabric"] = work.bytes * (local - 1) / work.devices
        rates["fabric"] = fabric.sustained_bytes_per_s
        latency += fabric.latency_s
    if nodes > 1:
        sent["network"] = work.bytes * (work.devices - local) / work.devices
        rates["network"] = network.sustained_bytes_per_s
        latency += network.latency_s
    return Plan("pairwise", latency, sent, rates)


def _ring(work: Collective, nodes: int, local: float, fabric: Link, network: Link) -> Plan:
    """One ring through all members; on several nodes one ring per member of a node, each crossing by its own network
    port.
    """
    moved = work.bytes * volume(work.kind, work.devices)
    laps = 2 if work.kind == "all_reduce" else 1
    sent, rates = {}, {}
    latency = fabric.launch_s if local > 1 else network.launch_s
    if local > 1:
        sent["fabric"] = moved
        rates["fabric"] = _rate(fabric, moved, work.bytes)
        latency += laps * (work.devices - max(nodes, 1)) * fabric.latency_s
    if nodes > 1:
        sent["network"] = moved / local
        rates["network"] = network.sustained_bytes_per_s
        latency += laps * (nodes - 1) * network.latency_s
    if nodes == 1:
        latency = fabric.launch_s + laps * (work.devices - 1) * fabric.latency_s
    return Plan("ring", latency, sent, rates)


def _torus(work: Collective, nodes: int, ours: torus.Torus, fabric: Link, network: Link) -> Plan:
    """Rings along the dimensions of the group's part of the torus; between tori each member by its own network port."""
    local = ours.devices
    crossing = volume(work.kind, nodes) * work.bytes
    if work.kind == "all_to_all":
        sent = ours.all_to_all_bytes(work.bytes / nodes)
        seconds, laps = ours.all_to_all_s(work.bytes / nodes), 1
    elif work.kind in ("send_recv", "broadcast"):  # one path, or one tree that is filled without a break
        sent, laps = work.bytes, 1
        efficiency = fabric.p2p_efficiency / fabric.efficiency if work.kind == "send_recv" else 1.0
        seconds = sent / (ours.link_bytes_per_s * efficiency)
    else:
        laps = 2 if work.kind == "all_reduce" else 1
        sent = work.bytes * volume(work.kind, local)
        seconds = laps * ours.gather_s(work.bytes)
        crossing /= local
    if fabric.copy_bytes_per_s:
        seconds += work.bytes / fabric.copy_bytes_per_s
    hops = 1 if work.kind == "send_recv" else ours.steps
    launch = fabric.p2p_launch_s if work.kind == "send_recv" else fabric.launch_s
    latency = launch + laps * hops * fabric.latency_s
    sends, rates = {"fabric": sent}, {"fabric": sent / seconds if seconds else ours.link_bytes_per_s}
    if nodes > 1:
        sends["network"], rates["network"] = crossing, network.sustained_bytes_per_s
        latency += laps * (nodes - 1) * network.latency_s
    return Plan("torus", latency, sends, rates)


def _tree(work: Collective, nodes: int, local: float, fabric: Link, network: Link) -> Plan:
    """NCCL's double binary tree between nodes and a chain inside each: up with sums, down with results."""
    sent, rates = {}, {}
    latency = fabric.launch_s if local > 1 else network.launch_s
    if local > 1:
        # A chain sends everything up and everything down once on its busiest links.
        sent["fabric"] = 2.0 * work.bytes
        rates["fabric"] = _rate(fabric, sent["fabric"], work.bytes)
        latency += 2.0 * (local - 1) * fabric.latency_s
    if nodes > 1:
        sent["network"] = 2.0 * work.bytes * (nodes - 1) / nodes / local
        rates["network"] = network.sustained_bytes_per_s
        latency += 2.0 * math.ceil(math.log2(nodes)) * network.latency_s
    return Plan("tree", latency, sent, rates)
