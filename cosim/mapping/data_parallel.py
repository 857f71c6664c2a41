"""One rank's step under data parallelism: its segments in order, and the collectives between them.

What happens over time, with ZeRO 3 (FSDP):
- forward: a unit's parameters are gathered, its segments run, its parameters are freed. The host issues a gather when
  it reaches the unit, and runs ahead of the device, so the gather overlaps the compute of the units before.
- backward: the same in reverse; the next gather is issued before (`pre`) or after (`post`) this unit's backward. A
  unit's gradients are reduce-scattered while the next unit computes; the next micro-step waits for all of them.

With ZeRO 0 to 2, gradients are reduced in buckets as backward completes them, in the last micro-step or in each. ZeRO 1
and 2 gather the updated parameters after the update, or, where that overlaps, under the next step's forward.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cosim.engine.program import Program
from cosim.graph import Phase
from cosim.mapping.gathering import Gathering
from cosim.mapping.gradients import Gradients
from cosim.mapping.rank import Rank, joined
from cosim.mapping.segments import Segment
from cosim.parallel.data_parallel import ROOT, DataParallelPlan
from cosim.stacks.stack import Stack
from cosim.techniques.optimizers import Collective
from hwmodels.cluster import Cluster


def build_program(
    plan: DataParallelPlan, segments: list[Segment], cluster: Cluster, stack: Stack, micro_steps: int
) -> tuple[Program, NDArray[np.float64]]:
    """The program of one step of `micro_steps` micro-steps of a rank; all ranks do the same at the same time.

    With it, the joules of each task that the graph does not have: collectives, and copies around them.
    """
    rank = Rank(plan, cluster, stack)
    step = RankStep(plan, segments, rank, stack, micro_steps)
    step.fetch_updated_parameters(Phase.FORWARD)
    for micro_step in range(micro_steps):
        step.forward(micro_step)
        step.backward(micro_step)
    step.update()
    return rank.build()


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


class RankStep:
    """The step of one rank while its program grows.

    `keeps_gathered`: parameters that were gathered stay until the unit's last backward, as they do where micro-batches
    come through a pipeline (pytorch/torchtitan parallelize_llama.py, reshard_after_forward=not pp_enabled).
    """

    def __init__(
        self,
        plan: DataParallelPlan,
        segments: list[Segment],
        rank: Rank,
        stack: Stack,
        micro_steps: int,
        keeps_gathered: bool = False,
    ) -> None:
        self.plan, self.stack, self.last_micro_step = plan, stack, micro_steps - 1
        self.rank, self.keeps_gathered = rank, keeps_gathered
        self.parameters = Gathering(plan, stack, self.rank)
        self.gradients = Gradients(plan, stack, self.rank, micro_steps)
        layers = {unit.layer for unit in plan.units if unit.layer != ROOT}
        self.forward_chunks = _chunks([s for s in segments if s.phase == Phase.FORWARD], layers)
        backward = [s for s in segments if s.phase in (Phase.BACKWARD, Phase.RECOMPUTE)]
        self.backward_chunks = _chunks(backward, layers)
        self.optimizer = [s for s in segments if s.phase == Phase.OPTIMIZER]
        self.fetched: dict[int, int] = {}  # unit -> the gather of its updated parameters, ZeRO 1 and 2

    def fetch_updated_parameters(self, phase: Phase) -> None:
        """ZeRO 1 and 2: parameters that other ranks updated, under forward or right after the update."""
        if self.plan.zero not in (1, 2) or self.plan.degree == 1:
            return
        if self.plan.overlap_parameters != (phase == Phase.FORWARD):
            return
        units = {unit.layer: unit for unit in self.plan.units}
        for chunk in self.forward_chunks:
            if chunk.layer not in self.fetched:
                unit, itemsize = units[chunk.layer], self.plan.formats.gather
                size, of_experts = unit.trainable * itemsize, unit.expert_trainable * itemsize
                waits = [self.rank.last_compute]
                self.fetched[chunk.layer] = self.rank.collective(
                    "all_gather", size, chunk.layer, phase, 0, waits, None, of_experts
                )

    def _ready(self, layer: int, phase: Phase, micro_step: int) -> list[int | None]:
        return self.parameters.ready(layer, phase, micro_step, [self.fetched.get(layer), self.fetched.get(ROOT)])

    def forward(self, micro_step: int) -> None:
        """The forward segments, unit by unit."""
        here, phase = self.parameters, Phase.FORWARD
        if self.stack.syncs_each_micro_step:
            self.rank.synchronise(micro_step, phase)
        here.gather(ROOT, phase, micro_step)
        root = self._ready(ROOT, phase, micro_step)
        for number in range(len(self.forward_chunks)):
            self.forward_unit(number, micro_step, root)
            root = []
        self.fetched.clear()
        root_goes = here.freed(ROOT) if self.stack.reshard_root else None
        if root_goes is not None:
            self.rank.release(root_goes, micro_step, phase)

    def forward_unit(self, number: int, micro_step: int, waits: list[int | None]) -> None:
        """The forward segments of one unit, behind the tasks in `waits`."""
        here, phase, chunks = self.parameters, Phase.FORWARD, self.forward_chunks
        chunk = chunks[number]
        here.gather(chunk.layer, phase, micro_step)
        after = [*waits, *(self._ready(chunk.layer, phase, micro_step) if chunk.layer != ROOT else [])]
        prefetches = self.stack.forward_prefetch and self.plan.overlap_parameters
        if prefetches and number + 1 < len(chunks):
            here.gather(chunks[number + 1].layer, phase, micro_step)
        if number == 0 and not self.plan.overlap_gradients:
            after = [*after, *self.gradients.reductions]
        last = all(later.layer == ROOT for later in chunks[number + 1 :])
        stays = chunk.layer == ROOT or self.keeps_gathered or (last and not self.stack.reshard_last_block)
        for segment in chunk.segments:
            gone = None
            if segment is chunk.segments[-1]:
                gone = here.buffer_goes(chunk.layer) if stays else here.freed(chunk.layer)
            queued = micro_step == 0 and number == 0 and not self.stack.syncs_each_step
            self.rank.compute(segment, micro_step, after, joined(segment.profile, gone), queued=queued)
            after = []
        here.leave(chunk.layer)

    def backward(self, micro_step: int) -> None:
        """The backward segments with their recomputation, unit by unit in reverse, and the reductions behind them."""
        here, gradients, phase = self.parameters, self.gradients, Phase.BACKWARD
        root = self._ready(ROOT, phase, micro_step) if here.gather(ROOT, phase, micro_step) else []
        chunks = self.backward_chunks
        prefetch = self.stack.backward_prefetch if self.plan.overlap_parameters else "none"
        for number, chunk in enumerate(chunks):
            following = chunks[number + 1].layer if number + 1 < len(chunks) else ROOT
            here.gather(chunk.layer, phase, micro_step)
            after = [*root, *(self._ready(chunk.layer, phase, micro_step) if chunk.layer != ROOT else [])]
            root = []
            if prefetch == "pre":
                here.gather(following, phase, micro_step)
            for segment in chunk.segments:
                profile = gradients.profile(segment, chunk.layer, micro_step)
                if segment is chunk.segments[-1] and chunk.layer != ROOT:
                    profile = joined(profile, here.freed(chunk.layer))
                self.rank.compute(segment, micro_step, after, profile)
                after = []
                if segment is not chunk.segments[-1]:
                    gradients.reduce_buckets(segment.stop, micro_step)
            if chunk.layer != ROOT:
                here.leave(chunk.layer)
                if prefetch == "post":
                    here.gather(following, phase, micro_step)
                gradients.finish_unit(chunk.layer, micro_step)
            gradients.reduce_buckets(chunk.segments[-1].stop, micro_step)
        root_goes = here.freed(ROOT)
        if root_goes is not None:
            self.rank.release(root_goes, micro_step, phase)
        gradients.finish_unit(ROOT, micro_step)
        gradients.finish_backward(micro_step)

    def update(self) -> None:
        """The optimizer, after every reduction; ranks that hold shards first agree on the gradients' norm.

        A number that the host reads is first summed over ranks that hold shards, then the host waits for it.
        """
        waits: list[int | None] = [*self.gradients.reductions, self.rank.last_compute]
        micro_step = self.last_micro_step
        if self.plan.degree > 1 and self.stack.gradient_clipping and self.plan.zero > 0:
            waits = [self.rank.collective("all_reduce", 4.0, ROOT, Phase.OPTIMIZER, micro_step, waits)]
        waits = self._exchange(self.plan.update.before, waits)
        parts = sum(unit.tensors for unit in self.plan.units) if self.stack.optimizer_syncs else 1
        for segment in self.optimizer:
            last = segment is self.optimizer[-1]
            profile = self.gradients.update_profile(segment)
            self.rank.compute(segment, micro_step, waits, profile, parts=parts if last else 1)
            waits = []
            if segment.host_waits:
                summed = self._exchange((("all_reduce", 4.0),) if self.plan.optimizer_shards > 1 else (), waits)
                self.rank.synchronise(micro_step, Phase.OPTIMIZER, summed)
        waits = self._exchange(self.plan.update.after, waits)
        if self.plan.update.after:
            self.rank.wait(waits, micro_step, Phase.OPTIMIZER)
        left = self.gradients.gone()
        if left is not None:
            self.rank.release(left, micro_step, Phase.OPTIMIZER)
        if self.stack.syncs_each_step:
            self.rank.synchronise(micro_step, Phase.OPTIMIZER)
        self.fetch_updated_parameters(Phase.OPTIMIZER)

    def _exchange(self, collectives: tuple[Collective, ...], waits: list[int | None]) -> list[int | None]:
        """Collectives of a sharded update one after another; answers what to wait for instead of `waits`."""
        for kind, size in collectives:
            after = [*waits, self.rank.last_compute]
            waits = [self.rank.collective(kind, size, ROOT, Phase.OPTIMIZER, self.last_micro_step, after)]
        return waits
