"""Collectives over one or two tiers of links: bytes per device and tier, time alone, by the algorithms allowed.

What a group can send on a tier is in `topology.py`, what each algorithm sends in `algorithms.py`, what a hop costs by
the library's protocols in `protocols.py`, and tori in `torus.py`; here they come together.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hwmodels.interconnect import torus
from hwmodels.interconnect.algorithms import FORMS, LIBRARY, METHODS, PHASES, Form, logarithm, volume
from hwmodels.interconnect.links import Link
from hwmodels.interconnect.protocols import (
    CHUNK_BYTES,
    MESSAGE_S,
    MESSAGES_PER_CORE,
    PROTOCOLS,
    SIMPLE,
    TREE_SHARE,
    Protocol,
)
from hwmodels.interconnect.topology import Reach
from hwmodels.work import Collective

__all__ = ["CollectiveCost", "Group", "Plan", "memory_bytes", "plans", "volume"]

_REDUCING = ("all_reduce", "reduce_scatter")


@dataclass(frozen=True, slots=True)
class CollectiveCost:
    """What a collective costs when it runs alone: time_s = latency_s + the longest of link_bytes[tier] /
    bandwidth[tier].

    link_bytes: bytes that one device sends on each tier ("fabric", "network"). bandwidth: bytes per second and device
    that it could take alone there. core_share, memory_share: fractions of the cores and of the sustained memory
    bandwidth that its kernel holds while it runs. energy_j: dynamic energy of one device, its links' and its memory's.
    algorithm: the one chosen, with its protocol where that is not the simple one ("ring ll128").
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


@dataclass(frozen=True, slots=True)
class Group:
    """A collective's members on the tiers: `nodes` of them, `local` on each (on average), and what they reach there.

    `box`: the members of a node as a box of a torus, where the fabric is one.
    """

    nodes: int
    local: float
    fabric: Link
    network: Link
    on_fabric: Reach
    on_network: Reach
    box: torus.Torus | None = None

    @property
    def devices(self) -> float:
        """All members."""
        return self.nodes * self.local

    @property
    def launch_s(self) -> float:
        """Fixed time of the kernel."""
        return self.fabric.launch_s if self.local > 1 else self.network.launch_s

    def reach(self, tier: str) -> Reach:
        """What members reach on `tier`."""
        return self.on_fabric if tier == "fabric" else self.on_network

    def hop(self, tier: str, far: bool, protocol: Protocol) -> float:
        """Seconds of one step on `tier`."""
        reach = self.reach(tier)
        return protocol.hop_s(tier, reach.far_s if far else reach.hop_s)

    def rate(self, tier: str, even: bool, protocol: Protocol, sent: float, buffer: float) -> float:
        """Bytes per second of a member that sends `sent` of a `buffer`, with the copying that the fabric hides not."""
        reach = self.reach(tier)
        link = (reach.spread if even else reach.ring) * protocol.bandwidth
        copy = self.fabric.copy_bytes_per_s
        if tier == "network" or not copy or not sent:
            return link
        return 1.0 / (1.0 / link + buffer / sent / copy)


def plans(work: Collective, group: Group, allowed: Sequence[str] = LIBRARY) -> list[Plan]:
    """The ways in which `work` can be done by the `allowed` algorithms; by the library's own, where none of them does
    it.
    """
    if work.devices <= 1:
        return [Plan("none", 0.0, {}, {})]
    if group.box is not None and group.local > 1:
        return [_torus(work, group, group.box)]
    if work.kind == "send_recv":
        return [_message(work, group)]
    return list(_ways(work, group, allowed)) or list(_ways(work, group, LIBRARY))


def memory_bytes(work: Collective, link_bytes: dict[str, float]) -> float:
    """Bytes that the kernel moves in one device's memory: each byte sent is read and one received is written, and a
    sum reads one more.
    """
    sent = min(max(link_bytes.values(), default=0.0), 2.0 * work.bytes)  # not what a torus only passes on
    return (3.0 if work.kind in _REDUCING else 2.0) * sent


def _ways(work: Collective, group: Group, allowed: Sequence[str]) -> Iterator[Plan]:
    if work.kind == "all_to_all":
        if "grouped" in allowed:
            yield _grouped(work, group)
    elif "ring" in allowed:
        yield from (_ring(work, group, protocol) for protocol in PROTOCOLS)
    if work.kind == "all_reduce":
        if "tree" in allowed:
            yield from (_tree(work, group, protocol) for protocol in PROTOCOLS)
        if "in-network" in allowed and (group.fabric.in_network_reduction or group.network.in_network_reduction):
            yield _in_network(work, group)
    for name in allowed:
        phases = _phases(work.kind, name, group)
        if phases:
            yield from (_phased(work, group, name, phases, protocol) for protocol in PROTOCOLS)


def _message(work: Collective, group: Group) -> Plan:
    tier = "network" if group.nodes > 1 else "fabric"
    link, reach = (group.network, group.on_network) if group.nodes > 1 else (group.fabric, group.on_fabric)
    return Plan("send_recv", link.p2p_launch_s + reach.far_s, {tier: work.bytes}, {tier: reach.message})


def _grouped(work: Collective, group: Group) -> Plan:
    """A message to every other member, as many under way as thread blocks can hold."""
    others = {"fabric": group.local - 1, "network": group.devices - group.local}
    sent, rates, latency = {}, {}, 0.0
    for tier, count in others.items():
        if count <= 0:
            continue
        sent[tier] = work.bytes * count / group.devices
        rates[tier] = group.reach(tier).spread
        cores = (group.fabric if tier == "fabric" else group.network).collective_cores
        rounds = math.ceil(count / (MESSAGES_PER_CORE * max(1, cores)))
        latency = max(latency, rounds * group.reach(tier).far_s + (math.ceil(count) - 1) * MESSAGE_S[tier])
    return Plan("grouped", group.launch_s + latency, sent, rates)


def _ring(work: Collective, group: Group, protocol: Protocol) -> Plan:
    """One ring through all members; on several nodes one ring per member of a node, each crossing by its own network
    port. A broadcast goes along it in chunks.
    """
    moved = work.bytes * volume(work.kind, group.devices)
    laps = 2 if work.kind == "all_reduce" else 1
    sent, rates = {}, {}
    latency = group.launch_s + protocol.base_s
    if group.local > 1:
        sent["fabric"] = moved
        rates["fabric"] = group.rate("fabric", False, protocol, moved, work.bytes)
        if group.on_fabric.chain and work.kind == "all_reduce":
            rates["fabric"] *= volume(work.kind, group.local)  # sums down one way, results back the other
        inside = group.devices - group.nodes if group.nodes > 1 else group.devices - 1
        latency += laps * inside * group.hop("fabric", False, protocol)
    if group.nodes > 1:
        sent["network"] = moved / group.local
        rates["network"] = group.rate("network", False, protocol, moved, work.bytes)
        latency += laps * (group.nodes - 1) * group.hop("network", False, protocol)
    if work.kind == "broadcast":
        inner = {"fabric": group.devices - group.nodes, "network": group.nodes - 1}
        latency += sum(inner[tier] * _fill_s(work, protocol, rate) for tier, rate in rates.items())
    return Plan(_named("ring", protocol), max(latency, 0.0), sent, rates)


def _tree(work: Collective, group: Group, protocol: Protocol) -> Plan:
    """NCCL's double binary tree between nodes and a chain inside each: up with sums, down with results, in chunks."""
    sent, rates = {}, {}
    latency = group.launch_s + protocol.base_s
    if group.local > 1:
        # A chain sends everything up and everything down once on its busiest links.
        sent["fabric"] = 2.0 * work.bytes
        rates["fabric"] = TREE_SHARE * group.rate("fabric", False, protocol, sent["fabric"], work.bytes)
        step = group.hop("fabric", False, protocol) + _fill_s(work, protocol, rates["fabric"])
        latency += 2.0 * (group.local - 1) * step
    if group.nodes > 1:
        sent["network"] = 2.0 * work.bytes * (group.nodes - 1) / group.nodes / group.local
        rates["network"] = TREE_SHARE * group.rate("network", False, protocol, sent["network"], work.bytes)
        step = group.hop("network", True, protocol) + _fill_s(work, protocol, rates["network"])
        latency += 2.0 * logarithm(group.nodes) * step
    return Plan(_named("tree", protocol), max(latency, 0.0), sent, rates)


def _fill_s(work: Collective, protocol: Protocol, rate: float) -> float:
    """Seconds until a stage has the first chunk whole; the protocols with flags pass single lines on."""
    return min(work.bytes, CHUNK_BYTES) / rate if protocol is SIMPLE else 0.0


def _in_network(work: Collective, group: Group) -> Plan:
    """An all-reduce summed by the switches (NVLink SHARP, InfiniBand SHARP), where they can; rings where they cannot.

    Inside a node each member asks the switch for the sum of its part and has it sent to all: it sends its whole buffer
    to the others' parts, and its own part's result. Between nodes each node's share goes up once and comes down once.
    """
    sent, rates = {}, {}
    latency = group.launch_s
    if group.local > 1:
        if group.fabric.in_network_reduction:
            sent["fabric"] = work.bytes * (1.0 + 1.0 / group.local)
            whole = group.fabric.bandwidth_bytes_per_s * group.fabric.reduction_efficiency
            rates["fabric"] = whole * min(1.0, group.on_fabric.spread / group.fabric.sustained_bytes_per_s)
            latency += 2.0 * group.on_fabric.far_s
        else:
            sent["fabric"] = work.bytes * volume("all_reduce", group.local)
            rates["fabric"] = group.rate("fabric", False, SIMPLE, sent["fabric"], work.bytes)
            latency += 2.0 * (group.local - 1) * group.on_fabric.hop_s
    if group.nodes > 1:
        rates["network"] = group.rate("network", False, SIMPLE, work.bytes, work.bytes)
        if group.network.in_network_reduction:
            sent["network"] = work.bytes / group.local
            latency += 2.0 * group.on_network.far_s
        else:
            sent["network"] = work.bytes / group.local * volume("all_reduce", group.nodes)
            latency += 2.0 * (group.nodes - 1) * group.on_network.hop_s
    return Plan("in-network", latency, sent, rates)


def _phases(kind: str, name: str, group: Group) -> list[tuple[str, Form]]:
    """(tier, form) of each phase of an algorithm; none where it cannot do this."""
    if group.local <= 1 or group.nodes == 1:
        form = None if name in LIBRARY else FORMS.get(kind, {}).get(name)
        return [("fabric" if group.nodes == 1 else "network", form)] if form else []
    if name != "hierarchical" and name not in FORMS.get(kind, {}):
        return []
    found = [(tier, METHODS.get(name, {}).get(phase), phase) for tier, phase in PHASES.get(kind, ())]
    return [(tier, FORMS[phase][form]) for tier, form, phase in found if form]


def _phased(work: Collective, group: Group, name: str, phases: Sequence[tuple[str, Form]], protocol: Protocol) -> Plan:
    """Phases one after the other; each tier's rate is the mean over the whole time, so that this adds up."""
    latency, seconds = group.launch_s + protocol.base_s, 0.0
    sent: dict[str, float] = {}
    for tier, form in phases:
        members = group.nodes if tier == "network" else math.ceil(group.local)
        steps = form(members)
        buffer = work.bytes / group.local if tier == "network" and work.kind != "all_to_all" else work.bytes
        moved = steps.volume * buffer
        sent[tier] = sent.get(tier, 0.0) + moved
        seconds += moved / group.rate(tier, not steps.neighbours, protocol, moved, buffer)
        latency += steps.hops * group.hop(tier, not steps.neighbours, protocol)
    rates = {tier: amount / seconds if seconds else group.reach(tier).ring for tier, amount in sent.items()}
    return Plan(_named(name, protocol), max(latency, 0.0), sent, rates)


def _named(name: str, protocol: Protocol) -> str:
    return name if protocol is SIMPLE else f"{name} {protocol.name}"


def _torus(work: Collective, group: Group, ours: torus.Torus) -> Plan:
    """Rings along the dimensions of the group's part of the torus; between tori each member by its own network port."""
    fabric, nodes = group.fabric, group.nodes
    crossing = volume(work.kind, nodes) * work.bytes
    laps = 2 if work.kind == "all_reduce" else 1
    if work.kind == "all_to_all":
        sent = ours.all_to_all_bytes(work.bytes / nodes)
        seconds = ours.all_to_all_s(work.bytes / nodes)
    elif work.kind in ("send_recv", "broadcast"):  # one path, or one tree that is filled without a break
        sent = work.bytes
        efficiency = fabric.p2p_efficiency / fabric.efficiency if work.kind == "send_recv" else 1.0
        seconds = sent / (ours.link_bytes_per_s * efficiency)
    else:
        sent = work.bytes * volume(work.kind, ours.devices)
        seconds = laps * ours.gather_s(work.bytes)
        crossing /= ours.devices
    if fabric.copy_bytes_per_s:
        seconds += work.bytes / fabric.copy_bytes_per_s
    hops = 1 if work.kind == "send_recv" else ours.steps
    launch = fabric.p2p_launch_s if work.kind == "send_recv" else fabric.launch_s
    latency = launch + laps * hops * fabric.latency_s
    sends, rates = {"fabric": sent}, {"fabric": sent / seconds if seconds else ours.link_bytes_per_s}
    if nodes > 1:
        reach = group.on_network
        sends["network"], rates["network"] = crossing, reach.spread if work.kind == "all_to_all" else reach.ring
        latency += laps * (nodes - 1) * reach.hop_s
    return Plan("torus", latency, sends, rates)
