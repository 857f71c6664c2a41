"""What the collectives of a sharded step cost, as ops of a rank's graph: kernels that compute waits for.

A collective that is taken apart and sent under its neighbour (keys and values around a ring under attention; with
`parallel.overlap.tensor` what a matrix product reads or makes, in as many parts as the group has members) is as long as
it outlasts that, and at least one part.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from cosim.graph import OpGraph
from cosim.mapping.pricing import Prices
from cosim.parallel.communication import Communication, communications
from cosim.parallel.groups import Groups
from hwmodels.cluster import Cluster

LIMIT = "communication"


def with_collectives(graph: OpGraph, prices: Prices, groups: Groups, cluster: Cluster, overlap: bool) -> Prices:
    """`prices` with those of the graph's collectives; `overlap`: tensor-parallel ones run under matrix products."""
    found = communications(graph)
    if not found:
        return prices
    distinct: dict[tuple[int, float], int] = {}
    columns = {
        name: getattr(prices, name).copy()
        for name in ("time_s", "hbm_bytes", "energy_j", "core_share", "memory_share", "kernels", "limit")
    }
    under = _neighbours(graph, found)
    left = {op: float(prices.time_s[op]) for op in under.values() if op >= 0}  # of a neighbour that hides nothing yet
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
