"""A run's step over its ranks: which graph each distinct rank runs, what it shares with whom, and in which order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cosim.graph import OpGraph, Phase
from cosim.parallel import data_parallel, schedules
from cosim.parallel.data_parallel import DataParallelPlan
from cosim.parallel.groups import Groups, groups
from cosim.parallel.layout import Sharding
from cosim.parallel.schedules import Schedule
from cosim.parallel.sharding import shard
from cosim.parallel.stages import Pipeline, RankGraph, block_order, cut, even_layers
from cosim.parallel.weight_gradients import weight_gradients_last
from cosim.spec import RunSpec
from cosim.stacks.stack import Stack
from cosim.techniques import optimizers
from cosim.techniques.precision import StepFormats
from hwmodels.units import InputError

_TWO_CHUNKS = ("zb-v", "dualpipe-v")


@dataclass(frozen=True, slots=True)
class Stage:
    """What one pipeline rank runs: its part of the step, `late` its ops that make weight gradients apart."""

    part: RankGraph
    late: NDArray[np.bool_]
    plan: DataParallelPlan


@dataclass(frozen=True, slots=True)
class DividedStep:
    """A step over its ranks; without pipeline parallelism there is one stage, no pipeline and no schedule."""

    groups: Groups
    stages: tuple[Stage, ...]
    pipeline: Pipeline | None = None
    schedule: Schedule | None = None
    overlap_tensor: bool = False  # tensor-parallel collectives run under the products beside them
    beside_backward: bool = False  # or whole, beside those of backward that they do not depend on


def divide(whole: OpGraph, spec: RunSpec, stack: Stack, formats: StepFormats, domain: int) -> DividedStep:
    """The step of `spec` over its ranks, on fabrics of `domain` devices; `whole` is one replica's.

    Raises InputError: a degree that does not divide its axis, more stages than blocks, a schedule that cannot be.
    """
    sharding = sharding_of(spec, stack)
    ranks = groups(sharding, spec.data_parallel, spec.parallel.pipeline, domain, spec.shard_within)
    graph = shard(whole, sharding)
    if spec.parallel.pipeline == 1:
        nothing = np.zeros(len(graph), dtype=np.int32)
        part = RankGraph(graph, np.arange(len(graph), dtype=np.int32), nothing)
        stage = _stage(part, nothing.astype(np.bool_), spec, stack, formats, ranks, None)
        return DividedStep(ranks, (stage,), None, None, *_tensor_overlap(spec, stack))
    schedule = _schedule(spec)
    pipeline = cut(graph, _layers(graph, spec, len(schedule.chunk_rank)), schedule.chunk_rank)
    stages = []
    for rank in pipeline.ranks:
        late = np.zeros(len(rank.graph), dtype=np.bool_)
        part, late = weight_gradients_last(rank) if schedule.splits_backward else (rank, late)
        stages.append(_stage(part, late, spec, stack, formats, ranks, part.chunk))
    return DividedStep(ranks, tuple(stages), pipeline, schedule, *_tensor_overlap(spec, stack))


def _tensor_overlap(spec: RunSpec, stack: Stack) -> tuple[bool, bool]:
    """Whether tensor-parallel collectives run under products, and whether whole ones run beside those of backward."""
    said = spec.parallel.overlap.tensor
    return _chosen(said, stack.tensor_overlap), said is not False and stack.tensor_overlap_backward


def sharding_of(spec: RunSpec, stack: Stack) -> Sharding:
    """How one replica of `spec` is cut; what the run file leaves open is as the stack does it."""
    parallel = spec.parallel
    sequence = _chosen(parallel.sequence, stack.sequence_parallel)
    return Sharding(
        tensor=parallel.tensor,
        sequence=sequence and parallel.tensor > 1,
        context=parallel.context,
        context_by=parallel.context_by,
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor,
        imbalance=parallel.expert_imbalance,
        keeps_gathered=not stack.sequence_gathered_again,
        vocabulary_multiple=stack.vocabulary_multiple if parallel.tensor > 1 else 1,
    )


def _chosen(said: bool | None, usual: bool) -> bool:
    """What the run file says, else what the stack does."""
    return usual if said is None else said


def _schedule(spec: RunSpec) -> Schedule:
    parallel = spec.parallel
    chunks = parallel.virtual_stages
    name = parallel.schedule or ("interleaved-1f1b" if chunks > 1 else "1f1b")
    if name in _TWO_CHUNKS and chunks == 1:
        chunks = 2
    return schedules.build(name, parallel.pipeline, spec.micro_steps, chunks)


def _layers(graph: OpGraph, spec: RunSpec, chunks: int) -> tuple[int, ...]:
    """Blocks of each chunk: as the run file says, else as even as they come."""
    blocks = len(block_order(graph))
    if spec.parallel.stage_layers is not None:
        given = spec.parallel.stage_layers
        if len(given) != chunks:
            raise InputError(f"parallel.stage_layers: {len(given)} numbers for {chunks} stages; give one for each")
        return given
    if blocks < chunks:
        raise InputError(
            f"parallel.pipeline: {chunks} stages are more than the model's {blocks} blocks; pipeline x virtual_stages "
            f"may be {blocks} at most"
        )
    return even_layers(blocks, chunks)


def _stage(
    part: RankGraph,
    late: NDArray[np.bool_],
    spec: RunSpec,
    stack: Stack,
    formats: StepFormats,
    ranks: Groups,
    chunk: NDArray[np.int32] | None,
) -> Stage:
    zero, overlap = spec.parallel.zero or 0, spec.parallel.overlap
    if chunk is not None and zero == 2:
        zero = 1  # gradients stay whole until the last micro-batch, as they are added up in place
    graph, update = optimizers.shard_update(part.graph, spec.training.optimizer, zero, ranks.data.size)
    if graph is not part.graph:
        part = _after_update_changed(part, graph)
        late = np.concatenate([late[: len(graph)], np.zeros(max(0, len(graph) - len(late)), dtype=np.bool_)])
        late &= graph.op_phase != Phase.OPTIMIZER
    plan = data_parallel.plan(
        graph,
        group=ranks.data,
        replicas=ranks.replicate if ranks.replicate.size > 1 else None,
        zero=zero,
        formats=formats,
        overlap_gradients=_chosen(overlap.gradients, stack.gradients_overlap),
        overlap_parameters=_chosen(overlap.parameters, stack.parameters_overlap),
        bucket_bytes=stack.bucket_bytes,
        first_bucket_bytes=stack.first_bucket_bytes,
        update=update,
        chunk=None if chunk is None else part.chunk,
        expert_group=ranks.expert_data,
    )
    return Stage(part, late, plan)


def _after_update_changed(part: RankGraph, graph: OpGraph) -> RankGraph:
    """The same part with another update; the ops before it are the same."""
    before = int((part.graph.op_phase != Phase.OPTIMIZER).sum())
    rest = len(graph) - before
    return RankGraph(
        graph,
        np.concatenate([part.source[:before], np.full(rest, -1)]).astype(np.int32),
        np.concatenate([part.chunk[:before], np.full(rest, -1)]).astype(np.int32),
    )
