"""Collective algorithms against messages that are really sent: data, rounds and bytes, counted one by one.

The brute force below shares no code with the model: it moves blocks between ranks until everybody has what the
collective promises, and adds up latency per round and the busiest rank's bytes.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.accelerator import load
from hwmodels.cluster import Cluster
from hwmodels.interconnect import torus
from hwmodels.interconnect.algorithms import LIBRARY, NAMES
from hwmodels.interconnect.collectives import Group, Plan, plans
from hwmodels.interconnect.links import Link
from hwmodels.interconnect.topology import Place, reach
from hwmodels.units import InputError
from hwmodels.work import Collective

ALPHA, BETA, BYTES = 2e-6, 50e9, 3e8
IDEAL = Link(BETA, ALPHA, efficiency=1.0, launch_s=0.0, p2p_efficiency=1.0, p2p_launch_s=0.0)

Round = list[tuple[int, int, frozenset[int]]]
"""Messages that are sent at once: from, to, and the blocks (n of them make the buffer)."""


def seconds(rounds: list[Round], n: int) -> float:
    """A round takes its latency and what its busiest rank sends or receives."""
    total = 0.0
    for messages in rounds:
        out, into = [0] * n, [0] * n
        for source, target, blocks in messages:
            out[source] += len(blocks)
            into[target] += len(blocks)
        total += ALPHA + max(*out, *into) * BYTES / n / BETA
    return total


def gathered(rounds: list[Round], n: int) -> bool:
    """Whether every rank has every block, where rank r starts with block r and sends only what it has."""
    has = [{rank} for rank in range(n)]
    for messages in rounds:
        assert all(blocks <= has[source] for source, _, blocks in messages)
        for _, target, blocks in messages:
            has[target] |= blocks
    return all(len(mine) == n for mine in has)


def summed(rounds: list[Round], n: int) -> bool:
    """Whether every rank ends with the sum of its own block, each addend once."""
    parts = [[{rank} for _ in range(n)] for rank in range(n)]  # rank, block -> whose addends it holds
    for messages in rounds:
        arriving = [
            (target, block, set(parts[source][block])) for source, target, blocks in messages for block in blocks
        ]
        for source, _, blocks in messages:
            for block in blocks:
                parts[source][block] = set()
        for target, block, addends in arriving:
            assert not parts[target][block] & addends
            parts[target][block] |= addends
    return all(len(parts[rank][rank]) == n for rank in range(n))


def ring_gather(n: int) -> list[Round]:
    return [[(r, (r + 1) % n, frozenset({(r - k) % n})) for r in range(n)] for k in range(n - 1)]


def doubling_gather(n: int) -> list[Round]:
    rounds, span = [], 1
    while span < n:
        rounds.append([(r, r ^ span, frozenset(range(r // span * span, r // span * span + span))) for r in range(n)])
        span *= 2
    return rounds


def bruck_gather(n: int) -> list[Round]:
    rounds, span = [], 1
    while span < n:
        count = min(span, n - span)
        rounds.append([(r, (r - span) % n, frozenset((r + k) % n for k in range(count))) for r in range(n)])
        span *= 2
    return rounds


def direct_gather(n: int) -> list[Round]:
    return [[(r, t, frozenset({r})) for r in range(n) for t in range(n) if t != r]]


def backwards(rounds: list[Round]) -> list[Round]:
    """A gather turned round is a reduce-scatter: each message goes back, and where copies parted sums meet."""
    return [[(target, source, blocks) for source, target, blocks in messages] for messages in reversed(rounds)]


def bruck_exchange(n: int) -> list[Round]:
    """All-to-all: block b of rank r is for rank r + b, and moves on in the rounds of the bits of b."""
    rounds, span = [], 1
    while span < n:
        moving = frozenset(b for b in range(n) if b & span)
        rounds.append([(r, (r + span) % n, moving) for r in range(n)])
        span *= 2
    return rounds


GATHERS: list[tuple[str, Callable[[int], list[Round]], list[int]]] = [
    ("hierarchical", ring_gather, [2, 3, 4, 7, 8]),  # on one tier the ring that waits for each message
    ("halving", doubling_gather, [2, 4, 8, 16]),
    ("halving", bruck_gather, [3, 5, 6, 7, 9]),
    ("direct", direct_gather, [2, 3, 8]),
]


def group(n: int, link: Link = IDEAL) -> Group:
    here = reach(link, Place(n))
    return Group(1, n, link, link, here, here)


def plan(kind: str, name: str, n: int, size: float = BYTES) -> Plan:
    work = Collective(kind, size, n, n)  # type: ignore[arg-type]
    return next(found for found in plans(work, group(n), (name,)) if found.algorithm == name)


@pytest.mark.parametrize(("name", "rounds_of", "sizes"), GATHERS)
def test_gathers_and_scattered_sums_take_what_their_messages_take(
    name: str, rounds_of: Callable[[int], list[Round]], sizes: list[int]
) -> None:
    for n in sizes:
        rounds = rounds_of(n)
        assert gathered(rounds, n)
        assert summed(backwards(rounds), n)
        algorithm = "ring" if name == "hierarchical" else name
        assert plan("all_gather", algorithm, n).time_s == pytest.approx(seconds(rounds, n))
        assert plan("reduce_scatter", algorithm, n).time_s == pytest.approx(seconds(backwards(rounds), n))
        if n & (n - 1) == 0 or name != "halving":  # Rabenseifner folds what is beyond a power of two instead
            both = seconds(backwards(rounds), n) + seconds(rounds, n)
            assert plan("all_reduce", algorithm, n).time_s == pytest.approx(both)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 7, 8, 12, 16])
def test_bruck_exchanges_in_a_logarithm_of_rounds(n: int) -> None:
    rounds = bruck_exchange(n)
    for block in range(n):  # each block comes where it belongs
        assert sum(2**k for k, messages in enumerate(rounds) if block in messages[0][2]) == block
    assert plan("all_to_all", "bruck", n).time_s == pytest.approx(seconds(rounds, n))


@pytest.mark.parametrize(("n", "rounds"), [(2, 1), (4, 2), (8, 3), (16, 4), (3, 3), (5, 4), (9, 5), (15, 5)])
def test_recursive_doubling_sends_everything_in_every_round(n: int, rounds: int) -> None:
    """log2 n rounds of the whole buffer (Thakur et al. 2005); beyond a power of two one round before and one after."""
    assert plan("all_reduce", "doubling", n).time_s == pytest.approx(rounds * (ALPHA + BYTES / BETA))
    assert plan("broadcast", "doubling", n).time_s == pytest.approx(math.ceil(math.log2(n)) * (ALPHA + BYTES / BETA))


def test_closed_forms_of_the_literature() -> None:
    """Thakur, Rabenseifner, Gropp 2005, with alpha and beta per byte; one-shot and two-shot all-reduce of a switch."""
    n, move = 8, BYTES / BETA
    assert plan("all_reduce", "ring", n).time_s == pytest.approx(14 * ALPHA + 2 * 7 / 8 * move)
    assert plan("all_reduce", "halving", n).time_s == pytest.approx(6 * ALPHA + 2 * 7 / 8 * move)
    assert plan("all_reduce", "halving", 9).time_s == pytest.approx(8 * ALPHA + (2 * 7 / 8 + 2) * move)
    assert plan("all_reduce", "direct", n).time_s == pytest.approx(2 * ALPHA + 2 * 7 / 8 * move)
    assert plan("all_reduce", "one-shot", n).time_s == pytest.approx(ALPHA + 7 * move)
    assert plan("all_to_all", "pairwise", n).time_s == pytest.approx(7 * ALPHA + 7 / 8 * move)
    assert plan("broadcast", "scatter", n).time_s == pytest.approx((3 + 7) * ALPHA + 2 * 7 / 8 * move)


def test_over_several_nodes_each_tier_has_its_hops_and_its_share() -> None:
    """Four nodes of eight: a ring enters and leaves each node once; phases come one after the other."""
    near, far = Link(8 * BETA, 1e-6, efficiency=1.0, launch_s=0.0), replace(IDEAL, latency_s=1e-4)
    nodes, local, n = 4, 8, 32
    both = Group(nodes, local, near, far, reach(near, Place(local)), reach(far, Place(nodes, 1, local, local)))

    def over(kind: str, name: str) -> Plan:
        work = Collective(kind, BYTES, n, local)  # type: ignore[arg-type]
        return next(found for found in plans(work, both, (name,)) if found.algorithm == name)

    assert over("all_gather", "ring").latency_s == pytest.approx(28 * 1e-6 + 3 * 1e-4)
    assert over("all_reduce", "ring").latency_s == pytest.approx(2 * (28 * 1e-6 + 3 * 1e-4))
    chunk = 256 * 1024
    stages = 14 * (1e-6 + chunk / (0.92 * 8 * BETA)) + 4 * (1e-4 + chunk / (0.92 * BETA))
    assert over("all_reduce", "tree").latency_s == pytest.approx(stages)
    hops = 2 * 7 * 1e-6 + 2 * 3 * 1e-4
    moved = 2 * 7 / 8 * BYTES / (8 * BETA) + 2 * 3 / 4 * BYTES / 8 / BETA
    assert over("all_reduce", "hierarchical").time_s == pytest.approx(hops + moved)
    assert over("all_reduce", "halving").latency_s == pytest.approx(6 * 1e-6 + 4 * 1e-4)
    moved = 7 / 8 * BYTES / (8 * BETA) + 3 / 4 * BYTES / BETA
    assert over("all_to_all", "hierarchical").time_s == pytest.approx(7 * 1e-6 + 3 * 1e-4 + moved)
    assert over("all_to_all", "direct").time_s == pytest.approx(1e-6 + 1e-4 + moved)
    assert over("all_to_all", "grouped").link_bytes == pytest.approx(
        {"fabric": BYTES * 7 / 32, "network": BYTES * 24 / 32}
    )


# Tori: blocks walk dimension after dimension; the busiest link of each phase counts.


@pytest.mark.parametrize("sizes", [(4,), (5,), (2,), (4, 4), (3, 3), (4, 2), (8, 4, 2), (4, 4, 4), (3, 5)])
def test_a_torus_gathers_as_its_links_are_loaded(sizes: tuple[int, ...]) -> None:
    """Part p of the buffer takes the dimensions from p on; along one, copies go both ways round, or out on a line."""
    ours = torus.group(sizes, math.prod(sizes), replace(IDEAL, links=1))
    n, number = math.prod(sizes), len(sizes)
    total = 0.0
    for phase in range(number):
        load: dict[tuple[int, int, int], float] = {}  # dimension, link's place along it, direction
        for part in range(number):
            axis = (part + phase) % number
            d, wraps = ours.rings[axis].size, ours.rings[axis].wraps
            block = BYTES / number / n * math.prod(ours.rings[(part + k) % number].size for k in range(phase))
            for source in range(d):
                for target in range(d):
                    gap = (target - source) % d
                    right = target > source if not wraps else 2 * gap < d
                    shares = {1: 0.5, -1: 0.5} if wraps and 2 * gap == d else {1 if right else -1: 1.0}
                    for step, share in shares.items():
                        # a copy for `target` is the one for the device before it, passed on: one link more
                        if target != source:
                            link = (axis, (target - step) % d, step)
                            load[link] = load.get(link, 0.0) + block * share
        total += max(load.values()) / BETA
    assert ours.gather_s(BYTES) == pytest.approx(total)


def test_groups_between_share_a_torus_dimension() -> None:
    """Every other device of a ring of eight: a ring of four with two hops a step, whose links two groups share."""
    ours = torus.group((8, 8), 4, IDEAL, stride=2)
    assert [(ring.size, ring.wraps, ring.spacing) for ring in ours.rings] == [(4, True, 2)]
    assert ours.gather_s(BYTES) == pytest.approx(2 * torus.group((4,), 4, IDEAL).gather_s(BYTES))
    assert ours.steps == 4
    along_the_other = torus.group((8, 8), 8, IDEAL, stride=8)
    assert [(ring.size, ring.wraps, ring.spacing) for ring in along_the_other.rings] == [(8, True, 1)]


@pytest.mark.parametrize(("wrap", "joined"), [(0, False), (3, True), (8, True), (16, False)])
def test_a_torus_without_wraparound_is_a_mesh(wrap: int, joined: bool) -> None:
    """A slice of TPU v5e smaller than 16 x 16 has no wraparound links (cloud.google.com/tpu/docs/v5e)."""
    found = torus.group((8, 8), 64, replace(IDEAL, wrap=wrap))
    assert [ring.wraps for ring in found.rings] == [joined, joined]


# Bounds and directions over random clusters.

A100 = load("a100-sxm-80gb")
KINDS = ["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"]
GROUPS = [(2, 2), (8, 8), (2, 1), (8, 1), (16, 8), (64, 8), (32, 4), (24, 8), (5, 5)]
TOPOLOGIES = ["switch", "fat-tree", "rail-optimised", "dragonfly"]


def cluster(topology: str = "switch", **network: object) -> Cluster:
    return Cluster.build(A100, 64, 8, network={"inter_node": 25e9, "topology": topology, **network})


@given(
    st.sampled_from(KINDS),
    st.sampled_from(NAMES),
    st.sampled_from(TOPOLOGIES),
    st.floats(1.0, 1e10),
    st.sampled_from(GROUPS),
    st.sampled_from([4, 8, 36, 64]),
    st.sampled_from([1.0, 2.0, 7.0]),
    st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_no_algorithm_beats_what_has_to_cross(
    kind: str, name: str, topology: str, size: float, members: tuple[int, int], radix: int, over: float, sharp: bool
) -> None:
    """Into each node has to come what it lacks, by its ports; a sum is at least the buffer, whoever adds it up."""
    devices, per_node = members
    net = {"radix": radix, "oversubscription": over, "in_network_reduction": sharp, "algorithms": [name]}
    found = cluster(topology, **net).collective(kind, size, devices, per_node)
    nodes = devices / per_node
    lacks = {"all_reduce": 1.0, "broadcast": 1.0, "all_to_all": per_node * (nodes - 1) / nodes}
    if nodes > 1:
        assert found.time_s >= size * lacks.get(kind, (nodes - 1) / nodes) / (per_node * 25e9)
    inside = {"all_reduce": 1.0, "broadcast": 1.0}.get(kind, (devices - 1) / devices)
    if nodes == 1:
        assert found.time_s >= size * inside / 300e9
    assert found.time_s >= found.latency_s >= 0.0
    assert found.time_s == pytest.approx(
        found.latency_s + max(amount / found.bandwidth[tier] for tier, amount in found.link_bytes.items())
    )


@given(
    st.sampled_from(KINDS),
    st.sampled_from(NAMES),
    st.sampled_from(["fat-tree", "rail-optimised", "dragonfly"]),
    st.floats(1.0, 1e10),
    st.sampled_from([19, 27, 36, 64]),
    st.sampled_from([1.0, 2.0, 7.0]),
    st.sampled_from([8, 16, 32]),
)
@settings(deadline=None, max_examples=300)
def test_nothing_enters_a_leaf_faster_than_its_uplinks(
    kind: str, name: str, topology: str, size: float, radix: int, over: float, nodes: int
) -> None:
    """The cut around one leaf (of a rail-optimised network: a node's on every rail), or one group of a dragonfly."""
    net = {"inter_node": 25e9, "topology": topology, "radix": radix, "oversubscription": over, "algorithms": [name]}
    found = Cluster.build(A100, 8 * nodes, 8, network=net).collective(kind, size, 8 * nodes, 8)
    down = int(radix * over / (1 + over))
    group = (radix + 1) // 4
    below = {"fat-tree": down // 8, "rail-optimised": down, "dragonfly": 2 * group * group // 8}[topology]
    if not 0 < below < nodes:
        return
    up = (2 * group * group if topology == "dragonfly" else below * 8) / over * 25e9
    share = 1 - below / nodes
    enters = {"all_reduce": 1.0, "broadcast": 1.0, "all_to_all": 8 * below * share}.get(kind, share)
    assert found.time_s >= size * enters / up * (1 - 1e-9)


@given(
    st.sampled_from([*KINDS, "send_recv"]),
    st.sampled_from(TOPOLOGIES),
    st.floats(1.0, 1e10),
    st.sampled_from(GROUPS),
    st.sampled_from([4, 8, 64]),
    st.sampled_from([("hierarchical",), ("halving",), LIBRARY, NAMES]),
)
@settings(deadline=None, max_examples=200)
def test_better_links_are_never_slower(
    kind: str, topology: str, size: float, members: tuple[int, int], radix: int, names: tuple[str, ...]
) -> None:
    def seconds_with(**other: object) -> float:
        chosen = cluster(topology, **{"radix": radix, "algorithms": names, "in_network_reduction": True, **other})
        return chosen.collective(kind, size, *members).time_s

    base = seconds_with()
    margin = base * (1 - 1e-12)
    assert seconds_with(inter_node=12e9) >= margin
    assert seconds_with(intra_node=100e9) >= margin
    assert seconds_with(inter_node_latency=50e-6) >= margin
    assert seconds_with(intra_node_latency=50e-6) >= margin


@given(st.sampled_from(KINDS), st.floats(1.0, 1e10), st.sampled_from(GROUPS))
@settings(deadline=None)
def test_the_choice_is_the_fastest_of_those_allowed(kind: str, size: float, members: tuple[int, int]) -> None:
    alone = {}
    for name in NAMES:
        found = cluster(algorithms=[name]).collective(kind, size, *members)
        alone[name] = found.time_s
    assert cluster(algorithms=NAMES).collective(kind, size, *members).time_s == min(alone.values())
    library = min(alone[name] for name in LIBRARY)
    assert cluster().collective(kind, size, *members).time_s == library


def test_the_protocol_goes_from_latency_to_bandwidth_as_messages_grow() -> None:
    """NCCL: LL for small messages, LL128 between, Simple for large ones."""
    chosen = [cluster().collective("all_reduce", size, 8, 8).algorithm for size in (2**12, 2**22, 2**30)]
    assert chosen == ["ring ll", "ring ll128", "ring"]


def test_no_protocol_shortens_a_long_wire() -> None:
    """Of 14 us between nodes LL saves 11.3; of a millisecond, which is distance, it saves no more."""
    slow, usual = (cluster(inter_node_latency=latency).collective("all_gather", 8.0, 8, 1) for latency in (1e-3, 14e-6))
    assert usual.latency_s < 7 * 14e-6 + 30e-6
    assert slow.latency_s - usual.latency_s == pytest.approx(7 * (1e-3 - 14e-6))


def test_an_exchange_posts_a_message_to_every_peer() -> None:
    """One hop is not enough: latency grows with the peers, on the network by NCCL's overhead of posting one."""
    wide = Cluster.build(A100, 1024, 8)
    small = [wide.collective("all_to_all", 1e3, n, 8).latency_s for n in (16, 64, 256, 1024)]
    assert small == sorted(small)
    assert small[-1] - small[0] >= (1024 - 16) * 1e-6
    everything = Cluster.build(A100, 1024, 8, network={"algorithms": ["bruck"]})
    assert everything.collective("all_to_all", 1e3, 1024, 8).latency_s < small[-1]  # fewer messages, more bytes
    bulky = everything.collective("all_to_all", 1e9, 1024, 8).time_s
    assert bulky > wide.collective("all_to_all", 1e9, 1024, 8).time_s


def test_a_broadcast_is_pipelined_in_chunks() -> None:
    """A chain of n devices costs n - 1 hops and chunks, not n - 1 times the message."""
    n = 8
    found = cluster().collective("broadcast", 1e9, n, n)
    assert found.link_bytes["fabric"] == 1e9
    assert found.latency_s > (n - 2) * 256 * 1024 / 300e9
    assert found.latency_s < 0.1 * found.time_s


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"topology": "torus-2d"}, "system.network.topology: 'torus-2d' is not one of switch, fat-tree"),
        ({"oversubscription": 0.5}, "system.network.oversubscription: 0.5 must be a number of at least 1"),
        ({"radix": 2.5}, "system.network.radix: 2.5 must be a whole number of at least 3"),
        ({"routing": "shortest"}, "system.network.routing: 'shortest' is not one of minimal, valiant"),
        ({"algorithms": ["rings"]}, "system.network.algorithms: 'rings' is not one of ring, tree"),
        ({"algorithms": []}, r"system.network.algorithms: \[\] is not one of ring"),
        ({"in_network_reduction": 1}, "system.network.in_network_reduction: 1 must be true or false"),
    ],
)
def test_a_network_that_cannot_be_is_one_sentence(network: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Cluster.build(A100, 16, 8, network=network)
