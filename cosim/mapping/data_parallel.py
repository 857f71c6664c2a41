"""One rank's step under data parallelism: its segments on the compute stream, its collectives on communication streams.

What happens over time, with ZeRO 3 (FSDP):
- forward: a unit's parameters are gathered, its segments run, its parameters are freed. The host issues gathers as it
  reaches the units, and runs ahead of the device, so a gather overlaps the compute of the unit before; at most
  `gathers_in_flight` units are gathered at once.
- backward: the same in reverse; the next gather is issued before (`pre`) or after this unit's backward. A unit's
  gradients are reduce-scattered while the next unit computes. With ZeRO 0 to 2 gradients are reduced in buckets as
  backward completes them, in the last micro-step (ZeRO 2: in each), and ZeRO 1 and 2 gather the updated parameters
  after the update, or under the next step's forward when that overlaps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cosim.engine.program import Label, MemoryProfile, Program, Resource, Stream
from cosim.graph import Category, Phase
from cosim.mapping.builder import ProgramBuilder, picoseconds
from cosim.mapping.segments import Segment
from cosim.memory import round_allocation
from cosim.parallel.data_parallel import ROOT, DataParallelPlan, Unit
from cosim.stacks.stack import Stack
from hwmodels.accelerator import Accelerator
from hwmodels.cluster import Cluster, CollectiveCost
from hwmodels.work import Pass

HOST, COMPUTE, GATHER, REDUCE = range(4)
CORES, MEMORY = 0, 1
COMMUNICATION_PRIORITY = 1


def interference(plan: DataParallelPlan, cluster: Cluster) -> tuple[float, float]:
    """The shares of cores and of memory bandwidth that this plan's collectives hold while they run (0, 0 without
    any).
    """
    if plan.degree == 1:
        return 0.0, 0.0
    cost = cluster.collective("all_gather", 64 * 2**20, plan.degree, plan.per_node)
    return cost.core_share, cost.memory_share


def build_program(
    plan: DataParallelPlan,
    segments: list[Segment],
    cluster: Cluster,
    stack: Stack,
    micro_steps: int,
) -> Program:
    """The program of one step of `micro_steps` micro-steps of a rank; all ranks do the same at the same time."""
    step = _Step(plan, segments, cluster, stack, micro_steps)
    step.parameters_from_last_step()
    for micro_step in range(micro_steps):
        step.forward(micro_step)
        step.backward(micro_step)
    step.update()
    return step.builder.build()


@dataclass(slots=True)
class _Chunk:
    """Consecutive segments of one unit in forward, or in backward with their recomputation."""

    layer: int
    segments: list[Segment]


def _chunks(segments: list[Segment], units: set[int]) -> list[_Chunk]:
    chunks: list[_Chunk] = []
    for segment in segments:
        layer = segment.layer if segment.layer in units else ROOT
        if chunks and chunks[-1].layer == layer:
            chunks[-1].segments.append(segment)
        else:
            chunks.append(_Chunk(layer, [segment]))
    return chunks


class _Step:
    """The step while its program grows: what is gathered, what was reduced, and which task comes last."""

    def __init__(
        self, plan: DataParallelPlan, segments: list[Segment], cluster: Cluster, stack: Stack, micro_steps: int
    ) -> None:
        self.plan, self.cluster, self.stack, self.micro_steps = plan, cluster, stack, micro_steps
        self.accelerator: Accelerator = cluster.accelerator
        self.units: dict[int, Unit] = {unit.layer: unit for unit in plan.units}
        layers = {layer for layer in self.units if layer != ROOT}
        forward = [s for s in segments if s.phase == Phase.FORWARD]
        backward = [s for s in segments if s.phase in (Phase.BACKWARD, Phase.RECOMPUTE)]
        self.forward_chunks = _chunks(forward, layers)
        self.backward_chunks = _chunks(backward, layers)
        self.optimizer = [s for s in segments if s.phase == Phase.OPTIMIZER]
        self.reduce_stream = GATHER if stack.collectives_serialised else REDUCE
        streams = [
            Stream("host", 0, "host"),
            Stream("compute", 0, "compute"),
            Stream("communication", 0, "communication"),
        ]
        if self.reduce_stream == REDUCE:
            streams = [*streams[:2], Stream("all-gather", 0, "communication"), Stream("reduce", 0, "communication")]
        tiers = self._tiers()
        self.tier_number = {name: 2 + i for i, name in enumerate(tiers)}
        resources = [Resource("cores", 1.0), Resource("memory bandwidth", 1.0)]
        resources += [Resource(f"{name} link", bandwidth) for name, bandwidth in tiers.items()]
        self.builder = ProgramBuilder(tuple(streams), tuple(resources))
        self.gathered: dict[int, int | None] = {}  # unit -> the gather that brought it here
        self.fetched: dict[int, int] = {}  # unit -> the gather of its updated parameters, ZeRO 1 and 2
        self.last_compute: int | None = None
        self.released: list[int] = []  # last compute of units that were gathered, in order
        self.reductions: list[int] = []

    def _tiers(self) -> dict[str, float]:
        if self.plan.degree == 1:
            return {}
        cost = self.cluster.collective("all_gather", 64 * 2**20, self.plan.degree, self.plan.per_node)
        return dict(cost.bandwidth)

    # compute

    def compute(
        self, segment: Segment, micro_step: int, after: list[int | None], extra: MemoryProfile | None = None
    ) -> int:
        name = _NAMES[segment.phase]
        where = f"block {segment.layer}" if segment.layer >= 0 else "outside blocks"
        demands = None
        held = self.held
        if self.plan.degree > 1 and segment.work_ps:
            demands = {CORES: (1.0 - held[0]) * segment.stretch}
        profile = segment.profile if extra is None else _joined(segment.profile, extra)
        self.last_compute = self.builder.add(
            COMPUTE,
            segment.work_ps,
            Label(f"{name} {where}", "compute", segment.phase.name.lower(), segment.layer),
            depends=after,
            demands=demands,
            host=HOST,
            launch_ps=segment.launch_ps,
            span_ps=segment.span_ps,
            profile=profile,
            micro_step=micro_step,
        )
        return self.last_compute

    @property
    def held(self) -> tuple[float, float]:
        return interference(self.plan, self.cluster)

    def memory_kernel(
        self,
        name: str,
        layer: int,
        phase: Phase,
        read: float,
        write: float,
        kernels: int,
        micro_step: int,
        depends: list[int | None],
        profile: MemoryProfile | None = None,
    ) -> int:
        """A copy or addition over whole units, on the compute stream."""
        cost = self.accelerator.cost(Pass(read, write))
        host_s = self.stack.host_backward_s if phase == Phase.BACKWARD else self.stack.host_forward_s
        self.last_compute = self.builder.add(
            COMPUTE,
            picoseconds(cost.time_s),
            Label(name, "copy", phase.name.lower(), layer),
            depends=depends,
            host=HOST,
            launch_ps=picoseconds(host_s * kernels),
            profile=profile,
            micro_step=micro_step,
        )
        return self.last_compute

    # communication

    def collective(
        self,
        kind: str,
        size: float,
        stream: int,
        layer: int,
        phase: Phase,
        micro_step: int,
        depends: list[int | None],
        profile: MemoryProfile | None = None,
    ) -> int:
        cost = self.cluster.collective(kind, size, self.plan.degree, self.plan.per_node)
        where = f"block {layer}" if layer >= 0 else "root"
        return self.builder.add(
            stream,
            picoseconds(cost.time_s),
            Label(f"{kind.replace('_', '-')} {where}", kind, phase.name.lower(), layer),
            depends=depends,
            demands=self._demands(cost),
            host=HOST,
            launch_ps=picoseconds(self.stack.host_unit_s + self.stack.launch_s),
            priority=COMMUNICATION_PRIORITY,
            profile=profile,
            micro_step=micro_step,
        )

    def _demands(self, cost: CollectiveCost) -> dict[int, float]:
        demands = {CORES: cost.core_share, MEMORY: cost.memory_share}
        for tier, moved in cost.link_bytes.items():
            capacity = cost.bandwidth[tier]
            demands[self.tier_number[tier]] = min(capacity, moved / cost.time_s if cost.time_s else 0.0)
        return {resource: amount for resource, amount in demands.items() if amount > 0}

    # ZeRO 3: units come and go

    @property
    def shards_parameters(self) -> bool:
        return self.plan.zero == 3 and self.plan.degree > 1

    def gather(self, layer: int, phase: Phase, micro_step: int, next_of: int | None = None) -> None:
        """Bring unit `layer` here unless it is; `next_of`: it waits for that task when parameters are not
        overlapped.
        """
        if not self.shards_parameters or layer in self.gathered:
            return
        unit, formats = self.units[layer], self.plan.formats
        limit = self.stack.gathers_in_flight
        waits: list[int | None] = [self.fetched.get(layer)]
        if limit and len(self.released) >= limit:
            waits.append(self.released[-limit])
        if not self.plan.overlap_parameters:
            waits.append(next_of if next_of is not None else self.last_compute)
        size = unit.elements * formats.gather
        held = unit.elements * formats.parameter
        self.gathered[layer] = self.collective(
            "all_gather", size, GATHER, layer, phase, micro_step, waits, _delta(Category.WEIGHTS, held, 0.0)
        )

    def use(self, layer: int, phase: Phase, micro_step: int) -> list[int | None]:
        """What the first segment of unit `layer` waits for; FSDP 2 copies the gathered buffer out into the
        parameters.
        """
        waits = [self.gathered.get(layer), self.gathered.get(ROOT), self.fetched.get(layer), self.fetched.get(ROOT)]
        unit = self.units[layer]
        if self.shards_parameters and self.stack.fsdp == 2 and self.gathered.get(layer) is not None:
            size = float(unit.elements * self.plan.formats.gather)
            copied = self.memory_kernel(
                "copy gathered parameters", layer, phase, size, size, 1, micro_step, list(waits)
            )
            return [copied]
        return waits

    def release(self, layer: int) -> MemoryProfile | None:
        """Free unit `layer` at the end of the segment that is added next."""
        if not self.shards_parameters or layer not in self.gathered:
            return None
        del self.gathered[layer]
        held = self.units[layer].elements * self.plan.formats.parameter
        return _delta(Category.WEIGHTS, -held, 1.0)

    # the step

    def parameters_from_last_step(self) -> None:
        """ZeRO 1 and 2 with overlap: the parameters that the step before updated arrive while forward already runs."""
        if self.plan.zero in (1, 2) and self.plan.degree > 1 and self.plan.overlap_parameters:
            for chunk in self.forward_chunks:
                if chunk.layer not in self.fetched:
                    self._fetch(chunk.layer, Phase.FORWARD, [])

    def _fetch(self, layer: int, phase: Phase, depends: list[int | None]) -> int:
        size = self.units[layer].trainable * self.plan.formats.gather
        task = self.collective("all_gather", size, GATHER, layer, phase, 0, depends)
        self.fetched[layer] = task
        return task

    def forward(self, micro_step: int) -> None:
        self.gather(ROOT, Phase.FORWARD, micro_step)
        chunks = self.forward_chunks
        for number, chunk in enumerate(chunks):
            self.gather(chunk.layer, Phase.FORWARD, micro_step)
            if self.stack.forward_prefetch and number + 1 < len(chunks):
                self.gather(chunks[number + 1].layer, Phase.FORWARD, micro_step)
            after = self.use(chunk.layer, Phase.FORWARD, micro_step) if chunk.layer != ROOT or number == 0 else []
            last_block = number + 2 >= len(chunks) or all(c.layer == ROOT for c in chunks[number + 1 :])
            keeps = not self.stack.reshard_after_forward or (last_block and not self.stack.reshard_last_block)
            for position, segment in enumerate(chunk.segments):
                ends = position == len(chunk.segments) - 1
                frees = ends and chunk.layer != ROOT and not keeps
                self.compute(segment, micro_step, list(after), self.release(chunk.layer) if frees else None)
                after = []
            if chunk.layer != ROOT and self.last_compute is not None:
                self.released.append(self.last_compute)
        if micro_step == 0:
            self.fetched.clear()

    def backward(self, micro_step: int) -> None:
        last = micro_step == self.micro_steps - 1
        chunks = self.backward_chunks
        pending: list[tuple[int, int]] = []  # bucket bytes and the op that completes it are reduced on the way
        prefetch = self.stack.backward_prefetch
        bucket = 0
        for number, chunk in enumerate(chunks):
            self.gather(chunk.layer, Phase.BACKWARD, micro_step)
            if prefetch == "pre" and number + 1 < len(chunks):
                self.gather(chunks[number + 1].layer, Phase.BACKWARD, micro_step)
            after = self.use(chunk.layer, Phase.BACKWARD, micro_step) if chunk.layer != ROOT else []
            for position, segment in enumerate(chunk.segments):
                ends = position == len(chunk.segments) - 1
                extra = (
                    self._gradients_appear(chunk.layer, micro_step) if position == 0 and chunk.layer != ROOT else None
                )
                if ends and chunk.layer != ROOT:
                    extra = _joined(extra, self.release(chunk.layer))
                self.compute(segment, micro_step, list(after), extra)
                after = []
                bucket = self._reduce_buckets(bucket, segment.stop, last, micro_step)
            if chunk.layer != ROOT:
                self.released.append(self.last_compute if self.last_compute is not None else 0)
                self._accumulate(chunk.layer, micro_step)
                self._reduce_unit(chunk.layer, micro_step, last)
            if prefetch == "post" and number + 1 < len(chunks):
                self.gather(chunks[number + 1].layer, Phase.BACKWARD, micro_step)
        self._finish_backward(micro_step, last, bucket)
        del pending

    def _finish_backward(self, micro_step: int, last: bool, bucket: int) -> None:
        """The root unit's gradients, its parameters' release, and every reduction that does not overlap backward."""
        self._accumulate(ROOT, micro_step)
        root = self.release(ROOT)
        self._reduce_unit(ROOT, micro_step, last)
        if root is not None:
            self.builder.add(
                COMPUTE,
                0,
                Label("free root", "copy", "backward"),
                depends=[self.last_compute],
                profile=root,
                micro_step=micro_step,
            )
        if last and not self.plan.overlap_gradients and self.plan.zero == 3:
            for unit in self.plan.units:
                self._reduce(unit.layer, micro_step, force=True)
        self._reduce_buckets(bucket, 2**31 - 1, last, micro_step, finish=True)

    def _gradients_appear(self, layer: int, micro_step: int) -> MemoryProfile | None:
        """Whole gradients of a unit: new in the first micro-step, there already in later ones unless they are
        sharded.
        """
        whole = self.units[layer].trainable * self.plan.formats.parameter
        if self._reduces_each_micro_step() or micro_step == 0:
            return _delta(Category.GRADIENTS, whole, 0.0)
        return None

    def _reduces_each_micro_step(self) -> bool:
        return self.plan.zero >= 2 and self.plan.degree > 1 and self.stack.reduce_each_micro_step

    def _accumulate(self, layer: int, micro_step: int) -> None:
        """Later micro-steps add their gradients to those that are there."""
        unit = self.units[layer]
        if micro_step == 0 or not unit.trainable:
            return
        shards = self.plan.degree if self._reduces_each_micro_step() else 1
        size = unit.trainable * float(self.plan.formats.gradient) / shards
        kernels = unit.tensors if self.stack.fsdp == 2 or self.plan.zero < 3 else 1
        self.memory_kernel(
            "accumulate gradients", layer, Phase.BACKWARD, 2 * size, size, kernels, micro_step, [self.last_compute]
        )

    def _reduce_unit(self, layer: int, micro_step: int, last: bool) -> None:
        if self.plan.zero != 3:
            return
        if self.plan.degree == 1:
            return
        if (last or self.stack.reduce_each_micro_step) and (self.plan.overlap_gradients or not last):
            self._reduce(layer, micro_step)

    def _reduce(self, layer: int, micro_step: int, force: bool = False) -> None:
        """Reduce-scatter one unit's gradients; the copy into the reduction's buffer runs first."""
        del force
        unit, formats = self.units[layer], self.plan.formats
        if not unit.trainable:
            return
        if self.stack.gradient_upcast_copy:
            self.memory_kernel(
                "copy gradients for reduction",
                layer,
                Phase.BACKWARD,
                unit.trainable * float(formats.parameter),
                unit.trainable * float(formats.reduce),
                1,
                micro_step,
                [self.last_compute],
            )
        whole = unit.trainable * formats.parameter
        freed = _delta(Category.GRADIENTS, -whole, 1.0) if layer != ROOT else None
        waits: list[int | None] = [self.last_compute]
        task = self.collective(
            "reduce_scatter",
            unit.trainable * formats.reduce,
            self.reduce_stream,
            layer,
            Phase.BACKWARD,
            micro_step,
            waits,
            freed,
        )
        self.reductions.append(task)

    def _reduce_buckets(self, bucket: int, done: int, last: bool, micro_step: int, finish: bool = False) -> int:
        """Reduce the buckets that backward has completed before op `done`; the number of the next one."""
        plan = self.plan
        if plan.degree == 1 or plan.zero == 3:
            return bucket
        if not (last or (plan.zero == 2 and self.stack.reduce_each_micro_step)):
            return bucket
        if not plan.overlap_gradients and not finish:
            return bucket
        kind = "all_reduce" if plan.zero == 0 else "reduce_scatter"
        while bucket < len(plan.buckets) and plan.buckets[bucket].ready < done:
            size = plan.buckets[bucket].elements * plan.formats.reduce
            task = self.collective(
                kind, size, self.reduce_stream, ROOT, Phase.BACKWARD, micro_step, [self.last_compute]
            )
            self.reductions.append(task)
            bucket += 1
        return bucket

    def update(self) -> None:
        """The optimizer, after every reduction; ranks first agree on the gradients' norm."""
        waits: list[int | None] = [*self.reductions, self.last_compute]
        if self.plan.degree > 1 and self.stack.gradient_clipping and self.plan.zero > 0:
            norm = self.collective(
                "all_reduce", 4.0, self.reduce_stream, ROOT, Phase.OPTIMIZER, self.micro_steps - 1, waits
            )
            waits = [norm]
        for segment in self.optimizer:
            self.compute(segment, self.micro_steps - 1, waits)
            waits = []
        if self.plan.zero in (1, 2) and self.plan.degree > 1 and not self.plan.overlap_parameters:
            for unit in self.plan.units:
                self._fetch(unit.layer, Phase.OPTIMIZER, [self.last_compute])


_NAMES = {
    Phase.FORWARD: "forward",
    Phase.BACKWARD: "backward",
    Phase.RECOMPUTE: "recompute",
    Phase.OPTIMIZER: "optimizer",
}


def _delta(category: Category, size: int | float, fraction: float) -> MemoryProfile:
    rounded = int(round_allocation(np.array([abs(int(size))]), 512)[0])
    return MemoryProfile(
        np.array([fraction]), np.array([category], dtype=np.int8), np.array([rounded if size >= 0 else -rounded])
    )


def _joined(first: MemoryProfile | None, second: MemoryProfile | None) -> MemoryProfile | None:
    """Both profiles' events, in order of their place."""
    if first is None or second is None:
        return first if second is None else second
    fraction = np.concatenate([first.fraction, second.fraction])
    order = np.argsort(fraction, kind="stable")
    return MemoryProfile(
        fraction[order],
        np.concatenate([first.category, second.category])[order],
        np.concatenate([first.delta_bytes, second.delta_bytes])[order],
    )
