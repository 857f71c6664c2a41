"""The step cut into segments: runs of consecutive ops of one block and phase, the compute tasks of a program.

A segment stands for many kernels. Its work is their sum; its span says when the last one can end if the host launches
them one by one; its memory profile has every allocation and release at its place.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cosim.engine.allocation import lifetime_profile, round_allocation
from cosim.engine.kernels import merge_kernels
from cosim.engine.program import PICOSECONDS_PER_S, MemoryProfile
from cosim.graph import Category, OpGraph, Phase
from cosim.mapping.pricing import Prices
from cosim.parallel.schedules import Pass
from cosim.stacks.stack import Stack
from cosim.techniques.fusion import compiled_ops
from cosim.techniques.optimizers import whole_ops

_SERVED_FIRST = 0.5  # of the memory bandwidth: the most that a collective has beside compute that could use it all


@dataclass(frozen=True, slots=True)
class Segment:
    """Ops `start` to `stop` (exclusive), all of one phase and block (layer -1: outside blocks).

    Changes of memory come in three: of activations and temporaries alone (`profile`), with those of gradients that stay
    until the update gives them up (`with_gradients`), and with those of gradients that go as soon as they are added to
    the sums of earlier micro-steps (`with_added`; torch/csrc/autograd/functions/accumulate_grad.h: a second gradient is
    a tensor of its own, added in place right after the op that made it).
    """

    start: int
    stop: int
    phase: Phase
    layer: int
    work_ps: int
    launch_ps: int
    span_ps: int
    stretch: float  # how much longer it runs while a communication kernel holds its share of cores and memory bandwidth
    memory_share: float  # of the memory bandwidth, which it would take alone
    profile: MemoryProfile | None
    with_gradients: MemoryProfile | None
    with_added: MemoryProfile | None
    gradient_bytes: int  # by which `with_gradients` changes them
    host_waits: bool = False  # for a number that its last op made
    role: Pass | None = None  # of a pass of a pipeline rank, or a part of one; `layer` is then its chunk


@dataclass(frozen=True, slots=True)
class Interference:
    """What a communication kernel takes of the device while it runs.

    Up to half of the memory bandwidth it is served first, and compute has what is left. One that asks for more
    `contends`: memory serves both in proportion to what they ask for, so that both are slowed by the same factor.
    """

    core_share: float
    memory_share: float

    @property
    def contends(self) -> bool:
        """Whether it asks for so much memory bandwidth that compute slows it in turn."""
        return self.memory_share > _SERVED_FIRST


def boundaries(graph: OpGraph) -> list[tuple[int, int]]:
    """Where phase or block changes, or the host waits for a number; views go with the op before them."""
    count = len(graph)
    if not count:
        return []
    is_view = np.array([kind.op_class == "view" for kind in graph.kinds])[graph.op_kind]
    key = graph.op_phase.astype(np.int64) * 1_000_000 + graph.op_layer
    position = np.where(is_view, -1, np.arange(count))
    latest = np.maximum.accumulate(position)
    first_real = int(np.argmax(~is_view)) if not is_view.all() else 0
    key = key[np.where(latest < 0, first_real, latest)]
    cuts = np.flatnonzero(np.diff(key) != 0) + 1
    waits = np.flatnonzero(host_reads(graph)) + 1
    edges = [0, *np.union1d(cuts, waits[waits < count]).tolist(), count]
    return list(itertools.pairwise(edges))


def host_reads(graph: OpGraph) -> NDArray[np.bool_]:
    """Which ops of the update hand a number that the step made to the host."""
    reads = np.array([kind.target == "aten._local_scalar_dense" for kind in graph.kinds], dtype=np.bool_)
    found: NDArray[np.bool_] = reads[graph.op_kind] & (graph.op_phase == Phase.OPTIMIZER)
    return found


def host_times(graph: OpGraph, stack: Stack, compiled: bool) -> NDArray[np.float64]:
    """Seconds that the host takes to launch one kernel of each op: by phase in eager mode, less in compiled regions."""
    by_phase = np.zeros(len(Phase))
    by_phase[[Phase.FORWARD, Phase.RECOMPUTE]] = stack.host_forward_s
    by_phase[Phase.BACKWARD] = stack.host_backward_s
    by_phase[Phase.OPTIMIZER] = stack.host_optimizer_s
    times: NDArray[np.float64] = by_phase[graph.op_phase]
    if compiled:
        times[compiled_ops(graph, stack.compile_scope)] = stack.host_compiled_s
    return times


def segments(
    graph: OpGraph,
    prices: Prices,
    stack: Stack,
    interference: Interference,
    optimizer_shards: int,
    compiled: bool = False,
    edges: list[tuple[int, int]] | None = None,
) -> list[Segment]:
    """The segments of the step, in execution order; those with the same ops share one computation.

    `edges`: the ranges of ops that become segments; default: see `boundaries`.
    """
    op_ps = np.rint(prices.time_s * PICOSECONDS_PER_S).astype(np.int64)
    launch_ps = np.rint(prices.kernels * host_times(graph, stack, compiled) * PICOSECONDS_PER_S).astype(np.int64)
    unit_bytes = stack.allocation_unit_bytes
    alone = Lifetimes(graph, unit_bytes, optimizer_shards)
    together = Lifetimes(graph, unit_bytes, optimizer_shards, gradients=True)
    known: dict[bytes, tuple[int, int, int, float, float]] = {}
    found: list[Segment] = []
    waits = host_reads(graph)
    for start, stop in boundaries(graph) if edges is None else edges:
        ops = slice(start, stop)
        key = prices.limit[ops].tobytes() + launch_ps[ops].tobytes()
        if key not in known:
            chosen = prices.kernels[ops] > 0
            merged = merge_kernels(op_ps[ops][chosen], launch_ps[ops][chosen])
            known[key] = (*merged, _stretch(prices, ops, interference), _memory_share(prices, ops))
        belongs = start + int(np.argmax(prices.kernels[ops] > 0))  # views around it may be of another block
        phase, layer = Phase(int(graph.op_phase[belongs])), int(graph.op_layer[belongs])
        profile = kept = added = alone.profile(start, stop, op_ps[ops])
        change = together.gradient_bytes(start, stop)
        if change is not None:
            kept = together.profile(start, stop, op_ps[ops])
        if change is not None and phase == Phase.BACKWARD:
            added = together.profile(start, stop, op_ps[ops], added=True)
        profiles = (profile, kept, added, change or 0)
        found.append(Segment(start, stop, phase, layer, *known[key], *profiles, bool(waits[stop - 1])))
    return found


def _stretch(prices: Prices, ops: slice, held: Interference) -> float:
    """Time of the ops while cores and bandwidth are held, over their time alone: each waits for the scarcer of the
    two. Bandwidth that is contended for is not held: the engine shares it.
    """
    time = prices.time_s[ops]
    total = float(time.sum())
    if total == 0:
        return 1.0
    cores = prices.core_share[ops] / (1 - held.core_share)
    memory = prices.memory_share[ops] / (1 - (0.0 if held.contends else held.memory_share))
    return float((time * np.maximum(1.0, np.maximum(cores, memory))).sum()) / total


def _memory_share(prices: Prices, ops: slice) -> float:
    """Share of the memory bandwidth that the ops take while they run alone, on average over their time."""
    time = prices.time_s[ops]
    total = float(time.sum())
    return min(1.0, float((time * prices.memory_share[ops]).sum()) / total) if total else 0.0


class Lifetimes:
    """Activations and temporaries, and `gradients` where asked for, by the op that allocates and the op that frees
    them: op numbers, rounded bytes and categories, one row per storage.
    """

    def __init__(self, graph: OpGraph, unit_bytes: int, optimizer_shards: int, gradients: bool = False) -> None:
        wanted = [Category.ACTIVATIONS, Category.TEMPORARY, *([Category.GRADIENTS] if gradients else [])]
        counted = np.isin(graph.storage_category, wanted)
        counted &= graph.storage_alloc >= 0
        rows = np.flatnonzero(counted)
        self.alloc = graph.storage_alloc[rows]
        self.free = graph.storage_free[rows]
        size = graph.storage_bytes[rows].astype(np.float64)
        in_optimizer = (graph.op_phase[self.alloc] == Phase.OPTIMIZER) & ~whole_ops(graph)[self.alloc]
        size = np.where(in_optimizer, np.ceil(size / optimizer_shards), size).astype(np.int64)
        self.size = round_allocation(size, unit_bytes)
        self.category = graph.storage_category[rows]
        self.gradients = np.where(self.category == Category.GRADIENTS, self.size, 0)
        self._by_alloc, self._by_free = (np.argsort(column, kind="stable") for column in (self.alloc, self.free))
        self._sorted_alloc, self._sorted_free = self.alloc[self._by_alloc], self.free[self._by_free]

    def profile(self, start: int, stop: int, op_ps: NDArray[np.int64], added: bool = False) -> MemoryProfile | None:
        """The profile of ops `start` to `stop`, or None where they neither allocate nor free.

        Gradients that are `added` to earlier ones are freed by the op that allocates them.
        """
        born, gone = self._rows(start, stop)
        if not len(born) and not len(gone):
            return None
        rows = np.union1d(born, gone)
        free = np.where(added & (self.gradients[rows] > 0), self.alloc[rows], self.free[rows])
        return lifetime_profile(op_ps, self.alloc[rows] - start, free - start, self.size[rows], self.category[rows])

    def gradient_bytes(self, start: int, stop: int) -> int | None:
        """By how much ops `start` to `stop` change the bytes of gradients; None where they leave them alone."""
        changes = [self.gradients[rows] for rows in self._rows(start, stop)]
        if not any(change.any() for change in changes):
            return None
        return int(changes[0].sum() - changes[1].sum())

    def _rows(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The storages that are allocated, and that are freed, by ops `start` to `stop`."""
        born = slice(*np.searchsorted(self._sorted_alloc, [start, stop]).tolist())
        gone = slice(*np.searchsorted(self._sorted_free, [start, stop]).tolist())
        return self._by_alloc[born], self._by_free[gone]
