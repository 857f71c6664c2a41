"""Devices joined by a fast fabric inside a domain (a node, or a rack) and a switched network between domains."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from hwmodels.accelerator import Accelerator
from hwmodels.interconnect.collectives import CollectiveCost, Plan, memory_bytes, plans
from hwmodels.interconnect.links import TORUS_DIMENSIONS, Link
from hwmodels.interconnect.torus import shape
from hwmodels.units import InputError, parse_quantity
from hwmodels.work import Collective, Cost

_OVERRIDES = {
    "inter_node": ("network", "bandwidth"),
    "inter_node_latency": ("network", "time"),
    "intra_node": ("fabric", "bandwidth"),
    "intra_node_latency": ("fabric", "time"),
}

MOST_CORES = 0.5
"""Of a chip's cores, what a collective's kernel holds at most: `collective_cores` are thread blocks of a chip of usual
size, and a library that found fewer cores would start fewer blocks. Assumed; nothing measured has so few.
"""


@dataclass(frozen=True, slots=True)
class Cluster:
    """`devices` equal accelerators, `domain` of them on one fast fabric. Question: what does this collective cost?

    `tiers`: "fabric" inside a domain, "network" between domains; bandwidths per device and direction. `pair`: a faster
    link that joins only that many devices of a domain (NVLink bridges in a PCIe node), used by groups that fit on it.
    `torus`: sizes of the domain's dimensions, where its fabric is a torus.
    """

    accelerator: Accelerator
    devices: int
    devices_per_node: int
    domain: int
    tiers: dict[str, Link]
    pair: Link | None = None
    torus: tuple[int, ...] = ()
    _costs: dict[Collective, CollectiveCost] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def build(
        cls,
        accelerator: Accelerator,
        devices: int,
        devices_per_node: int,
        nvlink_domain: int | None = None,
        network: Mapping[str, str | float] | None = None,
        where: str = "system",
    ) -> "Cluster":
        """A cluster of `accelerator`. `network` overrides links: inter_node, intra_node (bandwidth per device and
        direction; text with a unit, or bytes/s) and inter_node_latency, intra_node_latency (text, or seconds).

        A torus crosses nodes: its domain is all devices, or as many as the accelerator's file lets a torus have, and
        `nvlink_domain` says nothing about it. Raises InputError: counts below one, an unknown override, a wrong unit,
        or several domains with no network between them.
        """
        for key, count in (
            ("devices", devices),
            ("devices_per_node", devices_per_node),
            ("nvlink_domain", nvlink_domain or 1),
        ):
            if count < 1:
                raise InputError(f"{where}.{key}: {count!r} must be at least 1")
        fabric, pair = accelerator.links.fabric or accelerator.links.host, None
        limit = fabric.domain or devices_per_node
        if fabric.topology == "pairs" and limit < devices_per_node and nvlink_domain is None:
            fabric, pair, limit = accelerator.links.host, fabric, devices_per_node  # what bridges do not join uses PCIe
        tiers = {"fabric": fabric}
        if accelerator.links.network is not None:
            tiers["network"] = accelerator.links.network
        for key, value in (network or {}).items():
            if key not in _OVERRIDES:
                raise InputError(f"{where}.network.{key} is not a known key; allowed are {', '.join(_OVERRIDES)}")
            tier, dimension = _OVERRIDES[key]
            number = (
                value if isinstance(value, float | int) else parse_quantity(value, dimension, f"{where}.network.{key}")
            )
            if not 0 < number < float("inf"):
                raise InputError(f"{where}.network.{key}: {value!r} must be greater than zero")
            if tier not in tiers and dimension == "bandwidth":
                tiers[tier] = Link(float(number), 10e-6)
            elif tier not in tiers:
                raise InputError(
                    f"{where}.network.{key}: {accelerator.name} has no links.network; give inter_node first"
                )
            elif dimension == "time":
                tiers[tier] = replace(tiers[tier], latency_s=float(number))
            else:
                tiers[tier] = replace(tiers[tier], bandwidth_bytes_per_s=float(number))
        sizes: tuple[int, ...] = ()
        if fabric.topology in TORUS_DIMENSIONS:
            most = min(devices, fabric.domain or devices)
            domain = next(size for size in range(most, 0, -1) if devices % size == 0)  # tori of equal size
            sizes = shape(domain, TORUS_DIMENSIONS[fabric.topology])
        else:
            domain = min(nvlink_domain or min(devices_per_node, limit), devices)
        if domain < devices and "network" not in tiers:
            raise InputError(
                f"{where}.devices: {devices} devices are more than the {domain} on one fabric, and {accelerator.name} "
                f"has no links.network; give {where}.network.inter_node"
            )
        return cls(accelerator, devices, devices_per_node, domain, tiers, pair, sizes)

    def collective(self, kind: str, bytes: float, devices: int, per_node: int) -> CollectiveCost:
        """What a collective over `devices` members, `per_node` of them in each domain, costs alone; `bytes` as in
        `Collective`.
        """
        return self.collective_cost(Collective(kind, bytes, devices, per_node))  # type: ignore[arg-type]

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
        if not 1 <= work.per_node <= work.devices or work.per_node > self.domain:
            raise InputError(
                f"{work.kind} over {work.devices} devices with {work.per_node} per node: per_node must be between 1 "
                f"and {min(work.devices, self.domain)}, the devices of a group on one fabric"
            )
        if not 0 <= work.bytes < float("inf"):
            raise InputError(f"{work.kind} of {work.bytes!r} bytes: the size must be finite and not negative")
        fabric = self.tiers["fabric"]
        if self.pair is not None and work.devices == work.per_node <= self.pair.domain:
            fabric = self.pair
        network = self.tiers.get("network", fabric)  # without one, no group leaves the fabric
        chip = self.accelerator
        rate = chip.memory.hbm.rate("stream")
        ways = [_through_memory(plan, work, rate) for plan in plans(work, fabric, network, self.torus)]
        plan = min(ways, key=lambda found: found.time_s)
        time = plan.time_s
        local = memory_bytes(work, plan.link_bytes)
        tier = fabric if "fabric" in plan.link_bytes else network
        return CollectiveCost(
            time_s=time,
            latency_s=plan.latency_s,
            link_bytes=plan.link_bytes,
            bandwidth=plan.bandwidth,
            core_share=min(MOST_CORES, tier.collective_cores / chip.cores) if work.devices > 1 else 0.0,
            memory_share=min(1.0, local / time / rate) if time else 0.0,
            energy_j=chip.power.energy_j(0.0, "fp32", {"hbm": local, "link": sum(plan.link_bytes.values())}),
            algorithm=plan.algorithm,
        )


def _through_memory(plan: Plan, work: Collective, memory_bytes_per_s: float) -> Plan:
    """`plan` at the rate at which the device's own memory can feed its links, where that is the slower."""
    sent = max(plan.link_bytes.values(), default=0.0)
    if not sent:
        return plan
    most = memory_bytes_per_s * sent / memory_bytes(work, plan.link_bytes)
    return replace(plan, bandwidth={tier: min(rate, most) for tier, rate in plan.bandwidth.items()})
