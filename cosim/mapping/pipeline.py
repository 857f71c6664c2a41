"""A step over pipeline stages: every rank plays its schedule, messages go between them, and all of them end together.

A rank's pass over a chunk is one task: the kernels and collectives of its ops in order, with the highest memory that
they reach. In the last micro-batch, where gradients are reduced beside backward, it is as many tasks as the chunk has
blocks. Micro-batches before it are added up where they are; ZeRO 3 gathers a chunk's parameters once and keeps them
until its last backward (pytorch/torchtitan parallelize_llama.py, reshard_after_forward=not pp_enabled).

A rank computes on as soon as its message is sent where the stack sends beside compute, which needs another chunk to
compute on (Megatron-core's overlap_p2p_comm belongs to the interleaved schedule); else when it has arrived.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cosim.engine.program import MemoryProfile, Program, Sent
from cosim.graph import Phase
from cosim.mapping.builder import ProgramBuilder
from cosim.mapping.data_parallel import RankStep
from cosim.mapping.pricing import Prices
from cosim.mapping.rank import Rank, interference, joined, program_of
from cosim.mapping.segments import Segment, boundaries, segments
from cosim.parallel.divide import DividedStep, Stage
from cosim.parallel.groups import Group, Groups
from cosim.parallel.schedules import Action, Pass, Schedule, needs
from cosim.parallel.stages import Pipeline
from cosim.stacks.stack import Stack
from hwmodels.cluster import Cluster
from hwmodels.interconnect.collectives import CollectiveCost

Key = tuple[Pass, int]  # what, chunk
_BACKWARD = (Pass.INPUT_GRADIENT, Pass.WEIGHT_GRADIENT)


@dataclass(frozen=True, slots=True)
class Passes:
    """A stage's passes as tasks: `whole`, and `parts` block by block; and the segments of its update."""

    whole: dict[Key, Segment]
    parts: dict[Key, list[Segment]]
    update: list[Segment]


def passes(stage: Stage, prices: Prices, cluster: Cluster, stack: Stack, compiled: bool) -> Passes:
    """The passes of a stage over its chunks."""
    graph, chunk = stage.part.graph, stage.part.chunk
    held = interference(stage.plan, cluster)
    backward = np.isin(graph.op_phase, [Phase.BACKWARD, Phase.RECOMPUTE])
    key = np.where(graph.op_phase == Phase.OPTIMIZER, -1, 4 * chunk.astype(np.int64) + 2 * backward + stage.late)
    splits = bool(stage.late.any())
    cuts = np.flatnonzero(np.diff(key)) + 1
    starts = np.union1d(np.array([start for start, _ in boundaries(graph)], dtype=np.int64), cuts)
    fine = list(zip(starts.tolist(), [*starts[1:].tolist(), len(graph)], strict=True))
    in_update = graph.op_phase == Phase.OPTIMIZER
    first = int(np.argmax(in_update)) if in_update.any() else len(graph)
    coarse_starts = [0, *cuts[cuts < first].tolist()]
    coarse = list(zip(coarse_starts, [*coarse_starts[1:], first], strict=True))
    shards = stage.plan.optimizer_shards

    def made(edges: list[tuple[int, int]]) -> list[Segment]:
        return segments(graph, prices, stack, held, shards, compiled, edges)

    found = Passes({}, {}, [s for s in made([e for e in fine if e[0] >= first]) if s.stop > s.start])
    for segment in made(coarse):
        at, what = int(chunk[segment.start]), _what(graph.op_phase[segment.start], stage.late[segment.start], splits)
        found.whole[what, at] = _named(segment, what, at)
    for segment in made([e for e in fine if e[1] <= first]):
        at, what = int(chunk[segment.start]), _what(graph.op_phase[segment.start], stage.late[segment.start], splits)
        found.parts.setdefault((what, at), []).append(_named(segment, what, at, condense=False))
    if splits:  # some schedules do both parts of a backward at once
        edges = {at: [found.whole[what, at] for what in _BACKWARD] for at in np.unique(chunk[chunk >= 0]).tolist()}
        both = made([(first_part.start, last_part.stop) for first_part, last_part in edges.values()])
        for at, segment in zip(edges, both, strict=True):
            found.whole[Pass.BACKWARD, at] = _named(segment, Pass.BACKWARD, at)
            found.parts[Pass.BACKWARD, at] = [part for what in _BACKWARD for part in found.parts[what, at]]
    return found


def _what(phase: int, late: bool, splits: bool) -> Pass:
    if phase == Phase.FORWARD:
        return Pass.FORWARD
    if not splits:
        return Pass.BACKWARD
    return Pass.WEIGHT_GRADIENT if late else Pass.INPUT_GRADIENT


def _named(segment: Segment, what: Pass, chunk: int, condense: bool = True) -> Segment:
    phase = Phase.FORWARD if what == Pass.FORWARD else Phase.BACKWARD
    changes = {name: getattr(segment, name) for name in ("profile", "with_gradients", "with_added")}
    if condense:
        changes = {name: condensed(profile) for name, profile in changes.items()}
    return dataclasses.replace(segment, layer=chunk, phase=phase, role=what, **changes)


def condensed(profile: MemoryProfile | None) -> MemoryProfile | None:
    """The same net change and the same highest total, with its categories, in two points of time."""
    if profile is None or len(profile.fraction) <= 4:
        return profile
    total = np.cumsum(profile.delta_bytes)
    peak = int(np.argmax(total))
    categories = np.unique(profile.category)
    until = np.array([profile.delta_bytes[: peak + 1][profile.category[: peak + 1] == c].sum() for c in categories])
    after = np.array([profile.delta_bytes[peak + 1 :][profile.category[peak + 1 :] == c].sum() for c in categories])
    order = np.argsort(until, kind="stable")  # what goes before what comes
    fractions = np.concatenate([np.full(len(categories), profile.fraction[peak]), np.ones(len(categories))])
    return MemoryProfile(
        fractions,
        np.concatenate([categories[order], categories]).astype(np.int8),
        np.concatenate([until[order], after]).astype(np.int64),
    )


def build_program(
    step: DividedStep,
    prices: Sequence[Prices],
    cluster: Cluster,
    stack: Stack,
    micro_batches: int,
    compiled: bool = False,
) -> tuple[Program, NDArray[np.float64]]:
    """The program of one step of all pipeline ranks, and the joules per task of what no graph has."""
    assert step.pipeline is not None
    assert step.schedule is not None
    stack = dataclasses.replace(stack, replicated_reduce_each_micro_step=False)
    builder = ProgramBuilder()
    ranks = [
        _StageRank(
            stage, passes(stage, price, cluster, stack, compiled), cluster, stack, builder, device, micro_batches
        )
        for device, (stage, price) in enumerate(zip(step.stages, prices, strict=True))
    ]
    wires = _Wires(step.pipeline, step.groups, cluster, stack)
    _play_schedule(ranks, step.schedule, wires)
    _close(ranks, step.pipeline, wires)
    return program_of([rank.rank for rank in ranks])


class _StageRank:
    """One pipeline rank while the program grows."""

    def __init__(
        self,
        stage: Stage,
        found: Passes,
        cluster: Cluster,
        stack: Stack,
        builder: ProgramBuilder,
        device: int,
        micro_batches: int,
    ) -> None:
        self.stage, self.passes, self.stack = stage, found, stack
        self.rank = Rank(stage.plan, cluster, stack, builder, device)
        whole = [segment for (what, _), segment in sorted(found.whole.items()) if what == Pass.FORWARD]
        self.step = RankStep(stage.plan, [*whole, *found.update], self.rank, stack, micro_batches, keeps_gathered=True)
        self.number = {chunk.layer: number for number, chunk in enumerate(self.step.forward_chunks)}
        self.last = micro_batches - 1
        self.blocked: list[int | None] = []  # messages that must be gone before this rank computes again
        self.step.fetch_updated_parameters(Phase.FORWARD)

    def run(self, action: Action, arrived: int | None) -> int:
        """The pass of `action`, behind the message that it needs; answers its last task."""
        waits = [arrived, *self.blocked]
        self.blocked = []
        if action.what == Pass.FORWARD:
            self.step.forward_unit(self.number[action.chunk], action.micro_batch, waits)
        else:
            self._backward(action, waits)
        assert self.rank.last_compute is not None
        return self.rank.last_compute

    def _backward(self, action: Action, waits: list[int | None]) -> None:
        gradients, here, chunk, m = self.step.gradients, self.step.parameters, action.chunk, action.micro_batch
        key = (action.what, chunk)
        reduces = gradients.reduces(m) and action.what != Pass.INPUT_GRADIENT
        parts = self.passes.parts[key] if reduces and self.stage.plan.overlap_gradients else [self.passes.whole[key]]
        waits = [*waits, *here.ready(chunk, Phase.BACKWARD, m, [])]
        ends = action.what != Pass.INPUT_GRADIENT
        for segment in parts:
            profile = gradients.profile(segment, chunk, m)
            if segment is parts[-1] and ends and m == self.last:
                profile = joined(profile, here.freed(chunk))
            self.rank.compute(segment, m, waits, profile)
            waits = []
            if reduces and segment is not parts[-1]:
                gradients.reduce_buckets(segment.stop, m)
        if ends:
            gradients.finish_unit(chunk, m)
            if reduces:
                gradients.reduce_buckets(parts[-1].stop, m)


@dataclass(frozen=True)
class _Wires:
    """Messages between neighbouring chunks."""

    pipeline: Pipeline
    groups: Groups
    cluster: Cluster
    stack: Stack

    def cost(self, size: int, sender: int, receiver: int) -> CollectiveCost:
        """What a message of `size` bytes from one pipeline rank to another costs, the gather behind it included where
        tensor-parallel ranks each send their part.
        """
        tensor = self.groups.tensor
        share = tensor.size if self.stack.pipeline_messages_sharded else 1
        cost = self.cluster.collective_cost(self._pair(sender, receiver).collective("send_recv", size / share))
        if share == 1:
            return cost
        gather = self.cluster.collective_cost(tensor.collective("all_gather", size))
        return dataclasses.replace(cost, time_s=cost.time_s + gather.time_s, energy_j=cost.energy_j + gather.energy_j)

    def sent(self, size: int) -> tuple[Sent, ...]:
        """What each rank sends of such a message, and what ranks do behind it that each got a part."""
        tensor = self.groups.tensor.size
        if tensor == 1 or not self.stack.pipeline_messages_sharded:
            return (Sent("send_recv", "pipeline", size),)
        return Sent("send_recv", "pipeline", size / tensor), Sent("all_gather", "tensor", size)

    def _pair(self, sender: int, receiver: int) -> Group:
        stage, domain = self.groups.pipeline.stride, self.cluster.domain
        together = sender * stage // domain == receiver * stage // domain
        return Group(2, 2, min(stage, domain - 1)) if together else Group(2, 1, stage, min(stage, domain))


def _play_schedule(ranks: list[_StageRank], schedule: Schedule, wires: _Wires) -> None:
    """Every rank's actions in its order, a rank going on as long as what its next action needs is there."""
    chunks, place = len(schedule.chunk_rank), schedule.chunk_rank
    done: dict[tuple[Pass, int, int], int] = {}
    arrived: dict[tuple[Pass, int, int], int] = {}
    queues = [deque(actions) for actions in schedule.ranks]
    while any(queues):
        before = sum(len(queue) for queue in queues)
        for rank, queue in zip(ranks, queues, strict=True):
            while queue and all(need in done for need in needs(queue[0], chunks)):
                action = queue.popleft()
                row = _act(rank, action, arrived)
                _note(done, action, row)
                target = action.chunk + (1 if action.what == Pass.FORWARD else -1)
                if action.what == Pass.WEIGHT_GRADIENT or not 0 <= target < chunks:
                    continue
                way = Pass.FORWARD if action.what == Pass.FORWARD else Pass.INPUT_GRADIENT
                sender, receiver = place[action.chunk], place[target]
                if sender != receiver:
                    row = _send(rank, action, row, wires, sender, receiver)
                arrived[way, target, action.micro_batch] = row
        if sum(len(queue) for queue in queues) == before:
            raise RuntimeError("a pipeline schedule in which every rank waits")


def _act(rank: _StageRank, action: Action, arrived: dict[tuple[Pass, int, int], int]) -> int:
    way = Pass.FORWARD if action.what == Pass.FORWARD else Pass.INPUT_GRADIENT
    message = None
    if action.what != Pass.WEIGHT_GRADIENT:
        message = arrived.pop((way, action.chunk, action.micro_batch), None)
    return rank.run(action, message)


def _note(done: dict[tuple[Pass, int, int], int], action: Action, row: int) -> None:
    parts = (Pass.INPUT_GRADIENT, Pass.WEIGHT_GRADIENT) if action.what == Pass.BACKWARD else (action.what,)
    for what in parts:
        done[what, action.chunk, action.micro_batch] = row


def _send(rank: _StageRank, action: Action, row: int, wires: _Wires, sender: int, receiver: int) -> int:
    forward = action.what == Pass.FORWARD
    boundary = wires.pipeline.boundaries[action.chunk if forward else action.chunk - 1]
    size = boundary.forward_bytes if forward else boundary.backward_bytes
    cost = wires.cost(size, sender, receiver)
    phase = Phase.FORWARD if forward else Phase.BACKWARD
    sent = rank.rank.message(
        "forward" if forward else "backward", cost, wires.sent(size), phase, action.micro_batch, row
    )
    if not (rank.stack.pipeline_messages_overlap and len(rank.number) > 1):
        rank.blocked = [sent]
    return sent


def _close(ranks: list[_StageRank], pipeline: Pipeline, wires: _Wires) -> None:
    """After the last backward: tied gradients are summed, all ranks agree on the gradients' norm, and update."""
    for rank in ranks:
        rank.step.gradients.finish_backward(rank.last)
    if pipeline.tied_elements and len(ranks) > 1:
        first, last = ranks[0], ranks[-1]
        size = pipeline.tied_elements * first.stage.plan.formats.gradient
        pair = wires._pair(0, len(ranks) - 1)
        cost = wires.cluster.collective_cost(pair.collective("all_reduce", size))
        for rank, other in ((first, last), (last, first)):
            after = [rank.rank.last_compute, other.rank.last_compute, *rank.step.gradients.reductions]
            rank.step.gradients.reductions.append(rank.rank.pair_reduction(size, cost, rank.last, after))
    together: list[int | None] = []
    if ranks[0].stack.gradient_clipping:
        together = [rank.rank.last_compute for rank in ranks]
        together += [row for rank in ranks for row in rank.step.gradients.reductions]
    for rank in ranks:
        rank.rank.wait([*together, rank.rank.last_compute, *rank.blocked], rank.last, Phase.OPTIMIZER)
        rank.step.update()
