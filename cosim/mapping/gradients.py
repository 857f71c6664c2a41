"""Gradients of one rank while its program grows: what they take, how micro-steps are added up, when they are reduced.

A unit's whole gradients are as its backward makes them. What becomes of them:
- one device, ZeRO 0 and 1: they stay until the update; a later micro-step's are added to them one by one, in place.
  Where buckets are views, they go when their bucket has been filled.
- A buffer of gradients (cosim.techniques.gradient_buffer) is there all the time: the graph's own ops add to it.
- ZeRO 2: each micro-step's go when their bucket is reduced; this rank's part of it stays.
- ZeRO 3 (torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py, foreach_reduce, and _fsdp_param_group.py,
  post_backward): they go with the copy into the buffer of the reduction, which stays until a later unit's copy, and
  that waits for the reduction. The reduced part stays; a later micro-step's is added to it behind its reduction.
- ZeRO 3 that reduces in the last micro-step only: whole gradients stay, cast to the format of the reduction where that
  is another, and later ones are added once the unit's backward is through (_fsdp_param.py,
  to_accumulated_grad_if_needed, accumulate_unsharded_grad_if_needed).
"""

from __future__ import annotations

from cosim.engine.program import MemoryProfile
from cosim.graph import Category, Phase
from cosim.mapping.rank import Rank, exact, joined
from cosim.mapping.segments import Segment
from cosim.parallel.data_parallel import ROOT, Bucket, DataParallelPlan, Unit
from cosim.stacks.stack import Stack


class Gradients:
    """A rank's gradients; methods add tasks to its program, and keep count of the bytes."""

    def __init__(self, plan: DataParallelPlan, stack: Stack, rank: Rank, micro_steps: int) -> None:
        self.plan, self.stack, self.rank, self.last_micro_step = plan, stack, rank, micro_steps - 1
        self.units: dict[int, Unit] = {unit.layer: unit for unit in plan.units}
        self.sharded = plan.zero == 3 and plan.degree > 1
        self.cut = plan.zero == 2 and plan.degree > 1
        self.reduces_each = plan.degree > 1 and (
            stack.sharded_reduce_each_micro_step
            if plan.zero == 3
            else stack.replicated_reduce_each_micro_step or plan.zero == 2
        )
        formats = plan.formats
        reduced_first = self.cut or (self.sharded and self.reduces_each)
        self.summed_apart = self.sharded and not self.reduces_each and formats.reduce != formats.parameter
        self.added_at_once = not (reduced_first or self.summed_apart)
        self.in_views = plan.zero == 0 and plan.degree > 1 and stack.bucket_views
        self.reductions: list[int | None] = []  # of this step
        self.whole: dict[int, int] = {}  # unit -> bytes as backward made them
        self.sums: dict[int, int] = {}  # unit -> bytes of sums over micro-steps in the reduction's format
        self.reduced = 0  # bytes that this rank keeps until the update
        self.shards: set[int] = set()
        self.buffers: list[tuple[int, float]] = []  # reductions whose buffer is still there, with its bytes
        self.bucket = 0
        self.waiting: list[int] = []  # units whose reduction is not to overlap backward

    def reduces(self, micro_step: int) -> bool:
        """Whether this micro-step's gradients are reduced."""
        return self.plan.degree > 1 and (self.reduces_each or micro_step == self.last_micro_step)

    def profile(self, segment: Segment, layer: int, micro_step: int) -> MemoryProfile | None:
        """A backward segment's changes of memory, gradients counted."""
        if micro_step > 0 and self.added_at_once:
            return segment.with_added
        self.whole[layer] = self.whole.get(layer, 0) + segment.gradient_bytes
        return segment.with_gradients

    def finish_unit(self, layer: int, micro_step: int) -> None:
        """A unit's backward is issued: its gradients are added to earlier ones, and reduced where that is done now."""
        if not self.units[layer].trainable:
            return
        if self.plan.gradient_bytes:
            pass
        elif self.added_at_once and micro_step > 0:
            size = float(self.units[layer].trainable * self.plan.formats.parameter)
            self._kernel("accumulate gradients", layer, micro_step, read_bytes=2 * size, write_bytes=size)
        elif self.summed_apart:
            self._sum_apart(layer, micro_step)
        if self.sharded and self.reduces(micro_step):
            if self.plan.overlap_gradients or layer == ROOT:
                self._reduce_unit(layer, micro_step)
            else:
                self.waiting.append(layer)

    def finish_backward(self, micro_step: int) -> None:
        """What was not to overlap backward; then ZeRO 3's compute waits for its reductions, and their buffers go.

        torch/distributed/fsdp/_fully_shard/_fsdp_state.py, _root_post_backward_final_callback; as in FSDP 1
        (torch/distributed/fsdp/_runtime_utils.py, _post_backward_final_callback).
        """
        for layer in self.waiting:
            self._reduce_unit(layer, micro_step)
        self.waiting.clear()
        self.reduce_buckets(None, micro_step)
        self.bucket = 0
        if self.sharded and self.reduces(micro_step):
            self.rank.wait([self.rank.last_compute, *self.reductions[-len(self.units) :]], micro_step, Phase.BACKWARD)
            left = self._buffers_go(0)
            if left is not None:
                self.rank.release(left, micro_step, Phase.BACKWARD)

    def reduce_buckets(self, done: int | None, micro_step: int) -> None:
        """ZeRO 0 to 2: reduce the buckets that are complete before op `done` (None: all that are left)."""
        plan = self.plan
        if plan.zero == 3 or not self.reduces(micro_step) or (done is not None and not plan.overlap_gradients):
            return
        while self.bucket < len(plan.buckets) and (done is None or plan.buckets[self.bucket].ready < done):
            self._reduce_bucket(plan.buckets[self.bucket], micro_step)
            self.bucket += 1

    def update_profile(self, segment: Segment) -> MemoryProfile | None:
        """A segment of the update: whole gradients go as it has read them; reduced ones are as it wants them."""
        if self.cut or self.sharded or self.in_views:
            return segment.profile
        self.reduced += segment.gradient_bytes
        return segment.with_gradients

    def gone(self) -> MemoryProfile | None:
        """After the update: what is left of them goes."""
        left = self.reduced + sum(self.whole.values()) + sum(self.sums.values())
        return exact(Category.GRADIENTS, -left, 1.0) if left else None

    # what gradients take

    def _keep(self, change: float) -> MemoryProfile:
        size = round(change)
        self.reduced += size
        return exact(Category.GRADIENTS, size, 1.0)

    def _whole_go(self, layer: int) -> MemoryProfile | None:
        """A unit's whole gradients and their sums go at the end of a task."""
        size = self.whole.pop(layer, 0) + self.sums.pop(layer, 0)
        return exact(Category.GRADIENTS, -size, 1.0) if size else None

    def _buffers_go(self, kept: int) -> MemoryProfile | None:
        """The oldest buffers of reductions go, but for `kept`, at the beginning of a task that waits for them."""
        going, self.buffers = self.buffers[: len(self.buffers) - kept], self.buffers[len(self.buffers) - kept :]
        return joined(*(self.rank.delta(Category.TEMPORARY, -size, 0.0) for _, size in going))

    # tasks

    def _kernel(
        self,
        name: str,
        layer: int,
        micro_step: int,
        *,
        read_bytes: float,
        write_bytes: float,
        profile: MemoryProfile | None = None,
        behind: int | None = None,
    ) -> int:
        """A pass over a unit's gradients, tensor by tensor: on the compute stream, or `behind` a reduction on its."""
        return self.rank.memory_kernel(
            name,
            layer,
            Phase.BACKWARD,
            micro_step,
            read_bytes=read_bytes,
            write_bytes=write_bytes,
            kernels=self.units[layer].tensors,
            depends=[self.rank.last_compute if behind is None else behind],
            profile=profile,
            reduces=behind is not None,
        )

    def _sum_apart(self, layer: int, micro_step: int) -> None:
        """Whole gradients are summed in the reduction's format: cast in the first micro-step, added in later ones."""
        if micro_step == self.last_micro_step == 0:
            return
        unit, formats = self.units[layer], self.plan.formats
        made, summed = (float(unit.trainable * size) for size in (formats.parameter, formats.reduce))
        gone = exact(Category.GRADIENTS, -self.whole.pop(layer, 0), 1.0)
        if micro_step > 0:
            name, read = "accumulate gradients", made + summed
        else:
            name, read = "cast gradients", made
            self.sums[layer] = round(summed)
            gone = joined(exact(Category.GRADIENTS, self.sums[layer], 0.0), gone) or gone
        self._kernel(name, layer, micro_step, read_bytes=read, write_bytes=summed, profile=gone)

    def _reduce_unit(self, layer: int, micro_step: int) -> None:
        """Reduce-scatter one unit's gradients; copies into the reduction's buffer and format run first."""
        unit, formats, stack = self.units[layer], self.plan.formats, self.stack
        buffer = float(unit.trainable * formats.reduce) if stack.gradient_copies else 0.0
        own = formats.reduce if layer in self.sums else formats.parameter
        for copy in range(stack.gradient_copies):
            depends: list[int | None] = [self.rank.last_compute]
            profile = None
            if copy == 0:
                if stack.reductions_in_flight:
                    depends += [row for row, _ in self.buffers[: len(self.buffers) - stack.reductions_in_flight + 1]]
                profile = joined(
                    self._buffers_go(max(stack.reductions_in_flight - 1, 0)) if stack.reductions_in_flight else None,
                    self.rank.delta(Category.TEMPORARY, buffer, 0.0),
                    self._whole_go(layer),
                )
            self.rank.memory_kernel(
                "copy gradients for reduction",
                layer,
                Phase.BACKWARD,
                micro_step,
                read_bytes=float(unit.trainable * (own if copy == 0 else formats.reduce)),
                write_bytes=float(unit.trainable * formats.reduce),
                depends=depends,
                profile=profile,
            )
        first = layer not in self.shards
        self.shards.add(layer)
        held = self.plan.part(unit.trainable, unit.expert_trainable)
        output = held * formats.reduce
        appears = self.rank.delta(Category.TEMPORARY, output, 0.0)
        goes = self.rank.delta(Category.TEMPORARY, -output, 1.0)
        kept = self._keep(held * formats.gradient) if first else None
        buffer_goes = None
        if buffer and not stack.reductions_in_flight:
            buffer_goes = self.rank.delta(Category.TEMPORARY, -buffer, 1.0)
        ends = joined(kept, goes) if first else None
        row = self.rank.collective(
            "reduce_scatter",
            unit.trainable * formats.reduce,
            layer,
            Phase.BACKWARD,
            micro_step,
            [self.rank.last_compute],
            joined(appears, self._whole_go(layer), buffer_goes, None if self.plan.replicas else ends),
            expert_bytes=unit.expert_trainable * formats.reduce,
        )
        if buffer and stack.reductions_in_flight:
            self.buffers.append((row, buffer))
        row = self.rank.replicated(output, layer, micro_step, row, ends)
        if not first:
            part = held * formats.gradient
            row = self._kernel(
                "accumulate gradients",
                layer,
                micro_step,
                read_bytes=output + part,
                write_bytes=part,
                profile=goes,
                behind=row,
            )
        self.reductions.append(row)

    def _reduce_bucket(self, bucket: Bucket, micro_step: int) -> None:
        plan, formats = self.plan, self.plan.formats
        if not self.stack.bucket_views:  # filled before the reduction, read back after it
            size = float(bucket.elements * (formats.parameter + formats.reduce))
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
        kind = "all_reduce" if plan.zero == 0 else "reduce_scatter"
        held = bucket.elements / plan.group_of(bucket.experts).size
        part = held * formats.gradient
        profile = None
        if self.cut or self.in_views:
            profile = self._bucket_goes(bucket)
        if self.cut and micro_step == 0:
            profile = joined(profile, self._keep(part))
        size = bucket.elements * formats.reduce
        waits = [self.rank.last_compute]
        expert_bytes = size if bucket.experts else 0.0
        row = self.rank.collective(kind, size, ROOT, Phase.BACKWARD, micro_step, waits, profile, expert_bytes)
        row = self.rank.replicated(float(size) / plan.degree, ROOT, micro_step, row, None)
        if self.cut and micro_step > 0:
            output = held * formats.reduce
            row = self._kernel(
                "accumulate gradients", ROOT, micro_step, read_bytes=part + output, write_bytes=part, behind=row
            )
        self.reductions.append(row)

    def _bucket_goes(self, bucket: Bucket) -> MemoryProfile | None:
        """The whole gradients of a bucket, wherever they were made; the last bucket takes what rounding left."""
        there = sum(self.whole.values())
        last = bucket is self.plan.buckets[-1]
        left = size = there if last else min(there, bucket.elements * self.plan.formats.parameter)
        for layer, held in list(self.whole.items()):
            taken = min(held, left)
            left -= taken
            self.whole[layer] = held - taken
        return exact(Category.GRADIENTS, -size, 1.0) if size else None
