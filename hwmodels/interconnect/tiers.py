"""A cluster's tiers of links: the accelerator's own, with what a run says of them instead."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hwmodels.interconnect.algorithms import LIBRARY, NAMES
from hwmodels.interconnect.links import ROUTINGS, TOPOLOGIES, TORUS_DIMENSIONS, Link
from hwmodels.interconnect.torus import shape
from hwmodels.units import InputError, parse_quantity

NETWORKS = ("switch", "fat-tree", "rail-optimised", "dragonfly")
"""Topologies that join nodes."""

_QUANTITIES = {  # key of a run's `system.network` -> tier, field of its link, dimension
    "inter_node": ("network", "bandwidth_bytes_per_s", "bandwidth"),
    "inter_node_latency": ("network", "latency_s", "time"),
    "intra_node": ("fabric", "bandwidth_bytes_per_s", "bandwidth"),
    "intra_node_latency": ("fabric", "latency_s", "time"),
}
_CHOICES = {"topology": NETWORKS, "routing": ROUTINGS}
_NUMBERS: Mapping[str, tuple[int, type[int] | type[float]]] = {
    "oversubscription": (1, float),
    "radix": (3, int),
    "devices_per_port": (1, int),
}
_KEYS = (*_QUANTITIES, *_CHOICES, *_NUMBERS, "in_network_reduction", "algorithms")

assert set(NETWORKS) <= set(TOPOLOGIES)


@dataclass(frozen=True, slots=True)
class Tiers:
    """`fabric` joins the devices of a node or rack, `limit` at most; `pair` a few of them faster; `network` the nodes.

    `algorithms`: those that collectives may use.
    """

    fabric: Link
    limit: int
    pair: Link | None = None
    network: Link | None = None
    algorithms: tuple[str, ...] = LIBRARY

    def domain(self, devices: int, devices_per_node: int, nvlink_domain: int | None) -> tuple[int, tuple[int, ...]]:
        """Devices on one fabric, and the sizes of its dimensions where it is a torus (or a ring, which is one of one
        dimension). A torus crosses nodes, and so does a switch that joins them: whole nodes, in equal domains.
        """
        dimensions = TORUS_DIMENSIONS.get(self.fabric.topology, 0)
        if dimensions:
            most = min(devices, self.fabric.domain or devices)
            size = next(size for size in range(most, 0, -1) if devices % size == 0)
            return size, shape(size, dimensions)
        size = min(nvlink_domain or min(devices_per_node, self.limit), devices)
        if self.fabric.joins_nodes and nvlink_domain is None:
            racks = range(min(self.limit, devices) // devices_per_node * devices_per_node, 0, -devices_per_node)
            size = next((rack for rack in racks if devices % rack == 0), size)
        return size, (size,) if self.fabric.topology == "ring" else ()


def tiers_of(
    fabric: Link | None,
    host: Link,
    network: Link | None,
    devices_per_node: int,
    bridged_only: bool,
    overrides: Mapping[str, Any],
    where: str,
) -> Tiers:
    """The tiers of an accelerator with these links. `bridged_only`: what bridges do not join uses the host interface.

    `overrides`: inter_node, intra_node (per device and direction; text with a unit, or bytes/s), inter_node_latency,
    intra_node_latency (text, or seconds), and of the network topology, oversubscription, radix, routing;
    in_network_reduction on both tiers; algorithms, a list. Raises InputError: an unknown key, or a
    value that cannot be.
    """
    near, pair = fabric or host, None
    limit = near.domain or devices_per_node
    if near.topology == "pairs" and limit < devices_per_node and bridged_only:
        near, pair, limit = host, near, devices_per_node
    tiers = Tiers(near, limit, pair, network)
    for key, value in overrides.items():
        tiers = _overridden(tiers, key, value, f"{where}.network.{key}")
    return tiers


def _overridden(tiers: Tiers, key: str, value: Any, at: str) -> Tiers:
    if key in _QUANTITIES:
        tier, field, dimension = _QUANTITIES[key]
        return _changed(tiers, tier, field, _quantity(value, dimension, at), at)
    if key in _CHOICES:
        if value not in _CHOICES[key]:
            raise InputError(f"{at}: {value!r:.80} is not one of {', '.join(_CHOICES[key])}")
        return _changed(tiers, "network", key, value, at)
    if key in _NUMBERS:
        low, kind = _NUMBERS[key]
        if isinstance(value, bool) or not isinstance(value, int | kind) or not low <= value < float("inf"):
            raise InputError(
                f"{at}: {value!r:.80} must be {'a whole' if kind is int else 'a'} number of at least {low}"
            )
        return _changed(tiers, "network", key, value, at)
    if key == "in_network_reduction":
        if not isinstance(value, bool):
            raise InputError(f"{at}: {value!r:.80} must be true or false")
        tiers = _changed(tiers, "fabric", key, value, at)
        allowed = tuple(name for name in tiers.algorithms if name != "in-network")
        tiers = replace(tiers, algorithms=(*allowed, "in-network") if value else allowed)
        return tiers if tiers.network is None else _changed(tiers, "network", key, value, at)
    if key == "algorithms":
        return replace(tiers, algorithms=_algorithms(value, at))
    raise InputError(f"{at} is not a known key; allowed are {', '.join(_KEYS)}")


def _changed(tiers: Tiers, tier: str, field: str, value: Any, at: str) -> Tiers:
    link = tiers.fabric if tier == "fabric" else tiers.network
    if link is None and field == "bandwidth_bytes_per_s":  # of a network that the file does not have
        return replace(tiers, network=Link(float(value), 10e-6))
    if link is None:
        raise InputError(f"{at}: the accelerator has no links.network; give inter_node first")
    other = replace(link, **{field: value})
    return replace(tiers, fabric=other) if tier == "fabric" else replace(tiers, network=other)


def _quantity(value: Any, dimension: str, at: str) -> float:
    number = value if isinstance(value, float | int) else parse_quantity(value, dimension, at)
    if not 0 < number < float("inf"):
        raise InputError(f"{at}: {value!r} must be greater than zero")
    return float(number)


def _algorithms(value: Any, at: str) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else ()
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        raise InputError(f"{at}: {unknown[0] if unknown else value!r:.80} is not one of {', '.join(NAMES)}")
    return names
