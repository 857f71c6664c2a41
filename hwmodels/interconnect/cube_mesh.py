"""The hybrid cube mesh of eight devices with six links each (DGX-1 with V100): what a group of its devices can do.

Nothing here is fitted: rings are counted on the graph of links, as NCCL's search does, and messages are routed on it.
"""

from collections.abc import Iterator
from functools import cache
from itertools import pairwise

LINKS_OF_A_DEVICE = 6

# Links between devices: NCCL's topology dump of a DGX-1 with V100 (github.com/NVIDIA/nccl issue 671).
_ONE = ((0, 1), (0, 2), (1, 3), (2, 6), (3, 7), (4, 5), (4, 6), (5, 7))
_TWO = ((0, 3), (0, 4), (1, 2), (1, 5), (2, 3), (4, 7), (5, 6), (6, 7))
_JOINED = dict.fromkeys(_ONE, 1) | dict.fromkeys(_TWO, 2)
_LINKS = _JOINED | {(b, a): count for (a, b), count in _JOINED.items()}


@cache
def rings(group: tuple[int, ...]) -> int:
    """How many rings through all devices of `group` fit on its links at once, each link used once per direction.

    Two devices: their links. More: every closed way and the same way backwards. 0 where no ring joins them all.
    """
    if len(group) == 2:
        return _LINKS.get((group[0], group[1]), 0)
    ways = [tuple(zip(way, (*way[1:], way[0]), strict=True)) for way in _closed_ways(group)]
    most = min(sum(_LINKS.get((a, b), 0) for b in group) for a in group) // 2
    return 2 * _packed(ways, 0, dict(_JOINED), most)


@cache
def spread_share(group: tuple[int, ...]) -> float:
    """Bytes that a device sends in an even exchange with all others of `group`, over what its busiest link carries.

    Messages take all shortest ways evenly, over any of the eight devices.
    """
    load: dict[tuple[int, int], float] = {}
    for source in group:
        for target in group:
            if source != target:
                ways = _shortest(source, target)
                for way in ways:
                    for step in pairwise(way):
                        load[step] = load.get(step, 0.0) + 1.0 / len(ways)
    return (len(group) - 1) / max(amount / _LINKS[step] for step, amount in load.items())


def _closed_ways(group: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Each closed way through all of `group`, once and in one direction."""
    stack: list[tuple[int, ...]] = [group[:1]]
    while stack:
        way = stack.pop()
        if len(way) == len(group):
            if (way[-1], way[0]) in _LINKS and way[1] < way[-1]:
                yield way
            continue
        stack += [(*way, b) for b in group if b not in way and (way[-1], b) in _LINKS]


def _packed(ways: list[tuple[tuple[int, int], ...]], first: int, free: dict[tuple[int, int], int], most: int) -> int:
    """The most of `ways` (from `first` on, each as often as it fits) on the `free` links."""
    best = 0
    for index in range(first, len(ways)):
        steps = [(min(a, b), max(a, b)) for a, b in ways[index]]
        if all(free[step] for step in steps):
            left = dict(free)
            for step in steps:
                left[step] -= 1
            best = max(best, 1 + _packed(ways, index, left, most - 1))
            if best == most:
                break
    return best


def _shortest(source: int, target: int) -> list[tuple[int, ...]]:
    ways: list[tuple[int, ...]] = [(source,)]
    while not any(way[-1] == target for way in ways):
        ways = [(*way, b) for way in ways for b in range(8) if b not in way and (way[-1], b) in _LINKS]
    return [way for way in ways if way[-1] == target for _ in range(_width(way))]


def _width(way: tuple[int, ...]) -> int:
    """Links of a way where it is narrowest: it carries so many messages at once."""
    return min(_LINKS[step] for step in pairwise(way))
