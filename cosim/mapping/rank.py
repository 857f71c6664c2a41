"""One rank's queues while its program grows: compute segments, copies over whole units, collectives."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cosim.engine.allocation import round_allocation
from cosim.engine.program import Label, MemoryProfile, Program, Resource, Sent, Stream
from cosim.graph import Category, Phase
from cosim.mapping.builder import ProgramBuilder, picoseconds
from cosim.mapping.segments import Interference, Segment
from cosim.parallel.data_parallel import DataParallelPlan
from cosim.stacks.stack import Stack
from hwmodels.cluster import Cluster
from hwmodels.interconnect.collectives import CollectiveCost
from hwmodels.work import Pass

COMMUNICATION_PRIORITY = 1
_TYPICAL_BYTES = 64 * 2**20  # large enough for the algorithm and link tiers that big collectives use


def interference(plan: DataParallelPlan, cluster: Cluster) -> Interference:
    """What this plan's collectives hold of a device's cores and memory bandwidth while they run; nothing without
    any.
    """
    if plan.degree == 1:
        return Interference(0.0, 0.0)
    cost = cluster.collective_cost(plan.group.collective("all_gather", _TYPICAL_BYTES))
    return Interference(cost.core_share, cost.memory_share)


class Rank:
    """Adds tasks of one device in the order in which its host issues them; every method answers the task's row."""

    def __init__(
        self,
        plan: DataParallelPlan,
        cluster: Cluster,
        stack: Stack,
        builder: ProgramBuilder | None = None,
        device: int = 0,
    ) -> None:
        self.plan, self.cluster, self.stack = plan, cluster, stack
        self.held = interference(plan, cluster)
        self.last_compute: int | None = None
        self.moved_j: dict[int, float] = {}  # task -> joules, of those that the graph does not have
        self.builder = builder or ProgramBuilder()
        self._host = self.builder.stream(Stream("host", device, "host"))
        self._compute = self.builder.stream(Stream("compute", device, "compute"))
        names = ("communication",) if stack.collectives_serialised else ("all-gather", "reduce")
        queues = [self.builder.stream(Stream(name, device, "communication")) for name in names]
        self._gather, self.reduce_stream = queues[0], queues[-1]
        tiers: dict[str, float] = {}
        if plan.degree > 1:
            tiers = dict(cluster.collective_cost(plan.group.collective("all_gather", _TYPICAL_BYTES)).bandwidth)
        if plan.replicas is not None:
            tiers |= cluster.collective_cost(plan.replicas.collective("all_reduce", _TYPICAL_BYTES)).bandwidth
        self._cores = self.builder.resource(Resource("cores", 1.0))
        self._memory = self.builder.resource(Resource("memory bandwidth", 1.0))
        self._tier = {name: self.builder.resource(Resource(f"{name} link", rate)) for name, rate in tiers.items()}
        self._device = device
        self._replicate = self.reduce_stream
        if plan.replicas is not None and not stack.collectives_serialised:
            self._replicate = self.builder.stream(Stream("replicate", device, "communication"))
        self._messages: dict[str, int] = {}  # direction -> stream

    def compute(
        self,
        segment: Segment,
        micro_step: int,
        after: list[int | None],
        profile: MemoryProfile | None = None,
        *,
        queued: bool = False,
        parts: int = 1,
    ) -> int:
        """A segment on the compute stream, with these changes of memory; `queued`: the host issued it long ago.

        With `parts` the host waits for the device after each of that many equal parts.
        """
        label = _label(segment)
        cores = (1.0 - self.held.core_share) * segment.stretch
        demands = {self._cores: min(cores, 1.0)} if self.plan.degree > 1 and segment.work_ps else {}
        if demands and self.held.contends and segment.memory_share:
            demands[self._memory] = segment.memory_share
        for part in range(parts):
            last = part == parts - 1
            self.last_compute = self.builder.add(
                self._compute,
                _share(segment.work_ps, part, parts),
                label,
                depends=after,
                demands=demands,
                host=self._host,
                launch_ps=_share(segment.launch_ps, part, parts),
                span_ps=segment.work_ps if queued else _share(segment.span_ps, part, parts),
                synchronises=parts > 1,
                profile=profile if last else None,
                micro_step=micro_step,
            )
            after = []
        assert self.last_compute is not None
        return self.last_compute

    def synchronise(self, micro_step: int, phase: Phase, after: list[int | None] | None = None) -> None:
        """The host waits until the device has done all that was issued, and the tasks in `after`."""
        label = Label("host waits for the device", "host", phase.name.lower())
        self.builder.add(
            self._compute,
            0,
            label,
            depends=[*(after or []), self.last_compute],
            host=self._host,
            launch_ps=picoseconds(self.stack.launch_s),
            synchronises=True,
            micro_step=micro_step,
        )

    def wait(self, after: list[int | None], micro_step: int, phase: Phase) -> None:
        """What is computed next starts after these tasks."""
        label = Label("wait for other ranks", "host", phase.name.lower())
        self.last_compute = self.builder.add(self._compute, 0, label, depends=after, micro_step=micro_step)

    def memory_kernel(
        self,
        name: str,
        layer: int,
        phase: Phase,
        micro_step: int,
        *,
        read_bytes: float,
        write_bytes: float,
        kernels: int = 1,
        depends: list[int | None],
        profile: MemoryProfile | None = None,
        reduces: bool = False,
    ) -> int:
        """A copy or addition over whole units, on the compute stream; on that of reductions where it is part of one."""
        cost = self.cluster.accelerator.cost(Pass(read_bytes, write_bytes))
        host_s = self.stack.host_backward_s if phase == Phase.BACKWARD else self.stack.host_forward_s
        row = self.builder.add(
            self.reduce_stream if reduces else self._compute,
            picoseconds(cost.time_s),
            Label(name, "reduce_scatter" if reduces else "copy", phase.name.lower(), layer),
            depends=depends,
            host=self._host,
            launch_ps=picoseconds(host_s * kernels),
            profile=profile,
            micro_step=micro_step,
        )
        self.moved_j[row] = cost.energy_j
        if not reduces:
            self.last_compute = row
        return row

    def release(self, profile: MemoryProfile, micro_step: int, phase: Phase) -> None:
        """Give memory back once the compute issued so far has run."""
        self.builder.add(
            self._compute,
            0,
            Label("free", "copy", phase.name.lower()),
            depends=[self.last_compute],
            profile=profile,
            micro_step=micro_step,
        )

    def collective(
        self,
        kind: str,
        size_bytes: float,
        layer: int,
        phase: Phase,
        micro_step: int,
        depends: list[int | None],
        profile: MemoryProfile | None = None,
        expert_bytes: float = 0.0,
    ) -> int:
        """A collective over the data-parallel group, on the gathering or the reducing stream; `expert_bytes` of the
        buffer go over the ranks that hold the same experts, one after the other.
        """
        parts = {"data": size_bytes - expert_bytes, "expert_data": expert_bytes}
        sent = tuple(
            Sent(kind, name, size) for name, size in parts.items() if size or name == "data" and not expert_bytes
        )
        costs = [
            self.cluster.collective_cost(self.plan.group_of(one.group != "data").collective(kind, one.bytes))
            for one in sent
        ]
        cost = max(costs, key=lambda one: one.time_s)
        time_s = math.fsum(one.time_s for one in costs)
        where = f"block {layer}" if layer >= 0 else "outside blocks"
        what = f"one {kind.replace('_', '-')} over {self.plan.degree} devices"
        row = self.builder.add(
            self._gather if kind == "all_gather" else self.reduce_stream,
            picoseconds(time_s, what),
            Label(f"{kind.replace('_', '-')} {where}", kind, phase.name.lower(), layer, sent=sent),
            depends=depends,
            demands=self._demands(cost),
            host=self._host,
            launch_ps=picoseconds(self.stack.host_unit_s + self.stack.launch_s),
            priority=0 if self.held.contends else COMMUNICATION_PRIORITY,
            profile=profile,
            micro_step=micro_step,
        )
        self.moved_j[row] = math.fsum(one.energy_j for one in costs)
        return row

    def replicated(
        self, size_bytes: float, layer: int, micro_step: int, behind: int, profile: MemoryProfile | None
    ) -> int:
        """With hybrid sharding, the sum of reduced gradients over the ranks that hold the same shards, in a stream of
        its own; without it, nothing: answers the last task.
        """
        if self.plan.replicas is None:
            return behind
        cost = self.cluster.collective_cost(self.plan.replicas.collective("all_reduce", size_bytes))
        where = f"block {layer}" if layer >= 0 else "outside blocks"
        sent = (Sent("all_reduce", "replicate", size_bytes),)
        row = self.builder.add(
            self._replicate,
            picoseconds(cost.time_s, f"one all-reduce over {self.plan.replicas.size} devices"),
            Label(f"all-reduce shards {where}", "all_reduce", Phase.BACKWARD.name.lower(), layer, sent=sent),
            depends=[behind],
            demands=self._demands(cost),
            host=self._host,
            launch_ps=picoseconds(self.stack.launch_s),
            priority=0 if self.held.contends else COMMUNICATION_PRIORITY,
            profile=profile,
            micro_step=micro_step,
        )
        self.moved_j[row] = cost.energy_j
        return row

    def message(
        self, direction: str, cost: CollectiveCost, sent: tuple[Sent, ...], phase: Phase, micro_step: int, after: int
    ) -> int:
        """A message to the next (or the previous) pipeline stage, in the stream of its direction."""
        if direction not in self._messages:
            self._messages[direction] = self.builder.stream(Stream(f"send {direction}", self._device, "communication"))
        row = self.builder.add(
            self._messages[direction],
            picoseconds(cost.time_s, "one message between pipeline stages"),
            Label(f"send {direction}", "send_recv", phase.name.lower(), sent=sent),
            depends=[after],
            demands=self._demands(cost),
            host=self._host,
            launch_ps=picoseconds(self.stack.launch_s),
            priority=COMMUNICATION_PRIORITY,
            micro_step=micro_step,
        )
        self.moved_j[row] = cost.energy_j
        return row

    def pair_reduction(self, size: float, cost: CollectiveCost, micro_step: int, after: list[int | None]) -> int:
        """The sum of gradients that the first and the last pipeline rank both have."""
        sent = (Sent("all_reduce", "tied", size),)
        row = self.builder.add(
            self.reduce_stream,
            picoseconds(cost.time_s, "the sum of tied gradients"),
            Label("all-reduce tied parameters", "all_reduce", Phase.BACKWARD.name.lower(), sent=sent),
            depends=after,
            demands=self._demands(cost),
            host=self._host,
            launch_ps=picoseconds(self.stack.launch_s),
            micro_step=micro_step,
        )
        self.moved_j[row] = cost.energy_j
        return row

    def _demands(self, cost: CollectiveCost) -> dict[int, float]:
        demands = {self._cores: cost.core_share, self._memory: cost.memory_share}
        for tier, moved in cost.link_bytes.items():
            if tier in self._tier and cost.time_s:
                capacity = self.builder.resources[self._tier[tier]].capacity
                demands[self._tier[tier]] = min(capacity, moved / cost.time_s)
        return {resource: amount for resource, amount in demands.items() if amount > 0}

    def delta(self, category: Category, size_bytes: float, fraction: float) -> MemoryProfile:
        """One allocation (or release, if negative) at `fraction` of a task, in the allocator's blocks."""
        size = np.array([abs(int(size_bytes))], dtype=np.int64)
        rounded = int(round_allocation(size, self.stack.allocation_unit_bytes)[0])
        return exact(category, rounded if size_bytes >= 0 else -rounded, fraction)

    def build(self) -> tuple[Program, NDArray[np.float64]]:
        """The program of all tasks added so far, and the joules of those that the graph does not have, at any clock."""
        return program_of([self])


def program_of(ranks: Sequence[Rank]) -> tuple[Program, NDArray[np.float64]]:
    """The program of all tasks that these ranks of one builder added, and the joules of those that no graph has."""
    program = ranks[0].builder.build()
    energy = np.zeros(len(program))
    for rank in ranks:
        energy[list(rank.moved_j)] = list(rank.moved_j.values())
    return program, energy


def _label(segment: Segment) -> Label:
    """A segment's name and phase; of a pipeline rank's backward in two parts, which part it is."""
    where = f"block {segment.layer}" if segment.layer >= 0 else "outside blocks"
    phase = segment.phase.name.lower()
    if segment.role is not None:
        where, phase = f"chunk {segment.layer}", segment.role.name.lower()
    name = f"{phase.replace('_', ' ')} {where}"
    return Label(name, "compute", phase, segment.layer, (segment.start, segment.stop))


def _share(total: int, part: int, parts: int) -> int:
    """Part number `part` of `total` cut into `parts` whole numbers that add up to it."""
    return total * (part + 1) // parts - total * part // parts


def exact(category: Category, size_bytes: int, fraction: float) -> MemoryProfile:
    """The same to the byte, for what is many allocations together."""
    change = np.array([size_bytes], dtype=np.int64)
    return MemoryProfile(np.array([fraction]), np.array([category], dtype=np.int8), change)


def joined(*profiles: MemoryProfile | None) -> MemoryProfile | None:
    """The events of all profiles, in order of their place."""
    present = [profile for profile in profiles if profile is not None]
    if len(present) < 2:
        return present[0] if present else None
    fraction = np.concatenate([profile.fraction for profile in present])
    order = np.argsort(fraction, kind="stable")
    return MemoryProfile(
        fraction[order],
        np.concatenate([profile.category for profile in present])[order],
        np.concatenate([profile.delta_bytes for profile in present])[order],
    )
