"""Collectives on a torus: rings along every dimension, all dimensions at work at once.

A buffer is cut into one part per dimension; each part walks the dimensions in another order, so that every dimension
always carries one part (Chan, Heimlich, Purkayastha, van de Geijn 2007, collectives on meshes; "How to scale your
model", jax-ml.github.io/scaling-book, sharding: n dimensions have n times the bandwidth of one). Along a dimension of d
devices a ring that wraps around has two links per device, one each way; a line, and a pair, delivers to its end by one
link.
"""

import math
from dataclasses import dataclass

from hwmodels.interconnect.links import Link


@dataclass(frozen=True, slots=True)
class Ring:
    """A group's extent along one dimension; `wraps`: whether its ends are joined. `spacing` hops lie between members;
    the groups in between share the links.
    """

    size: int
    wraps: bool
    spacing: int = 1

    @property
    def links(self) -> int:
        """Links by which data reaches the device that is worst off."""
        return 2 if self.wraps else 1

    @property
    def steps(self) -> int:
        """Hops to the farthest device."""
        return self.spacing * (self.size // 2 if self.wraps else self.size - 1)


@dataclass(frozen=True, slots=True)
class Torus:
    """A group of devices on a torus. `link_bytes_per_s`: one link, one direction, sustained."""

    rings: tuple[Ring, ...]
    link_bytes_per_s: float

    @property
    def devices(self) -> int:
        """Members of the group."""
        return math.prod(ring.size for ring in self.rings)

    @property
    def steps(self) -> int:
        """Hops between the devices that are farthest apart."""
        return sum(ring.steps for ring in self.rings)

    def gather_s(self, bytes: float) -> float:
        """Seconds on the links until every device has the `bytes` that all hold together; a reduce_scatter is the same
        backwards.

        With d devices along each of D wrapped dimensions: bytes (n-1)/n over the 2 D links of a device.
        """
        number = len(self.rings)
        total = 0.0
        for phase in range(number):
            slowest = 0.0
            for part in range(number):
                gathered = math.prod(self.rings[(part + done) % number].size for done in range(phase))
                ring = self.rings[(part + phase) % number]
                moved = bytes / number * gathered * (ring.size - 1) / self.devices
                slowest = max(slowest, moved * ring.spacing / (ring.links * self.link_bytes_per_s))
            total += slowest
        return total

    def all_to_all_bytes(self, bytes: float) -> float:
        """Bytes that a device sends and passes on when each holds `bytes`, an equal share for every member: bytes times
        the mean distance.
        """
        return bytes * sum(_mean_distance(ring) * ring.spacing for ring in self.rings)

    def all_to_all_s(self, bytes: float) -> float:
        """Seconds on the busiest links, routed one dimension after the other.

        Half of a ring's devices send half of their bytes to the other half, over the links of two cuts each way.
        """
        busiest = 0.0
        for ring in self.rings:
            if ring.wraps:  # all links of a ring are equally busy
                load = bytes * _mean_distance(ring) / 2.0
            else:  # the middle link of a line
                load = bytes * (ring.size // 2) * -(-ring.size // 2) / ring.size
            busiest = max(busiest, load * ring.spacing)
        return busiest / self.link_bytes_per_s


def _mean_distance(ring: Ring) -> float:
    """Hops to a member chosen at random, oneself included."""
    d = ring.size
    return (d * d // 4) / d if ring.wraps else (d * d - 1) / (3.0 * d)


def shape(devices: int, dimensions: int) -> tuple[int, ...]:
    """The most cubic torus of `devices`, longest dimension first: 64 in three dimensions is 4 x 4 x 4."""
    if dimensions == 1:
        return (devices,)
    best: tuple[int, ...] = ()
    for first in range(1, devices + 1):
        if first**dimensions > devices:
            break
        if devices % first == 0:
            found = tuple(sorted((first, *shape(devices // first, dimensions - 1)), reverse=True))
            best = min(best or found, found, key=lambda sizes: (sum(sizes), sizes))
    return best


def group(whole: tuple[int, ...], members: int, link: Link, stride: int = 1) -> Torus:
    """`members` devices on a torus of shape `whole`, `stride` apart: full dimensions first, then a part of one.

    Dimensions of at least `link.wrap` devices, all of them in the group, wrap around. Members that no box of the torus
    holds are taken as a line.
    """
    rings, left, before = [], members, stride
    for size in whole:
        spacing = math.gcd(size, before)
        before //= spacing
        here = math.gcd(size // spacing, left)
        if here > 1:
            rings.append(Ring(here, here * spacing == size and 0 < link.wrap <= size and size > 2, spacing))
            left //= here
    if left > 1:
        rings = [Ring(members, False, stride)]
    return Torus(tuple(rings), link.sustained_bytes_per_s / link.links)
