"""Devices joined by a fast fabric inside a domain (a node, or a rack) and a network between domains."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hwmodels.accelerator import Accelerator
from hwmodels.interconnect import torus
from hwmodels.interconnect.algorithms import LIBRARY
from hwmodels.interconnect.collectives import CollectiveCost, Group, Plan, memory_bytes, plans
from hwmodels.interconnect.links import Link
from hwmodels.interconnect.tiers import tiers_of
from hwmodels.interconnect.topology import Place, reach
from hwmodels.units import InputError
from hwmodels.work import Collective, Cost

MOST_CORES = 0.5
"""Of a chip's cores, what a collective's kernel holds at most: `collective_cores` are thread blocks of a chip of usual
size, and a library that found fewer cores would start fewer blocks. Assumed; nothing measured has so few.
"""


@dataclass(frozen=True, slots=True)
class Cluster:
    """`devices` equal accelerators, `domain` of them on one fast fabric. Question: what does this collective cost?

    `tiers`: "fabric" inside a domain, "network" between domains; bandwidths per device and direction. `pair`: a faster
    link that joins only that many devices of a domain (NVLink bridges in a PCIe node), used by groups that fit on it.
    `torus`: sizes of the domain's dimensions, where its fabric is a torus. `algorithms`: those that collectives may
    use, the fastest of them each time.
    """

    accelerator: Accelerator
    devices: int
    devices_per_node: int
    domain: int
    tiers: dict[str, Link]
    pair: Link | None = None
    torus: tuple[int, ...] = ()
    algorithms: tuple[str, ...] = LIBRARY
    _costs: dict[Collective, CollectiveCost] = field(default_factory=dict, init=False, repr=False, compare=False)
    _groups: dict[tuple[int, ...], Group] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def build(
        cls,
        accelerator: Accelerator,
        devices: int,
        devices_per_node: int,
        nvlink_domain: int | None = None,
        network: Mapping[str, Any] | None = None,
        where: str = "system",
    ) -> "Cluster":
        """A cluster of `accelerator`; `network` overrides its links, with the keys of a run file's `system.network`
        (see `tiers_of`).

        A torus crosses nodes: its domain is all devices, or as many as the accelerator's file lets a torus have, and
        `nvlink_domain` says nothing about it. Raises InputError: counts below one, an override that cannot be, or
        several domains with no network between them.
        """
        counts = {"devices": devices, "devices_per_node": devices_per_node, "nvlink_domain": nvlink_domain or 1}
        for key, count in counts.items():
            if count < 1:
                raise InputError(f"{where}.{key}: {count!r} must be at least 1")
        links = accelerator.links
        own = (links.fabric, links.host, links.network)
        found = tiers_of(*own, devices_per_node, nvlink_domain is None, network or {}, where)
        domain, sizes = found.domain(devices, devices_per_node, nvlink_domain)
        if domain < devices and found.network is None:
            raise InputError(
                f"{where}.devices: {devices} devices are more than the {domain} on one fabric, and {accelerator.name} "
                f"has no links.network; give {where}.network.inter_node"
            )
        tiers = {"fabric": found.fabric} | ({} if found.network is None else {"network": found.network})
        return cls(accelerator, devices, devices_per_node, domain, tiers, found.pair, sizes, found.algorithms)

    def with_slow_link(self, tier: str, factor: float) -> "Cluster":
        """This cluster with one link of a tier at its bandwidth over `factor`: what crosses the tier goes at that pace.

        Raises InputError: no such tier.
        """
        if tier not in self.tiers or (tier == "network" and self.domain >= self.devices):
            raise InputError(f"tier: there is no {tier} between {self.devices} devices on one fabric")

        def slower(link: Link) -> Link:
            return replace(link, bandwidth_bytes_per_s=link.bandwidth_bytes_per_s / factor)

        pair = slower(self.pair) if self.pair is not None and tier == "fabric" else self.pair
        return replace(self, tiers=self.tiers | {tier: slower(self.tiers[tier])}, pair=pair)

    def collective(
        self, kind: str, bytes: float, devices: int, per_node: int, stride: int = 1, concurrent: int = 1
    ) -> CollectiveCost:
        """What a collective over `devices` members, `per_node` of them in each domain, costs alone; the rest as in
        `Collective`.
        """
        return self.collective_cost(Collective(kind, bytes, devices, per_node, stride, concurrent))  # type: ignore[arg-type]

    def cost(self, work: Collective) -> Cost:
        """The same as a `Cost`, for whoever needs no tiers."""
        found = self.collective_cost(work)
        return Cost(
            time_s=found.time_s,
            flops=0.0,
            bytes_per_level={"hbm": memory_bytes(work, found.link_bytes), "link": sum(found.link_bytes.values())},
            limited_by="latency" if found.latency_s > 0.5 * found.time_s else "link",
            energy_j=found.energy_j,
            core_share=found.core_share,
            memory_share=found.memory_share,
        )

    def collective_cost(self, work: Collective) -> CollectiveCost:
        """What `work` costs alone, by the fastest algorithm. Raises InputError: members or bytes that cannot be."""
        found = self._costs.get(work)
        if found is None:
            found = self._price(work)
            self._costs[work] = found
        return found

    def _price(self, work: Collective) -> CollectiveCost:
        self._check(work)
        where = (work.devices, work.per_node, work.stride, work.concurrent)
        group = self._groups.get(where)
        if group is None:
            group = self._groups[where] = self._group(work)
        chip = self.accelerator
        rate = chip.memory.hbm.rate("stream")
        ways = [_through_memory(plan, work, rate) for plan in plans(work, group, self.algorithms)]
        plan = min(ways, key=lambda found: found.time_s)
        time = plan.time_s
        local = memory_bytes(work, plan.link_bytes)
        tier = group.fabric if "fabric" in plan.link_bytes else group.network
        return CollectiveCost(
            time_s=time,
            latency_s=plan.latency_s,
            link_bytes=plan.link_bytes,
            bandwidth=plan.bandwidth,
            core_share=min(MOST_CORES, tier.collective_cores / chip.cores) if work.devices > 1 else 0.0,
            memory_share=min(1.0, local / time / rate) if time else 0.0,
            energy_j=self._energy_j(local, plan.link_bytes, group),
            algorithm=plan.algorithm,
        )

    def _check(self, work: Collective) -> None:
        what = f"{work.kind} over {work.devices} devices with {work.per_node} per node"
        if not 1 <= work.per_node <= work.devices or work.per_node > self.domain:
            raise InputError(
                f"{what}: per_node must be between 1 and {min(work.devices, self.domain)}, the devices of a group on "
                f"one fabric"
            )
        if not 0 <= work.bytes < float("inf"):
            raise InputError(f"{work.kind} of {work.bytes!r} bytes: the size must be finite and not negative")
        if work.stride < 1 or work.per_node > 1 and (work.per_node - 1) * work.stride >= self.domain:
            raise InputError(
                f"{what}: a stride of {work.stride} does not fit on the {self.domain} devices of one fabric"
            )
        if not 1 <= work.concurrent <= self.domain // work.per_node:
            raise InputError(
                f"{what}: {work.concurrent} groups at once must be between 1 and {self.domain // work.per_node}, "
                f"what the {self.domain} devices of one fabric hold"
            )

    def _group(self, work: Collective) -> Group:
        """The members of `work` on the tiers."""
        nodes = -(-work.devices // work.per_node)
        inside = work.stride if work.per_node > 1 else 1
        fabric = self.tiers["fabric"]
        if self.pair is not None and nodes == 1 and (work.per_node - 1) * inside < self.pair.domain:
            fabric = self.pair
        network = self.tiers.get("network", fabric)  # without one, no group leaves the fabric
        apart = max(1, work.stride // self.domain) if work.per_node == 1 else 1
        box = torus.group(self.torus, work.per_node, fabric, inside) if self.torus and fabric is not self.pair else None
        return Group(
            nodes=nodes,
            local=work.devices / nodes,
            fabric=fabric,
            network=network,
            on_fabric=reach(fabric, Place(work.per_node, inside)),
            on_network=reach(network, Place(nodes, apart, work.per_node * work.concurrent, self.domain)),
            box=box,
        )

    def _energy_j(self, memory: float, link_bytes: Mapping[str, float], group: Group) -> float:
        """Joules of one device: its memory's bytes, and those of each link at the link's own energy or the chip's."""
        power = self.accelerator.power
        joules = power.energy_j(0.0, "fp32", {"hbm": memory})
        for tier, amount in link_bytes.items():
            own = (group.fabric if tier == "fabric" else group.network).energy_per_byte_j
            joules += amount * own if own else power.energy_j(0.0, "fp32", {"link": amount})
        return joules


def _through_memory(plan: Plan, work: Collective, memory_bytes_per_s: float) -> Plan:
    """`plan` at the rate at which the device's own memory can feed its links, where that is the slower."""
    sent = max(plan.link_bytes.values(), default=0.0)
    if not sent:
        return plan
    most = memory_bytes_per_s * sent / memory_bytes(work, plan.link_bytes)
    if max(plan.bandwidth.values()) <= most:
        return plan
    return replace(plan, bandwidth={tier: min(rate, most) for tier, rate in plan.bandwidth.items()})
