"""Data parallelism and ZeRO: which parameters are gathered and whose gradients are reduced together, in which format
and order.

Stages as ZeRO numbers them (Rajbhandari et al. 2020, arXiv 1910.02054): 0 replicates everything and all-reduces
gradients in buckets; 1 shards the optimizer; 2 also the gradients; 3 also the parameters (FSDP), gathered unit by unit
before they are used. Bytes per rank, P parameters over N ranks with 16-bit compute and fp32 Adam: 16P, 4P + 12P/N, 2P +
14P/N, 16P/N.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cosim.graph import Category, Ints, OpGraph, Parameter, Phase
from cosim.parallel.groups import Group
from cosim.parallel.layout import EXPERTS, has
from cosim.techniques import gradient_buffer
from cosim.techniques.optimizers import NO_TRAFFIC, UpdateTraffic
from cosim.techniques.precision import StepFormats

ROOT = -1


@dataclass(frozen=True, slots=True)
class Unit:
    """Parameters that are gathered together: a repeated block, or the root (layer -1), which holds the rest.

    `trainable` elements have gradients; `unused` ones are trainable too, but forward does not use them: they have
    masters and no gradient, and so no optimizer state. `expert_elements` and `expert_trainable` are those of them that
    other ranks hold than those of the plan's group.
    """

    layer: int
    elements: int
    trainable: int
    tensors: int
    expert_elements: int = 0
    expert_trainable: int = 0
    unused: int = 0


@dataclass(frozen=True, slots=True)
class Bucket:
    """Gradients reduced together, over the group of experts where they are theirs: complete once the backward op
    `ready` has run.
    """

    elements: int
    ready: int
    experts: bool = False


@dataclass(frozen=True, slots=True)
class DataParallelPlan:
    """One rank's part: every rank does the same."""

    group: Group  # the ranks that hold the same parameters
    zero: int
    formats: StepFormats
    units: tuple[Unit, ...]  # forward order, the root first
    buckets: tuple[Bucket, ...]  # in the order in which they are complete; empty with zero 3
    overlap_gradients: bool
    overlap_parameters: bool
    update: UpdateTraffic = NO_TRAFFIC  # what the update sends besides gradients and parameters
    buffer_bytes: int = 0  # of the module's buffers, which every rank holds whole
    gradient_bytes: int = 0  # of a buffer that micro-steps add their gradients to
    expert_group: Group | None = None  # the ranks that hold the same experts, where they are others
    replicas: Group | None = None  # with hybrid sharding, the ranks that hold the same shards

    @property
    def degree(self) -> int:
        """Ranks that hold the same parameters."""
        return self.group.size

    @property
    def elements(self) -> int:
        return sum(unit.elements for unit in self.units)

    @property
    def trainable(self) -> int:
        return sum(unit.trainable for unit in self.units)

    @property
    def unused(self) -> int:
        return sum(unit.unused for unit in self.units)

    def group_of(self, experts: bool) -> Group:
        """The ranks that hold the same experts, or the same other parameters."""
        return self.expert_group or self.group if experts else self.group

    def shards(self, what: Category, experts: bool = False) -> int:
        """Into how many parts weights, gradients or optimizer states are cut; those of experts, if asked for."""
        first_sharded = {Category.OPTIMIZER: 1, Category.GRADIENTS: 2, Category.WEIGHTS: 3}[what]
        return self.group_of(experts).size if self.zero >= first_sharded else 1

    def part(self, elements: int, experts: int) -> float:
        """What a rank holds of elements that are cut over their group, `experts` of them over that of experts."""
        return (elements - experts) / self.group.size + experts / self.group_of(True).size

    @property
    def optimizer_shards(self) -> int:
        """Into how many parts the update is cut; where experts are cut otherwise, on average over all elements."""
        whole, others = self.shards(Category.OPTIMIZER), self.shards(Category.OPTIMIZER, experts=True)
        in_experts = sum(unit.expert_trainable for unit in self.units)
        if not in_experts or whole == others:
            return whole
        return max(1, round(self.trainable / ((self.trainable - in_experts) / whole + in_experts / others)))

    def resident_bytes(self) -> dict[Category, int]:
        """What a rank holds during the whole step; gradients only in a buffer."""
        in_experts = sum(unit.expert_elements for unit in self.units)
        trained = sum(unit.expert_trainable for unit in self.units)
        others = self._held(self.elements - in_experts, self.trainable - trained, self.unused, experts=False)
        parts = (others, self._held(in_experts, trained, 0, experts=True))
        weights, optimizer = (sum(part[i] for part in parts) for i in range(2))
        return {
            Category.WEIGHTS: weights + self.buffer_bytes,
            Category.OPTIMIZER: optimizer,
            Category.GRADIENTS: self.gradient_bytes,
        }

    def _held(self, elements: int, trainable: int, unused: int, experts: bool) -> tuple[int, int]:
        """Bytes of weights and of optimizer states that a rank holds."""
        formats = self.formats
        two_copies = formats.master != formats.parameter
        cut, cut_states = self.shards(Category.WEIGHTS, experts), self.shards(Category.OPTIMIZER, experts)
        if cut > 1:
            weights, extra = elements * formats.master, 0
        else:
            weights, extra = elements * formats.parameter, (trainable + unused) * formats.master * two_copies
        return math.ceil(weights / cut), math.ceil((trainable * formats.optimizer_state + extra) / cut_states)


def plan(
    graph: OpGraph,
    *,
    group: Group,
    zero: int,
    formats: StepFormats,
    overlap_gradients: bool,
    overlap_parameters: bool,
    bucket_bytes: int,
    first_bucket_bytes: int,
    update: UpdateTraffic = NO_TRAFFIC,
    chunk: Ints | None = None,
    expert_group: Group | None = None,
    replicas: Group | None = None,
) -> DataParallelPlan:
    """The plan of one rank that shares its parameters with the others of `group`, and its experts with those of
    `expert_group`; `replicas` are the ranks of other groups that hold the same shards.

    `chunk`, of a pipeline rank, is the chunk of each op: its units are chunks instead of blocks.
    """
    in_experts = _in_experts(graph) if expert_group not in (None, group) else frozenset()
    units = _units(graph, in_experts) if chunk is None else _chunk_units(graph, chunk, in_experts)
    buckets = () if zero == 3 else _buckets(graph, formats.gradient, bucket_bytes, first_bucket_bytes, in_experts)
    overlap = (overlap_gradients, overlap_parameters)
    held = _buffer_bytes(graph), gradient_buffer.buffer_bytes(graph)
    apart = expert_group if in_experts else None
    return DataParallelPlan(group, zero, formats, units, buckets, *overlap, update, *held, apart, replicas)


def _in_experts(graph: OpGraph) -> frozenset[int]:
    """Storages of parameters that are experts'."""
    return frozenset(p.storage for p in graph.parameters if has(graph.specs[p.spec], EXPERTS))


def _buffer_bytes(graph: OpGraph) -> int:
    """Weights that are no parameters: tables of rotary embeddings, masks."""
    buffers = (graph.storage_category == Category.WEIGHTS) & (graph.storage_alloc < 0)
    buffers[[p.storage for p in graph.parameters]] = False
    return int(graph.storage_bytes[buffers].sum())


def _units(graph: OpGraph, in_experts: frozenset[int]) -> tuple[Unit, ...]:
    """One unit per repeated block and one for everything else; a tied parameter counts once, where it is first used."""
    layers: dict[int, list[Parameter]] = {ROOT: []}
    for block in graph.blocks:
        for layer in block.layers:
            layers[layer] = []
    seen: set[int] = set()
    for parameter in graph.parameters:
        if parameter.storage not in seen:
            seen.add(parameter.storage)
            home = parameter.layer if parameter.layer in layers else ROOT
            layers[home].append(parameter)
    return tuple(_unit(graph, layer, held, in_experts) for layer, held in layers.items())


def _unit(graph: OpGraph, layer: int, held: list[Parameter], in_experts: frozenset[int]) -> Unit:
    def elements(parameters: list[Parameter]) -> int:
        return sum(math.prod(graph.shapes[p.spec]) for p in parameters)

    trained = [p for p in held if p.trained]
    experts, theirs = (elements([p for p in chosen if p.storage in in_experts]) for chosen in (held, trained))
    unused = elements([p for p in held if p.trainable and not p.trained])
    return Unit(layer, elements(held), elements(trained), len(held), experts, theirs, unused)


def _chunk_units(graph: OpGraph, chunk: Ints, in_experts: frozenset[int]) -> tuple[Unit, ...]:
    """One unit per pipeline chunk, a parameter in that which first reads it; and an empty root."""
    first_use = _first_forward_use(graph)
    held: dict[int, list[Parameter]] = {int(c): [] for c in np.unique(chunk[chunk >= 0])}
    for storage, parameter in {p.storage: p for p in graph.parameters}.items():
        home = int(chunk[first_use[storage]]) if storage in first_use else min(held)
        held[home].append(parameter)
    return (Unit(ROOT, 0, 0, 0), *(_unit(graph, layer, own, in_experts) for layer, own in held.items()))


def _buckets(
    graph: OpGraph, itemsize: int, bucket_bytes: int, first_bucket_bytes: int, in_experts: frozenset[int]
) -> tuple[Bucket, ...]:
    """Gradients in the order in which backward completes them, cut where a bucket is full (PyTorch DDP: first one
    smaller); those of experts that other ranks hold apart from the others.

    Parameters that forward does not use are in them: with find_unused_parameters, without which it refuses them, DDP
    reduces zeros in their place (FSDP2 reduces the gradients that there are, _fsdp_param_group.py, post_backward).
    """
    ready = _gradient_ready(graph)
    parameters = {p.storage: p for p in graph.parameters if p.trainable}
    ordered = sorted(parameters, key=lambda s: ready[s])
    buckets: list[Bucket] = []
    for experts in (False, True):
        held, last, limit = 0, 0, bucket_bytes if buckets else first_bucket_bytes
        for storage in ordered:
            spec = parameters[storage].spec
            if (storage in in_experts) != experts:
                continue
            held += math.prod(graph.shapes[spec])
            last = ready[storage]
            if held * itemsize >= limit:
                buckets.append(Bucket(held, last, experts))
                held, limit = 0, bucket_bytes
        if held:
            buckets.append(Bucket(held, last, experts))
    return tuple(sorted(buckets, key=lambda bucket: bucket.ready))


def _gradient_ready(graph: OpGraph) -> Mapping[int, int]:
    """Parameter storage -> the last backward op of the module uses that read it, mirrored from forward.

    A parameter's gradient is complete when backward leaves the place of the parameter's first use in forward: the end
    of that block's backward for a block's parameter, the beginning of backward for the head's, its end for the
    embedding's.
    """
    backward = np.flatnonzero(graph.op_phase == Phase.BACKWARD)
    if not len(backward):
        return {p.storage: len(graph) - 1 for p in graph.parameters}
    layer_end: dict[int, int] = {}
    for layer in {layer for block in graph.blocks for layer in block.layers}:
        ops = backward[graph.op_layer[backward] == layer]
        layer_end[layer] = int(ops[-1]) if len(ops) else int(backward[-1])
    in_blocks = backward[graph.op_layer[backward] >= 0]
    head_end = int(in_blocks[0]) - 1 if len(in_blocks) else int(backward[-1])
    first_use = _first_forward_use(graph)
    forward_blocks = np.flatnonzero((graph.op_phase == Phase.FORWARD) & (graph.op_layer >= 0))
    first_block = int(forward_blocks[0]) if len(forward_blocks) else len(graph)
    ready: dict[int, int] = {}
    for parameter in graph.parameters:
        if parameter.layer in layer_end:
            end = layer_end[parameter.layer]
        else:
            end = head_end if first_use.get(parameter.storage, 0) > first_block else int(backward[-1])
        ready[parameter.storage] = max(end, ready.get(parameter.storage, 0))
    return ready


def _first_forward_use(graph: OpGraph) -> Mapping[int, int]:
    wanted = {p.storage for p in graph.parameters}
    storages = graph.tensor_storage[graph.op_inputs.indices]
    first: dict[int, int] = {}
    rows = np.repeat(np.arange(len(graph)), np.diff(graph.op_inputs.indptr))
    for row, storage in zip(rows.tolist(), storages.tolist(), strict=True):
        if storage in wanted and storage not in first:
            first[storage] = row
    return first
