"""What one member of a group can send on a tier, from the tier's topology and from where the group's members sit.

Rates are bytes per second, member and direction. Three patterns: to the next member of a ring, evenly to all others
(all-to-all), and one message alone. What is not a torus; for tori see `torus.py`.
"""

from dataclasses import dataclass

from hwmodels.interconnect import cube_mesh
from hwmodels.interconnect.links import Link


@dataclass(frozen=True, slots=True)
class Place:
    """Where a group's members sit on a tier. `members` on it, `step` places from one to the next; `active` devices of
    each place send at once, of `devices` that it has (a node's, seen by the network; 1 inside a node).
    """

    members: int
    step: int = 1
    active: int = 1
    devices: int = 1


@dataclass(frozen=True, slots=True)
class Reach:
    """What a member can send: `ring` to its neighbour in a ring, `spread` to all others evenly, `message` to one.

    `hop_s` is a ring's mean hop, `far_s` the way to the farthest member. `chain`: no ring joins the group; it is a
    chain whose links carry sums one way and results the other.
    """

    ring: float
    spread: float
    message: float
    hop_s: float
    far_s: float
    chain: bool = False


def reach(link: Link, place: Place) -> Reach:
    """What the members at `place` reach over `link`, sustained."""
    if link.topology == "hybrid-cube-mesh":
        return _cube_mesh(link, place)
    if link.topology == "all-to-all":
        return _direct(link, place)
    if link.topology in ("fat-tree", "rail-optimised", "dragonfly"):
        return _switched(link, place)
    rate = link.sustained_bytes_per_s
    return Reach(rate, rate, link.bandwidth_bytes_per_s * link.p2p_efficiency, link.latency_s, link.latency_s)


def _direct(link: Link, place: Place) -> Reach:
    """A link of its own to each of the others: a part of them has only the links among itself."""
    others = max(link.domain, place.members) - 1
    share = (place.members - 1) / others if others else 1.0
    rate = link.sustained_bytes_per_s * share
    message = link.bandwidth_bytes_per_s * link.p2p_efficiency / max(others, 1)
    return Reach(rate, rate, message, link.latency_s, link.latency_s)


def _cube_mesh(link: Link, place: Place) -> Reach:
    group = tuple(range(0, 8, place.step))[: place.members]
    if len(group) < place.members:  # more than the mesh holds at this step: as its neighbours
        group = tuple(range(min(place.members, 8)))
    one = link.sustained_bytes_per_s / cube_mesh.LINKS_OF_A_DEVICE
    message = link.bandwidth_bytes_per_s * link.p2p_efficiency / cube_mesh.LINKS_OF_A_DEVICE
    if len(group) < 2:
        return Reach(one, one, message, link.latency_s, link.latency_s)
    count = cube_mesh.rings(group)
    spread = one * cube_mesh.spread_share(group)
    return Reach(one * max(count, 1), spread, message, link.latency_s, 2.0 * link.latency_s, chain=count == 0)


def _switched(link: Link, place: Place) -> Reach:
    """Ports below leaf switches (fat tree) or in groups (dragonfly), joined by what the upper stages let through."""
    ports = place.devices / link.devices_per_port  # of a place
    port = link.bandwidth_bytes_per_s * link.devices_per_port
    crowd = max(1.0, place.active / ports)  # devices that share a port at once
    rate = port * link.efficiency / crowd
    below = _places_below(link, ports)
    local = max(1, below // place.step)  # members of this group below one leaf, or in one group of a dragonfly
    extra = _extra_switches(link, place, below) * link.switch_latency_s
    message = port * link.p2p_efficiency / crowd
    if place.members <= local:
        return Reach(rate, rate, message, link.latency_s, link.latency_s + extra)
    outside = (place.members - local) / (place.members - 1)  # of what goes to all others evenly
    sets = -(-place.members // local)
    to_next, to_all = _up(link, ports, below, sets)
    sending = min(place.step, below)  # places below a leaf whose ring leaves it
    to_next *= port / (sending * place.active)  # of one member
    ring, message = min(rate, to_next * link.efficiency), min(message, to_next * link.p2p_efficiency)
    spread = min(rate, to_all * port * link.efficiency / (below * place.active * outside))
    crossing = 1.0 / local
    return Reach(ring, spread, message, link.latency_s + extra * crossing, link.latency_s + extra)


def _places_below(link: Link, ports: float) -> int:
    """Nodes whose ports sit below one leaf (each on its rail's leaf, if rail-optimised) or in one dragonfly group."""
    if link.topology == "dragonfly":
        return max(1, int(2 * _terminals(link) ** 2 / ports))
    down = link.radix * link.oversubscription / (1.0 + link.oversubscription)
    return max(1, int(down if link.topology == "rail-optimised" else down / ports))


def _terminals(link: Link) -> int:
    """Devices' ports on one router of a balanced dragonfly: p = h = a/2 and radix = p + h + a - 1 (Kim, Dally, Scott,
    Abts 2008); a group has 2 p² devices' ports, and as many global links.
    """
    return max(1, (link.radix + 1) // 4)


def _up(link: Link, ports: float, below: int, sets: int) -> tuple[float, float]:
    """Ports' worth of bandwidth from one leaf or group to the next one, and to all others together."""
    if link.topology != "dragonfly":
        every = below * ports / link.oversubscription
        return every, every
    every = 2.0 * _terminals(link) ** 2 / link.oversubscription
    if link.routing == "valiant":  # every message takes two global links, over a group chosen at random
        return every / 2.0, every / 2.0
    return every / (sets - 1), every


def _extra_switches(link: Link, place: Place, below: int) -> int:
    """Switches on the longest way, beyond the first."""
    span = place.members * place.step
    if link.topology == "dragonfly":
        across = 5 if link.routing == "valiant" else 3
        return 0 if span * place.devices <= _terminals(link) * link.devices_per_port else 1 if span <= below else across
    return 0 if span <= below else 2 if span <= below * link.radix / 2 else 4
