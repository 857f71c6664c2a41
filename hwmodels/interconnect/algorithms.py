"""Collectives by algorithm among equals: how many steps follow each other, and what each member sends.

Volumes are fractions of the buffer as `Collective` counts it. Thakur, Rabenseifner, Gropp 2005 (ring, recursive
doubling, recursive halving, pairwise), Bruck et al. 1997, van de Geijn (broadcast as scatter and gather). Methods that
need a power of two fold the members beyond it onto others before, and unfold after.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Steps:
    """`hops`: steps one after the other. `volume`: what a member sends in all of them, as a fraction of the buffer.
    `neighbours`: only to the next of a ring; else to anybody.
    """

    hops: int
    volume: float
    neighbours: bool = False


Form = Callable[[int], Steps]
"""Steps among n >= 2 members."""


def volume(kind: str, members: float) -> float:
    """Bytes that each of `members` devices sends, as a fraction of the buffer, by the bandwidth-optimal algorithm."""
    if members <= 1:
        return 0.0
    if kind in ("broadcast", "send_recv"):
        return 1.0
    share = (members - 1) / members
    return 2.0 * share if kind == "all_reduce" else share


def logarithm(n: int) -> int:
    """Rounds after which n members can all know of one: the least k with 2^k >= n."""
    return (n - 1).bit_length()


def _halving(n: int) -> Steps:
    """Rabenseifner: reduce-scatter by halves, all-gather by doubling, among the largest power of two."""
    base = 2 ** (n.bit_length() - 1)
    fold = int(base < n)
    return Steps(2 * logarithm(base) + 2 * fold, volume("all_reduce", base) + 2.0 * fold)


def _doubling(n: int) -> Steps:
    base = 2 ** (n.bit_length() - 1)
    fold = int(base < n)
    return Steps(logarithm(base) + 2 * fold, float(logarithm(base) + 2 * fold))


def _bruck_exchange(n: int) -> Steps:
    """In round k the blocks whose number has bit k go together."""
    return Steps(logarithm(n), sum(block.bit_count() for block in range(1, n)) / n)


_HALF: Mapping[str, Form] = {  # an all-gather, or a reduce-scatter, which is one backwards
    "ring": lambda n: Steps(n - 1, volume("all_gather", n), True),
    "halving": lambda n: Steps(logarithm(n), volume("all_gather", n)),  # Bruck's where n is no power of two
    "direct": lambda n: Steps(1, volume("all_gather", n)),
}

FORMS: Mapping[str, Mapping[str, Form]] = {
    "all_gather": _HALF,
    "reduce_scatter": _HALF,
    "all_reduce": {
        "ring": lambda n: Steps(2 * (n - 1), volume("all_reduce", n), True),
        "halving": _halving,
        "doubling": _doubling,
        "direct": lambda n: Steps(2, volume("all_reduce", n)),
        "one-shot": lambda n: Steps(1, n - 1.0),
    },
    "all_to_all": {
        "pairwise": lambda n: Steps(n - 1, volume("all_to_all", n)),
        "bruck": _bruck_exchange,
        "direct": lambda n: Steps(1, volume("all_to_all", n)),
    },
    "broadcast": {
        "doubling": lambda n: Steps(logarithm(n), float(logarithm(n))),  # a binomial tree: the root sends to each
        "scatter": lambda n: Steps(logarithm(n) + n - 1, volume("all_reduce", n)),
    },
}
"""Kind -> algorithm -> its steps. What libraries do, ring, tree or grouped messages, is in `collectives.py`."""

PHASES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "all_reduce": (("fabric", "reduce_scatter"), ("network", "all_reduce"), ("fabric", "all_gather")),
    "all_gather": (("network", "all_gather"), ("fabric", "all_gather")),
    "reduce_scatter": (("fabric", "reduce_scatter"), ("network", "reduce_scatter")),
    "all_to_all": (("fabric", "all_to_all"), ("network", "all_to_all")),
}
"""What a collective over several nodes is made of, one after the other; the network's part is between equal members of
each node, on what is a node's share of the buffer (of an exchange: on the whole).
"""

LIBRARY = ("ring", "tree", "grouped")
"""What is chosen from where nothing else is said: what NCCL and RCCL do without reduction in the network."""

METHODS: Mapping[str, Mapping[str, str]] = {
    "hierarchical": {"all_reduce": "ring", "all_gather": "ring", "reduce_scatter": "ring", "all_to_all": "pairwise"},
    "halving": {"all_reduce": "halving", "all_gather": "halving", "reduce_scatter": "halving"},
    "doubling": {"all_reduce": "doubling", "all_gather": "halving", "reduce_scatter": "halving"},
    "direct": {"all_reduce": "direct", "all_gather": "direct", "reduce_scatter": "direct", "all_to_all": "direct"},
    "pairwise": {"all_to_all": "pairwise"},
    "bruck": {"all_to_all": "bruck"},
}
"""Over several nodes: algorithm -> the form of each of its phases, by the phase's kind."""

NAMES = (*LIBRARY, "in-network", *METHODS, "one-shot", "scatter")
"""Every algorithm that a run may allow."""
