"""A step that was played, with all that led to it: how long it took, where the time went, which energy and clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cosim.engine.program import PICOSECONDS_PER_S, Program, Timeline
from cosim.graph import OpGraph, Phase
from cosim.mapping.pricing import Prices
from cosim.parallel.data_parallel import DataParallelPlan
from cosim.parallel.groups import Groups
from cosim.spec import RunSpec
from cosim.stacks.stack import Stack
from cosim.techniques.precision import Precision
from hwmodels.accelerator import Accelerator
from hwmodels.cluster import Cluster

STRAGGLERS = "stragglers"
"""The kind of exposed communication that is waiting for other replicas in a collective."""

_LEAST_FOR_CORES = 0.01  # of the power limit, however much memory and links draw
_SETTLED = 0.005  # of the nominal clock: two rounds that differ by less are one


@dataclass(frozen=True, slots=True)
class RankPart:
    """One pipeline rank's part of the step; without pipeline parallelism there is one, which is all of it."""

    graph: OpGraph
    plan: DataParallelPlan
    prices: Prices


@dataclass(frozen=True)
class Played:
    """A played step with all that led to it.

    `ranks[d]` is device d of the program: the pipeline ranks of the first of the `replicas` that were played beside
    each other, then those of the next.
    """

    spec: RunSpec
    whole: OpGraph  # of one replica, before it was cut
    model_flops: NDArray[np.float64]  # of its ops
    ranks: tuple[RankPart, ...]
    program: Program
    moved_j: NDArray[np.float64]  # of each task that the graph does not have: its bytes through memory and over links
    timeline: Timeline
    accelerator: Accelerator
    cluster: Cluster
    groups: Groups
    stack: Stack
    formats: Precision
    micro_steps_played: int
    clock_rounds: int = 1
    replicas: int = 1

    @property
    def stages(self) -> tuple[RankPart, ...]:
        """The pipeline ranks of the first replica, which has the slow device if there is one."""
        return self.ranks[: len(self.ranks) // self.replicas]

    @cached_property
    def weight(self) -> NDArray[np.int64]:
        """How often each task happens in the step."""
        return repetitions(self.program, self.spec.micro_steps, self.micro_steps_played)

    def occurrences(self, rank: RankPart) -> NDArray[np.int64]:
        """How often each op of a rank's graph runs in the step."""
        in_optimizer = rank.graph.op_phase == Phase.OPTIMIZER
        return np.where(in_optimizer, 1, self.spec.micro_steps)

    def total(self, column: Callable[[Prices], NDArray[np.float64]]) -> float:
        """The sum of a price over all that a device does in the step, on average over pipeline ranks."""
        sums = [float((column(rank.prices) * self.occurrences(rank)).sum()) for rank in self.ranks]
        return math.fsum(sums) / len(sums)

    @cached_property
    def breakdown(self) -> Breakdown:
        """Where the time went."""
        return _break_down(self)

    @property
    def step_time_s(self) -> float:
        """Seconds of the whole step, repeated micro-steps included."""
        return self.breakdown.step_ps / PICOSECONDS_PER_S

    @property
    def clock_ratio(self) -> float:
        """The clock that was played, over the nominal one."""
        return self.accelerator.clock_hz / self.cluster.accelerator.clock_hz

    @cached_property
    def core_energy_j(self) -> float:
        """Joules per device and step of arithmetic and on-chip memory.

        Work is priced at the nominal voltage; the cores' voltage goes with the clock, and energy with its square.
        """
        return (self.total(lambda prices: prices.energy_j) - self._op_memory_energy_j) * self._voltage**2

    @cached_property
    def moved_energy_j(self) -> float:
        """Joules per device and step of bytes through main memory and over links, whose voltage is their own."""
        return self._op_memory_energy_j + float((self.moved_j * self.weight).sum()) / len(self.ranks)

    @property
    def dynamic_energy_j(self) -> float:
        """Joules per device and step above idle."""
        return self.core_energy_j + self.moved_energy_j

    @property
    def _voltage(self) -> float:
        return self.accelerator.power.voltage(self.clock_ratio)

    @cached_property
    def _op_memory_energy_j(self) -> float:
        moved = self.total(lambda prices: prices.hbm_bytes)
        return self.accelerator.power.energy_j(0.0, "fp32", {"hbm": moved})

    @cached_property
    def sustained_clock_hz(self) -> float:
        """The clock (Hz) at which a step of this duration keeps to the power limit; see `Power.sustained_clock`.

        Memory and links draw what they draw, and the cores have what is left.
        """
        nominal = self.cluster.accelerator
        power = nominal.power
        if not self.step_time_s:
            return nominal.clock_hz
        moved_w, core_w = self.moved_energy_j / self.step_time_s, self.core_energy_j / self.step_time_s
        drawn_w = min(power.idle_w + moved_w, (1 - _LEAST_FOR_CORES) * power.limit_w)
        left = replace(power, idle_w=max(power.idle_w, drawn_w))
        return left.sustained_clock(core_w / self.clock_ratio / self._voltage**2, nominal.clock_hz)

    @property
    def clock_is_sustained(self) -> bool:
        """Whether the clock that was played is the one that its power leaves."""
        off = abs(self.sustained_clock_hz - self.accelerator.clock_hz)
        return off <= _SETTLED * self.cluster.accelerator.clock_hz


def repetitions(program: Program, micro_steps: int, played: int) -> NDArray[np.int64]:
    """How often each task happens in a step of `micro_steps`, of which `played` were played: those of the one before
    the last stand for the others.
    """
    return np.where(program.micro_step == played - 2, 1 + micro_steps - played, 1)


@dataclass(frozen=True, slots=True)
class Breakdown:
    """The compute streams' time, in picoseconds of the whole step, on average over pipeline ranks."""

    step_ps: float
    waiting: Mapping[str, float]  # gaps with a collective or a message under way, by its kind
    bubble: float  # gaps in which a rank waits for what another one computes
    interference: float  # compute slowed by collectives
    host: float
    copies: float  # kernels that the graph does not have: copies around collectives, accumulation


def _break_down(played: Played) -> Breakdown:
    ranks = len(played.ranks)
    awaited = _awaited(played.program, played.timeline)
    found = [_of_device(played, device, awaited) for device in range(ranks)]
    step_ps = max(one.step_ps for one in found)
    waiting: dict[str, float] = {}
    for one in found:
        for kind, value in one.waiting.items():
            waiting[kind] = waiting.get(kind, 0.0) + value / ranks
        if played.replicas > 1 and one.step_ps < step_ps:  # in the micro-steps that were not played
            waiting[STRAGGLERS] = waiting.get(STRAGGLERS, 0.0) + (step_ps - one.step_ps) / ranks
    columns = ("bubble", "interference", "host", "copies")
    mean = {name: math.fsum(getattr(one, name) for one in found) / ranks for name in columns}
    return Breakdown(step_ps, waiting, **mean)


def _of_device(played: Played, device: int, awaited: _Awaited) -> Breakdown:
    program, timeline, weight = played.program, played.timeline, played.weight
    kinds = [label.kind for label in program.labels]
    compute, others = _streams(program, device)
    rows = np.flatnonzero(compute[program.stream])
    sent = np.flatnonzero(others[program.stream])
    order = sent[np.argsort(timeline.start_ps[sent], kind="stable")]
    busy = [(int(timeline.start_ps[r]), int(timeline.end_ps[r]), kinds[program.label[r]]) for r in order.tolist()]
    waiting: dict[str, float] = {}
    host = bubble = interference = copies = step = 0.0
    cursor, first = 0, 0
    for row in rows.tolist():
        start, end, times = int(timeline.start_ps[row]), int(timeline.end_ps[row]), float(weight[row])
        first, covered = _covered(busy, first, cursor, min(start, awaited.own[row]), waiting, times)
        met = max(0, min(start, awaited.met[row]) - cursor - covered)
        if met:
            waiting[STRAGGLERS] = waiting.get(STRAGGLERS, 0.0) + met * times
            covered += met
        elsewhere = max(0, min(start, awaited.message_start[row]) - cursor - covered)
        under_way = max(0, min(start, awaited.message_end[row]) - cursor - covered - elsewhere)
        if under_way:
            waiting["send_recv"] = waiting.get("send_recv", 0.0) + under_way * times
        bubble += elsewhere * times
        host += max(0, start - cursor - covered - elsewhere - under_way) * times
        excess = end - start - int(program.work_ps[row])
        launched = program.host[row] >= 0 and end == timeline.issue_ps[row] + program.span_ps[row]
        host += excess * times if launched else 0.0
        interference += 0.0 if launched else excess * times
        copies += int(program.work_ps[row]) * times if kinds[program.label[row]] == "copy" else 0.0
        step += (end - cursor) * times
        cursor = end
    tail = timeline.makespan_ps - cursor
    if tail > 0:
        _, covered = _covered(busy, 0, cursor, timeline.makespan_ps, waiting, 1.0)
        if len(played.stages) > 1:
            bubble += tail - covered
        elif played.replicas > 1:
            waiting[STRAGGLERS] = waiting.get(STRAGGLERS, 0.0) + tail - covered
        else:
            host += tail - covered
        step += tail
    return Breakdown(step, waiting, bubble, interference, host, copies)


def _streams(program: Program, device: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which streams are the device's compute, and which its communication."""
    kinds = np.array([stream.kind if stream.device == device else "" for stream in program.streams])
    return kinds == "compute", ~np.isin(kinds, ["", "compute", "host"])


@dataclass(frozen=True, slots=True)
class _Awaited:
    """Per task: when the last collective of its device that it depends on ends; and of the last task of another device
    that it depends on, a message or what was computed there, when it starts and ends. 0 for none.
    """

    own: list[int]
    met: list[int]  # when the last of these for which other replicas were late began
    message_start: list[int]
    message_end: list[int]


def _awaited(program: Program, timeline: Timeline) -> _Awaited:
    depends, count = program.depends, len(program)
    device = np.array([stream.device for stream in program.streams], dtype=np.int64)[program.stream]
    sends = np.array([stream.kind not in ("compute", "host") for stream in program.streams])[program.stream]
    task = np.repeat(np.arange(count), np.diff(depends.indptr))
    source = depends.indices
    foreign = device[task] != device[source]
    own, met, end, start = (np.zeros(count, dtype=np.int64) for _ in range(4))
    np.maximum.at(own, task, np.where(sends[source] & ~foreign, timeline.end_ps[source], 0))
    np.maximum.at(met, task, np.where(program.rendezvous[source] >= 0, _late(program, timeline)[source], 0))
    np.maximum.at(end, task, np.where(foreign, timeline.end_ps[source], 0))
    # a rank waits for the computation behind a message until the message starts, and behind none until it ends
    message = np.array([label.kind == "send_recv" for label in program.labels], dtype=np.bool_)[program.label]
    begins = np.where(message[source], timeline.start_ps[source], timeline.end_ps[source])
    np.maximum.at(start, task, np.where(foreign, begins, 0))
    return _Awaited(own.tolist(), met.tolist(), start.tolist(), end.tolist())


def _late(program: Program, timeline: Timeline) -> NDArray[np.int64]:
    """When tasks started that waited for other members of their rendezvous; 0 for those that did not."""
    depends, count = program.depends, len(program)
    ready = timeline.issue_ps.copy()
    np.maximum.at(ready, np.repeat(np.arange(count), np.diff(depends.indptr)), timeline.end_ps[depends.indices])
    order = np.argsort(program.stream, kind="stable")
    follows = np.flatnonzero(np.diff(program.stream[order]) == 0)
    ready[order[follows + 1]] = np.maximum(ready[order[follows + 1]], timeline.end_ps[order[follows]])
    return np.where((program.rendezvous >= 0) & (timeline.start_ps > ready), timeline.start_ps, 0)


def _covered(
    busy: list[tuple[int, int, str]], first: int, low: int, high: int, waiting: dict[str, float], times: float
) -> tuple[int, int]:
    """How much of [low, high] a collective covers, added to `waiting` by kind; and where to look from next time."""
    covered, cursor = 0, low
    while first < len(busy) and busy[first][1] <= low:
        first += 1
    for start, end, kind in busy[first:]:
        if start >= high or cursor >= high:
            break
        part = min(end, high) - max(start, cursor)
        if part > 0:
            waiting[kind] = waiting.get(kind, 0.0) + part * times
            covered += part
            cursor = min(end, high)
    return first, covered
