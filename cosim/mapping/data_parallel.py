"""One rank's step under data parallelism: its segments in order, and the collectives between them.

What happens over time, with ZeRO 3 (FSDP):
- forward: a unit's parameters are gathered, its segments run, its parameters are freed. The host issues a gather when
  it reaches the unit, and runs ahead of the device, so the gather overlaps the compute of the unit before; no more than
  `gathers_in_flight` units are there at once.
- backward: the same in reverse; the next gather is issued before (`pre`) or after (`post`) this unit's backward. A
  unit's gradients are reduce-scattered while the next unit computes.

With ZeRO 0 to 2, gradients are reduced in buckets as backward completes them, in the last micro-step or in each. ZeRO 1
and 2 gather the updated parameters after the update, or, where that overlaps, under the next step's forward.
"""

from __future__ import annotations

from dataclasses import dataclass

from cosim.engine.program import MemoryProfile, Program
from cosim.graph import Category, Phase
from cosim.mapping.rank import Rank, delta, exact, joined
from cosim.mapping.segments import Segment
from cosim.parallel.data_parallel import ROOT, Bucket, DataParallelPlan, Unit
from cosim.stacks.stack import Stack
from cosim.techniques.optimizers import Collective
from hwmodels.cluster import Cluster


def build_program(
    plan: DataParallelPlan, segments: list[Segment], cluster: Cluster, stack: Stack, micro_steps: int
) -> Program:
    """The program of one step of `micro_steps` micro-steps of a rank; all ranks do the same at the same time."""
    step = _Step(plan, segments, cluster, stack, micro_steps)
    step.fetch_updated_parameters(Phase.FORWARD)
    for micro_step in range(micro_steps):
        step.forward(micro_step)
        step.backward(micro_step)
    step.update()
    return step.rank.build()


@dataclass(slots=True)
class _Chunk:
    """Consecutive segments of one unit, in forward, or in backward with their recomputation."""

    layer: int
    segments: list[Segment]


def _chunks(segments: list[Segment], layers: set[int]) -> list[_Chunk]:
    chunks: list[_Chunk] = []
    for segment in segments:
        layer = segment.layer if segment.layer in layers else ROOT
        if chunks and chunks[-1].layer == layer:
            chunks[-1].segments.append(segment)
        else:
            chunks.append(_Chunk(layer, [segment]))
    return chunks


class _Step:
    """The step while its program grows: which units are gathered, what was reduced, who waits for whom."""

    def __init__(
        self, plan: DataParallelPlan, segments: list[Segment], cluster: Cluster, stack: Stack, micro_steps: int
    ) -> None:
        self.plan, self.stack, self.last_micro_step = plan, stack, micro_steps - 1
        self.rank = Rank(plan, cluster, stack)
        self.units: dict[int, Unit] = {unit.layer: unit for unit in plan.units}
        layers = {layer for layer in self.units if layer != ROOT}
        self.forward_chunks = _chunks([s for s in segments if s.phase == Phase.FORWARD], layers)
        backward = [s for s in segments if s.phase in (Phase.BACKWARD, Phase.RECOMPUTE)]
        self.backward_chunks = _chunks(backward, layers)
        self.optimizer = [s for s in segments if s.phase == Phase.OPTIMIZER]
        self.sharded = plan.zero == 3 and plan.degree > 1
        self.reduces_each = plan.degree > 1 and (
            stack.sharded_reduce_each_micro_step
            if plan.zero == 3
            else stack.replicated_reduce_each_micro_step or plan.zero == 2
        )
        self.here: dict[int, int] = {}  # gathered unit -> its gather
        self.releases: list[int | None] = []  # of the n-th gather of a block: the compute after which it is freed
        self.place: dict[int, int] = {}  # gathered block -> n
        self.fetched: dict[int, int] = {}  # unit -> the gather of its updated parameters, ZeRO 1 and 2
        self.reductions: list[int | None] = []
        self.whole: set[int] = set()  # units whose whole gradients are in memory
        self.shards: set[int] = set()  # units whose reduced gradients are
        self.gradient_bytes = 0  # in memory at this point of the program
        self.bucket = 0

    # ZeRO 3: units come and go

    def gather(self, layer: int, phase: Phase, micro_step: int) -> bool:
        """Bring a unit's parameters here, unless they are; answers whether it had to."""
        if not self.sharded or layer in self.here:
            return False
        formats, unit = self.plan.formats, self.units[layer]
        waits: list[int | None] = []
        limit = self.stack.gathers_in_flight
        if layer != ROOT:
            if limit and len(self.releases) >= limit:
                waits.append(self.releases[-limit])
            self.place[layer] = len(self.releases)
            self.releases.append(None)
        if not self.plan.overlap_parameters:
            waits.append(self.rank.last_compute)
        appears = delta(Category.WEIGHTS, unit.elements * formats.parameter, 0.0)
        self.here[layer] = self.rank.collective(
            "all_gather", unit.elements * formats.gather, layer, phase, micro_step, waits, appears
        )
        return True

    def waits_for(self, layer: int, phase: Phase, micro_step: int) -> list[int | None]:
        """What a unit's first segment waits for: its parameters, copied out of the gathered buffer where that is
        done.
        """
        waits = [self.here.get(layer), self.here.get(ROOT), self.fetched.get(layer), self.fetched.get(ROOT)]
        if not self.sharded or not self.stack.gather_copies or layer not in self.here:
            return waits
        size = float(self.units[layer].elements * self.plan.formats.gather * self.stack.gather_copies)
        copied = self.rank.memory_kernel(
            "copy gathered parameters",
            layer,
            phase,
            micro_step,
            read_bytes=size,
            write_bytes=size,
            kernels=self.stack.gather_copies,
            depends=waits,
        )
        return [copied]

    def freed(self, layer: int) -> MemoryProfile | None:
        """A gathered unit goes with the segment that is added next."""
        if layer not in self.here:
            return None
        del self.here[layer]
        return delta(Category.WEIGHTS, -self.units[layer].elements * self.plan.formats.parameter, 1.0)

    def leave(self, layer: int) -> None:
        """The block's compute has been issued: a later gather may wait for its end."""
        if layer in self.place:
            self.releases[self.place[layer]] = self.rank.last_compute

    # the step

    def fetch_updated_parameters(self, phase: Phase) -> None:
        """ZeRO 1 and 2: parameters that other ranks updated, under forward or right after the update."""
        if self.plan.zero not in (1, 2) or self.plan.degree == 1:
            return
        if self.plan.overlap_parameters != (phase == Phase.FORWARD):
            return
        for chunk in self.forward_chunks:
            if chunk.layer not in self.fetched:
                size = self.units[chunk.layer].trainable * self.plan.formats.gather
                waits = [self.rank.last_compute]
                self.fetched[chunk.layer] = self.rank.collective("all_gather", size, chunk.layer, phase, 0, waits)

    def forward(self, micro_step: int) -> None:
        """The forward segments, unit by unit."""
        if self.stack.syncs_each_micro_step:
            self.rank.synchronise(micro_step, Phase.FORWARD)
        self.gather(ROOT, Phase.FORWARD, micro_step)
        chunks, prefetches = self.forward_chunks, self.stack.forward_prefetch and self.plan.overlap_parameters
        blocks = [number for number, chunk in enumerate(chunks) if chunk.layer != ROOT]
        for number, chunk in enumerate(chunks):
            self.gather(chunk.layer, Phase.FORWARD, micro_step)
            if prefetches and number + 1 < len(chunks):
                self.gather(chunks[number + 1].layer, Phase.FORWARD, micro_step)
            after: list[int | None] = []
            if chunk.layer != ROOT or number == 0:
                after = self.waits_for(chunk.layer, Phase.FORWARD, micro_step)
            if number == 0 and not self.plan.overlap_gradients:
                after = [*after, *self.reductions]
            keeps = blocks and number == blocks[-1] and not self.stack.reshard_last_block
            for segment in chunk.segments:
                ends = segment is chunk.segments[-1]
                gone = self.freed(chunk.layer) if ends and chunk.layer != ROOT and not keeps else None
                queued = micro_step == 0 and number == 0 and not self.stack.syncs_each_step
                self.rank.compute(segment, micro_step, after, gone, queued=queued)
                after = []
            self.leave(chunk.layer)
        self.fetched.clear()
        root_leaves = self.stack.reshard_root and self.freed(ROOT)
        if root_leaves:
            self.rank.release(root_leaves, micro_step, Phase.FORWARD)

    def backward(self, micro_step: int) -> None:
        """The backward segments with their recomputation, unit by unit in reverse, and the reductions behind them."""
        last = micro_step == self.last_micro_step
        self.bucket = 0
        root_is_back = self.gather(ROOT, Phase.BACKWARD, micro_step)
        chunks = self.backward_chunks
        prefetch = self.stack.backward_prefetch if self.plan.overlap_parameters else "none"
        for number, chunk in enumerate(chunks):
            following = chunks[number + 1].layer if number + 1 < len(chunks) else ROOT
            self.gather(chunk.layer, Phase.BACKWARD, micro_step)
            if prefetch == "pre":
                self.gather(following, Phase.BACKWARD, micro_step)
            after: list[int | None] = []
            if chunk.layer != ROOT or (number == 0 and root_is_back):
                after = self.waits_for(chunk.layer, Phase.BACKWARD, micro_step)
            for segment in chunk.segments:
                extra = self._gradients_appear(chunk.layer)
                if segment is chunk.segments[-1] and chunk.layer != ROOT:
                    extra = joined(extra, self.freed(chunk.layer))
                self.rank.compute(segment, micro_step, after, extra)
                after = []
                self._reduce_buckets(segment.stop, last, micro_step)
            if chunk.layer != ROOT:
                self.leave(chunk.layer)
                if prefetch == "post":
                    self.gather(following, Phase.BACKWARD, micro_step)
                self._finish_unit(chunk.layer, micro_step, last)
        self._finish_backward(micro_step, last)

    def _finish_backward(self, micro_step: int, last: bool) -> None:
        """The root's gradients, then every reduction that was not to overlap backward."""
        root = self.freed(ROOT)
        if root is not None:
            self.rank.release(root, micro_step, Phase.BACKWARD)
        self._finish_unit(ROOT, micro_step, last)
        if self.sharded and not self.plan.overlap_gradients and (last or self.reduces_each):
            for unit in reversed(self.plan.units[1:]):
                self._reduce_unit(unit.layer, micro_step)
        self._reduce_buckets(None, last, micro_step)
        if self.plan.shards(Category.GRADIENTS) > 1 and self.plan.zero == 2:
            self.whole.clear()

    def _gradients(self, change_bytes: float, fraction: float) -> MemoryProfile:
        """More or fewer bytes of gradients at `fraction` of a task."""
        change = round(change_bytes)
        self.gradient_bytes += change
        return exact(Category.GRADIENTS, change, fraction)

    def _gradients_appear(self, layer: int) -> MemoryProfile | None:
        """A unit's whole gradients come to memory with its first backward segment."""
        if layer in self.whole or not self.units[layer].trainable:
            return None
        self.whole.add(layer)
        return self._gradients(self.units[layer].trainable * self.plan.formats.parameter, 0.0)

    def _finish_unit(self, layer: int, micro_step: int, last: bool) -> None:
        """Backward of a unit is issued: add its gradients to earlier ones, and reduce them where that is done now."""
        unit, formats = self.units[layer], self.plan.formats
        if not unit.trainable:
            return
        if micro_step > 0:
            shards = self.plan.degree if self.reduces_each and self.plan.zero >= 2 else 1
            size = unit.trainable * float(formats.gradient if shards > 1 else formats.parameter) / shards
            self.rank.memory_kernel(
                "accumulate gradients",
                layer,
                Phase.BACKWARD,
                micro_step,
                read_bytes=2 * size,
                write_bytes=size,
                kernels=unit.tensors,
                depends=[self.rank.last_compute],
            )
        now = self.plan.overlap_gradients or layer == ROOT
        if self.sharded and now and (last or self.reduces_each):
            self._reduce_unit(layer, micro_step)

    def _reduce_unit(self, layer: int, micro_step: int) -> None:
        """Reduce-scatter one unit's gradients; copies into the reduction's buffer and format run first."""
        unit, formats = self.units[layer], self.plan.formats
        if not unit.trainable:
            return
        buffer = unit.trainable * formats.reduce if self.stack.gradient_copies else 0
        for copy in range(self.stack.gradient_copies):
            own = formats.parameter if copy == 0 else formats.reduce
            self.rank.memory_kernel(
                "copy gradients for reduction",
                layer,
                Phase.BACKWARD,
                micro_step,
                read_bytes=float(unit.trainable * own),
                write_bytes=float(unit.trainable * formats.reduce),
                depends=[self.rank.last_compute],
                profile=delta(Category.TEMPORARY, buffer, 0.0) if copy == 0 else None,
            )
        profile = joined(
            self._gradients(-unit.trainable * formats.parameter, 1.0) if layer in self.whole else None,
            delta(Category.TEMPORARY, -buffer, 1.0) if buffer else None,
            self._shard_appears(layer),
        )
        self.whole.discard(layer)
        size = unit.trainable * formats.reduce
        waits = [self.rank.last_compute]
        self.reductions.append(
            self.rank.collective("reduce_scatter", size, layer, Phase.BACKWARD, micro_step, waits, profile)
        )

    def _shard_appears(self, layer: int) -> MemoryProfile | None:
        """The reduced gradient of a unit stays until the update."""
        if layer in self.shards:
            return None
        self.shards.add(layer)
        return self._gradients(self.units[layer].trainable * self.plan.formats.gradient / self.plan.degree, 1.0)

    def _reduce_buckets(self, done: int | None, last: bool, micro_step: int) -> None:
        """ZeRO 0 to 2: reduce the buckets that are complete before op `done` (None: all that are left)."""
        plan, stack = self.plan, self.stack
        if plan.degree == 1 or plan.zero == 3 or not (last or self.reduces_each):
            return
        if done is not None and not plan.overlap_gradients:
            return
        kind = "all_reduce" if plan.zero == 0 else "reduce_scatter"
        while self.bucket < len(plan.buckets) and (done is None or plan.buckets[self.bucket].ready < done):
            bucket = plan.buckets[self.bucket]
            if not stack.bucket_views:  # filled before the reduction, read back after it
                size = float(bucket.elements * (plan.formats.parameter + plan.formats.reduce))
                self.rank.memory_kernel(
                    "copy gradients to and from bucket",
                    ROOT,
                    Phase.BACKWARD,
                    micro_step,
                    read_bytes=size,
                    write_bytes=size,
                    kernels=2,
                    depends=[self.rank.last_compute],
                )
            reduced = bucket.elements * plan.formats.reduce
            waits = [self.rank.last_compute]
            profile = self._bucket_is_cut(bucket, micro_step) if plan.zero == 2 else None
            row = self.rank.collective(kind, reduced, ROOT, Phase.BACKWARD, micro_step, waits, profile)
            self.reductions.append(row)
            self.bucket += 1

    def _bucket_is_cut(self, bucket: Bucket, micro_step: int) -> MemoryProfile | None:
        """ZeRO 2 keeps its part of the reduced gradients and adds later micro-steps' to it."""
        formats = self.plan.formats
        whole = self._gradients(-bucket.elements * formats.parameter, 1.0)
        if micro_step > 0:
            return whole
        return joined(whole, self._gradients(bucket.elements * formats.gradient / self.plan.degree, 1.0))

    def update(self) -> None:
        """The optimizer, after every reduction; ranks that hold shards first agree on the gradients' norm.

        A number that the host reads is first summed over ranks that hold shards, then the host waits for it.
        """
        waits: list[int | None] = [*self.reductions, self.rank.last_compute]
        micro_step = self.last_micro_step
        if self.plan.degree > 1 and self.stack.gradient_clipping and self.plan.zero > 0:
            waits = [self.rank.collective("all_reduce", 4.0, ROOT, Phase.OPTIMIZER, micro_step, waits)]
        waits = self._exchange(self.plan.update.before, waits)
        parts = sum(unit.tensors for unit in self.plan.units) if self.stack.optimizer_syncs else 1
        cast = self._gradients_are_cast()
        for segment in self.optimizer:
            last = segment is self.optimizer[-1]
            self.rank.compute(segment, micro_step, waits, cast, parts=parts if last else 1)
            waits, cast = [], None
            if segment.host_waits:
                summed = self._exchange((("all_reduce", 4.0),) if self.plan.optimizer_shards > 1 else (), waits)
                self.rank.synchronise(micro_step, Phase.OPTIMIZER, summed)
        waits = self._exchange(self.plan.update.after, waits)
        if self.plan.update.after:
            self.rank.wait(waits, micro_step, Phase.OPTIMIZER)
        self.rank.release(self._gradients(-self.gradient_bytes, 1.0), micro_step, Phase.OPTIMIZER)
        if self.stack.syncs_each_step:
            self.rank.synchronise(micro_step, Phase.OPTIMIZER)
        self.fetch_updated_parameters(Phase.OPTIMIZER)

    def _exchange(self, collectives: tuple[Collective, ...], waits: list[int | None]) -> list[int | None]:
        """Collectives of a sharded update one after another; answers what to wait for instead of `waits`."""
        for kind, size in collectives:
            after = [*waits, self.rank.last_compute]
            waits = [self.rank.collective(kind, size, ROOT, Phase.OPTIMIZER, self.last_micro_step, after)]
        return waits

    def _gradients_are_cast(self) -> MemoryProfile | None:
        """Whole gradients reach the optimizer in its format, tensor by tensor; of a sharded update, its own part."""
        formats = self.plan.formats
        if not self.whole or formats.gradient == formats.parameter:
            return None
        cast = sum(self.units[layer].trainable for layer in self.whole) * formats.gradient / self.plan.optimizer_shards
        return self._gradients(cast - self.gradient_bytes, 0.0)
