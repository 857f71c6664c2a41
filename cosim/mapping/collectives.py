"""What the collectives of a sharded step cost, as ops of a rank's graph: kernels that compute waits for.

A collective that is taken apart and sent under its neighbour (keys and values around a ring under attention; with
`parallel.overlap.tensor` what a matrix product reads or makes, in as many parts as the group has members) is as long as
it outlasts that, and at least one part.

Without being taken apart a backward collective of a column-parallel layer can run beside one of its two products: the
reduction of its input's gradient beside the product that makes its weights' gradient, the second gather of its input
beside the product that makes its input's gradient (NVIDIA/Megatron-LM megatron/core/tensor_parallel/layers.py,
LinearWithGradAccumulationAndAsyncCommunication.backward). It takes cores from them meanwhile.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left

import numpy as np

from cosim.graph import OpGraph, Phase
from cosim.mapping.pricing import Prices
from cosim.parallel.communication import Communication, communications
from cosim.parallel.groups import Groups
from hwmodels.cluster import Cluster

LIMIT = "communication"
_NEAR = 24  # ops between a collective and the products of its layer, at most


def with_collectives(
    graph: OpGraph, prices: Prices, groups: Groups, cluster: Cluster, overlap: bool, beside_backward: bool = False
) -> Prices:
    """`prices` with those of the graph's collectives; `overlap`: tensor-parallel ones run under matrix products, or,
    `beside_backward`, whole beside those of backward that they do not depend on.
    """
    found = communications(graph)
    if not found:
        return prices
    distinct: dict[tuple[int, float], int] = {}
    columns = {
        name: getattr(prices, name).copy()
        for name in ("time_s", "hbm_bytes", "energy_j", "core_share", "memory_share", "kernels", "limit")
    }
    under = _neighbours(graph, found)
    beside = _beside(graph, found) if beside_backward and not overlap else {}
    neighbours = {op for op in under.values() if op >= 0}.union(*beside.values())
    left = {op: float(prices.time_s[op]) for op in neighbours}  # of a neighbour that hides nothing yet
    for sent in found:
        group = groups.of(sent.group)
        if group.size == 1:
            continue
        work = group.collective(sent.kind, sent.bytes)
        cost, whole = cluster.collective_cost(work), cluster.cost(work)
        time = cost.time_s
        hides = sent.streamed or (overlap and sent.group == "tensor" and sent.kind != "all_reduce")
        if hides and under[sent.op] >= 0:
            part = time / group.size
            hidden = min(time - part, left[under[sent.op]] * (1 - 1 / group.size))
            left[under[sent.op]] -= hidden
            time -= hidden
        for product in beside.get(sent.op, ()):
            hidden = min(time, left[product])
            left[product] -= hidden
            time -= hidden * (1 - cost.core_share)
        columns["time_s"][sent.op] = time
        columns["hbm_bytes"][sent.op] = whole.bytes_per_level.get("hbm", 0.0)
        columns["energy_j"][sent.op] = cost.energy_j
        columns["core_share"][sent.op] = cost.core_share
        columns["memory_share"][sent.op] = cost.memory_share
        columns["kernels"][sent.op] = 1
        known = distinct.setdefault((int(graph.op_kind[sent.op]), time), len(distinct))
        columns["limit"][sent.op] = len(prices.limited_by) + known
    return dataclasses.replace(prices, limited_by=(*prices.limited_by, *(LIMIT for _ in distinct)), **columns)


def _neighbours(graph: OpGraph, found: tuple[Communication, ...]) -> dict[int, int]:
    """Collective -> the product or attention that it may run under: that which made what it reduces, or that which
    comes next after what it gathers; -1: none near.
    """
    classes = ("matmul", "attention", "attention_backward")
    heavy = np.array([kind.op_class in classes for kind in graph.kinds], dtype=np.bool_)[graph.op_kind]
    places = np.flatnonzero(heavy)
    under: dict[int, int] = {}
    for sent in found:
        if sent.kind == "reduce_scatter":
            at = int(np.searchsorted(places, sent.op)) - 1
        else:
            at = int(np.searchsorted(places, sent.op))
        near = 0 <= at < len(places) and graph.op_phase[places[at]] == graph.op_phase[sent.op]
        under[sent.op] = int(places[at]) if near else -1
    return under


def _beside(graph: OpGraph, found: tuple[Communication, ...]) -> dict[int, list[int]]:
    """Backward collective of a column-parallel layer -> the layer's products that it does not depend on."""
    kinds = [graph.kinds[kind] for kind in graph.op_kind.tolist()]
    backward = np.flatnonzero(graph.op_phase == Phase.BACKWARD).tolist()
    products = {way: [op for op in backward if kinds[op].attribute("layout") == way] for way in ("NN", "NT")}

    def reads(op: int) -> set[int]:
        return set(graph.tensor_storage[graph.op_inputs.row(op)].tolist())

    beside: dict[int, list[int]] = {}
    for sent in found:
        if sent.group != "tensor" or graph.op_phase[sent.op] != Phase.BACKWARD or graph.op_layer[sent.op] < 0:
            continue
        ends = (sent.op - _NEAR, sent.op + _NEAR)
        close = {way: ops[bisect_left(ops, ends[0]) : bisect_left(ops, ends[1])] for way, ops in products.items()}
        if sent.kind in ("all_reduce", "reduce_scatter"):
            before = [op for op in close["NT"] if op < sent.op]
            same = reads(before[-1]) if before else set()
            beside[sent.op] = [op for op in before if reads(op) & same]
        elif sent.kind == "all_gather":
            made = set(graph.tensor_storage[graph.op_outputs.row(sent.op)].tolist())
            readers = [op for op in close["NT"] if reads(op) & made]
            if readers and not any(reads(op) & made for op in close["NN"]):
                wanted = set[int]().union(*(reads(op) for op in readers))
                beside[sent.op] = [op for op in close["NN"] if reads(op) & wanted]
    return beside
