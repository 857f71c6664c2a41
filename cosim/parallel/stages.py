"""A step cut into pipeline chunks, and the part of it that each pipeline rank runs.

A chunk (virtual stage) is a run of consecutive blocks; the first one also has what comes before the blocks (embedding),
the last one what comes after them (head, loss). A rank holds one chunk or several. Its graph is the one-device graph
(or that of a tensor-parallel rank) restricted to its chunks' ops and to the update of their parameters: every later
stage sees a step like any other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cosim.graph import Block, Category, Csr, Ints, OpGraph, OpKind, Phase
from hwmodels.units import InputError

Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Boundary:
    """What crosses from a chunk to the next in forward, and back in backward: bytes per micro-batch."""

    forward_bytes: int
    backward_bytes: int


@dataclass(frozen=True, slots=True)
class RankGraph:
    """What one pipeline rank runs: its ops in order, the op of the whole step that each was, and its chunk (-1: the
    update).
    """

    graph: OpGraph
    source: Ints
    chunk: Ints


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A step over pipeline ranks. `boundaries[c]` lies between chunks c and c + 1; `tied_bytes` are gradients of
    parameters that the first and the last rank both hold, which they sum.
    """

    ranks: tuple[RankGraph, ...]
    chunk_rank: tuple[int, ...]  # which rank holds each chunk
    boundaries: tuple[Boundary, ...]
    tied_elements: int


def even_layers(layers: int, chunks: int) -> tuple[int, ...]:
    """Layers per chunk, the earlier ones one more where they do not divide."""
    return tuple(layers // chunks + (c < layers % chunks) for c in range(chunks))


def cut(graph: OpGraph, chunk_layers: Sequence[int], chunk_rank: Sequence[int]) -> Pipeline:
    """The step of `graph` over pipeline ranks: chunk c has `chunk_layers[c]` blocks and belongs to `chunk_rank[c]`.

    Raises InputError: as many layers as the model does not have.
    """
    layers = block_order(graph)
    if sum(chunk_layers) != len(layers):
        raise InputError(
            f"parallel.stage_layers: the stages hold {sum(chunk_layers)} layers together, and the model has "
            f"{len(layers)} blocks"
        )
    chunk_of_layer = np.repeat(np.arange(len(chunk_layers)), chunk_layers)
    chunks = dict(zip(layers, chunk_of_layer.tolist(), strict=True))
    op_chunk = _op_chunks(graph, chunks, len(chunk_layers))
    ranks = max(chunk_rank) + 1
    op_rank = np.where(op_chunk >= 0, np.asarray(chunk_rank)[op_chunk], -1)
    held = [_held_parameters(graph, op_rank == rank) for rank in range(ranks)]
    owners = _Owners(graph)
    found = tuple(_rank_graph(graph, op_rank, op_chunk, rank, held[rank], owners) for rank in range(ranks))
    tied = set[int]().union(*(held[a] & held[b] for a in range(ranks) for b in range(a)))
    elements = sum(int(np.prod(graph.shapes[p.spec])) for p in {p.storage: p for p in graph.parameters}.values()
                   if p.storage in tied)  # fmt: skip
    return Pipeline(found, tuple(chunk_rank), _boundaries(graph, op_chunk, len(chunk_layers)), elements)


def block_order(graph: OpGraph) -> list[int]:
    """The repeated blocks in the order in which forward runs them."""
    forward = graph.op_layer[(graph.op_phase == Phase.FORWARD) & (graph.op_layer >= 0)]
    return list(dict.fromkeys(forward.tolist()))


def _op_chunks(graph: OpGraph, chunk_of_layer: dict[int, int], chunks: int) -> Ints:
    """The chunk of every op: its block's; outside blocks that of the block before it, in the order of its phase."""
    found = np.full(len(graph), -1, dtype=np.int32)
    layers, phases = graph.op_layer.tolist(), graph.op_phase.tolist()
    for direction, first in ((0, 0), (1, chunks - 1)):
        mine = [op for op, phase in enumerate(phases) if phase != Phase.OPTIMIZER and (phase != 0) == bool(direction)]
        inside = [number for number, op in enumerate(mine) if layers[op] in chunk_of_layer]
        last = inside[-1] if inside else -1
        current = first
        for number, op in enumerate(mine):
            current = chunk_of_layer.get(layers[op], current)
            found[op] = current if number <= last else (0 if direction else chunks - 1)
    return found


def _held_parameters(graph: OpGraph, ops: Bools) -> set[int]:
    """Storages of parameters that these ops read."""
    parameters = {p.storage for p in graph.parameters}
    read = graph.tensor_storage[graph.op_inputs.indices[np.repeat(ops, np.diff(graph.op_inputs.indptr))]]
    return parameters.intersection(np.unique(read).tolist())


class _Owners:
    """Which parameter each storage of the update belongs to: its gradient, its moments, itself."""

    def __init__(self, graph: OpGraph) -> None:
        self.graph = graph
        self.of: dict[int, int] = {p.storage: p.storage for p in graph.parameters}
        self.ops = np.flatnonzero(graph.op_phase == Phase.OPTIMIZER).tolist()
        self.lists = {op: _list_length(graph.kinds[graph.op_kind[op]]) for op in self.ops}
        for ordered in (self.ops, list(reversed(self.ops)), self.ops):
            for op in ordered:
                self._spread(op)

    def storages(self, op: int) -> tuple[list[int], list[int]]:
        storage = self.graph.tensor_storage
        return (
            storage[self.graph.op_inputs.row(op)].tolist(),
            storage[self.graph.op_outputs.row(op)].tolist(),
        )

    def _spread(self, op: int) -> None:
        inputs, outputs = self.storages(op)
        count = self.lists[op]
        for i in range(count or 1):
            mine = [*inputs[i::count], *outputs[i::count]] if count else [*inputs, *outputs]
            owners = {self.of[s] for s in mine if s in self.of}
            if len(owners) == 1:
                owner = owners.pop()
                for s in mine:
                    self.of.setdefault(s, owner)


def _list_length(kind: OpKind) -> int:
    """How many tensors each list of a multi-tensor op has; 0 for an op on single tensors."""
    if not ("_foreach_" in kind.target or "_fused_" in kind.target or "fused_" in kind.target):
        return 0
    run = next((i for i, place in enumerate(kind.mutated) if place != i), len(kind.mutated))
    count = len(kind.outputs) or run
    return count if count and len(kind.inputs) >= count else 0


def _rank_graph(
    graph: OpGraph, op_rank: Ints, op_chunk: Ints, rank: int, parameters: set[int], owners: _Owners
) -> RankGraph:
    kinds = {kind: number for number, kind in enumerate(graph.kinds)}
    inputs: list[list[int]] = []
    outputs: list[list[int]] = []
    source: list[int] = []
    op_kind: list[int] = []
    in_update = graph.op_phase == Phase.OPTIMIZER
    for op in np.flatnonzero(in_update | (op_rank == rank)).tolist():
        ins, outs = graph.op_inputs.row(op).tolist(), graph.op_outputs.row(op).tolist()
        number = int(graph.op_kind[op])
        if in_update[op]:
            part = _part_of_update(graph, op, ins, outs, parameters, owners)
            if part is None:
                continue
            kind, ins, outs = part
            number = kinds.setdefault(kind, len(kinds))
        source.append(op)
        op_kind.append(number)
        inputs.append(ins)
        outputs.append(outs)
    at = np.array(source, dtype=np.int32)
    op_inputs, op_outputs = Csr.of(inputs), Csr.of(outputs)
    alloc, free = _lifetimes(graph, at, op_inputs, op_outputs)
    layers = set(graph.op_layer[at].tolist())
    made = dataclasses.replace(
        graph,
        kinds=tuple(kinds),
        op_kind=np.array(op_kind, dtype=np.int32),
        op_phase=graph.op_phase[at],
        op_module=graph.op_module[at],
        op_layer=graph.op_layer[at],
        op_inputs=op_inputs,
        op_outputs=op_outputs,
        storage_category=np.where(
            _used(graph, op_inputs, op_outputs), graph.storage_category, Category.TEMPORARY
        ).astype(np.int8),
        storage_alloc=alloc,
        storage_free=free,
        parameters=tuple(p for p in graph.parameters if p.storage in parameters),
        blocks=tuple(block for block in (_held_block(block, layers) for block in graph.blocks) if block.layers),
    )
    return RankGraph(made, at, op_chunk[at])


def _used(graph: OpGraph, op_inputs: Csr, op_outputs: Csr) -> Bools:
    """Which storages a rank has anything of: what it does not touch, weights of other ranks, is not in its memory."""
    used = np.zeros(len(graph.storage_alloc), dtype=np.bool_)
    for rows in (op_inputs, op_outputs):
        used[graph.tensor_storage[rows.indices]] = True
    return used


def _held_block(block: Block, layers: Iterable[int]) -> Block:
    held = set(layers)
    return dataclasses.replace(block, layers=tuple(layer for layer in block.layers if layer in held))


def _part_of_update(
    graph: OpGraph, op: int, ins: list[int], outs: list[int], parameters: set[int], owners: _Owners
) -> tuple[OpKind, list[int], list[int]] | None:
    """The op of the update on what belongs to these parameters; None where nothing does."""
    kind = graph.kinds[graph.op_kind[op]]
    in_storages, out_storages = owners.storages(op)
    count = owners.lists[op]
    if not count:
        known = [owners.of[s] for s in (*in_storages, *out_storages) if s in owners.of]
        distinct = set(known)
        if len(distinct) == 1 and not distinct & parameters:
            return None
        if len(distinct) <= 1 and len(kind.inputs) < 3:
            return kind, ins, outs
        kept = [
            place for place, s in enumerate(in_storages) if owners.of.get(s, -1) in parameters or s not in owners.of
        ]
        return _restricted(kind, ins, outs, kept, list(range(len(outs))))
    lists = count * (len(ins) // count)
    held = {s for s in in_storages if owners.of.get(s) in parameters}
    whole = {i for i in range(count) if not held.isdisjoint(in_storages[i:lists:count])}
    if not whole:
        return None
    kept = [place for place in range(len(ins)) if place >= lists or place % count in whole]
    made = [place for place in range(len(outs)) if len(outs) % count or place % count in whole]
    return _restricted(kind, ins, outs, kept, made)


def _restricted(
    kind: OpKind, ins: list[int], outs: list[int], kept: list[int], made: list[int]
) -> tuple[OpKind, list[int], list[int]]:
    place = {old: new for new, old in enumerate(kept)}
    part = dataclasses.replace(
        kind,
        inputs=tuple(kind.inputs[i] for i in kept),
        outputs=tuple(kind.outputs[i] for i in made),
        mutated=tuple(place[i] for i in kind.mutated if i in place),
    )
    return part, [ins[i] for i in kept], [outs[i] for i in made]


def _lifetimes(graph: OpGraph, at: Ints, op_inputs: Csr, op_outputs: Csr) -> tuple[Ints, Ints]:
    """When each storage comes and goes on a rank that runs ops `at` only.

    What another rank made is there from its first use (it was received), what another rank would free goes after its
    last use here (it was sent); what the rank does not use at all is never there.
    """
    count, storages = len(at), len(graph.storage_alloc)
    first, last = np.full(storages, count, dtype=np.int64), np.full(storages, -1, dtype=np.int64)
    for csr in (op_inputs, op_outputs):
        rows = np.repeat(np.arange(count), np.diff(csr.indptr))
        used = graph.tensor_storage[csr.indices]
        np.minimum.at(first, used, rows)
        np.maximum.at(last, used, rows)
    new_index = np.full(len(graph) + 1, -1, dtype=np.int64)
    new_index[at] = np.arange(count)
    own_alloc = np.where(graph.storage_alloc >= 0, new_index[graph.storage_alloc], -1)
    received = (graph.storage_alloc >= 0) & (own_alloc < 0)
    alloc = np.where(received, first, own_alloc)
    never = graph.storage_free >= len(graph)
    own_free = np.where((graph.storage_free >= 0) & ~never, new_index[graph.storage_free], -1)
    free = np.where(never, count, np.where(own_free >= 0, own_free, last))
    unused = last < 0
    gone = unused & (graph.storage_alloc >= 0)
    alloc, free = np.where(gone, -1, alloc), np.where(gone, -1, free)
    return alloc.astype(np.int32), free.astype(np.int32)


def _boundaries(graph: OpGraph, op_chunk: Ints, chunks: int) -> tuple[Boundary, ...]:
    """Storages that one chunk makes and a later one reads cross every boundary between them; gradients of parameters
    stay where they are, and weights do not travel.
    """
    forward, backward = np.zeros(chunks, dtype=np.int64), np.zeros(chunks, dtype=np.int64)
    parameter_specs = {p.spec for p in graph.parameters}
    made = graph.storage_alloc
    farthest = _farthest_reads(graph, op_chunk)
    for storage in np.flatnonzero((made >= 0) & (graph.storage_category != Category.GRADIENTS)).tolist():
        op = int(made[storage])
        home, phase = int(op_chunk[op]), int(graph.op_phase[op])
        if home < 0 or int(graph.storage_spec[storage]) in parameter_specs:
            continue
        size = int(graph.storage_bytes[storage])
        if phase == Phase.FORWARD:
            forward[home : farthest[0].get(storage, home)] += size
        elif phase == Phase.BACKWARD:
            backward[farthest[1].get(storage, home) : home] += size
    return tuple(Boundary(int(forward[c]), int(backward[c])) for c in range(chunks - 1))


def _farthest_reads(graph: OpGraph, op_chunk: Ints) -> tuple[dict[int, int], dict[int, int]]:
    """Storage -> the last chunk that reads it in forward, and the first one that does in backward."""
    rows = np.repeat(np.arange(len(graph)), np.diff(graph.op_inputs.indptr))
    storages = graph.tensor_storage[graph.op_inputs.indices]
    last: dict[int, int] = {}
    first: dict[int, int] = {}
    chunk, phase = op_chunk[rows].tolist(), graph.op_phase[rows].tolist()
    for storage, c, p in zip(storages.tolist(), chunk, phase, strict=True):
        if p == Phase.FORWARD:
            last[storage] = max(c, last.get(storage, c))
        elif p == Phase.BACKWARD:
            first[storage] = min(c, first.get(storage, c))
    return last, first
