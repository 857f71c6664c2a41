"""A step's allocations in the format of torch.cuda.memory._dump_snapshot, which pytorch.org/memory_viz draws.

The format is the pickled dictionary that the docstring of torch.cuda.memory._snapshot describes (PyTorch 2.13), plain
dictionaries, lists, numbers and text throughout, in pickle protocol 4, which is the newest that the page reads. What is
in memory during the whole step (weights, optimizer states) is allocated at its beginning, one block per parameter;
activations and temporaries come and go with the ops that make and drop them; gathered parameters and gradients
with the tasks that do. The device's context and libraries (framework) are not allocations and are left out.

Addresses come from a first-fit allocator over one segment. They do not overlap and are always the same, but say nothing
about fragmentation: the caching allocator's pools are not modelled.
"""

from __future__ import annotations

import bisect
import pickle
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cosim.engine.program import PICOSECONDS_PER_S, Label
from cosim.graph import Category, Phase
from cosim.mapping.segments import Lifetimes
from cosim.output import whole_file
from cosim.report import words
from cosim.result import Detail, Result, TracedStep
from hwmodels.units import InputError

Frames = list[dict[str, Any]]
BASE_ADDRESS = 0x7F0000000000
_SEGMENT_BYTES = 2**21  # the caching allocator asks for memory in pieces of 2 MiB, c10/cuda/CUDACachingAllocator.cpp
_DEVICE = 0
_NAMES = {
    Category.WEIGHTS: "weights",
    Category.GRADIENTS: "gradients",
    Category.OPTIMIZER: "optimizer",
    Category.ACTIVATIONS: "activations",
    Category.TEMPORARY: "temporary",
    # memory_viz.js fails on files that have categories but no "unknown" (it misspells the list that it adds it to)
    Category.INPUTS: "unknown",
}


def write_memory_snapshot(result: Result, path: str | Path) -> None:
    """Writes the allocations of the rank that holds most over the played step to `path`, for pytorch.org/memory_viz.

    Raises InputError: the result has no detail, or `path` cannot be written; then nothing is left behind.
    """
    data = pickle.dumps(memory_snapshot(result), protocol=4)
    with whole_file(Path(path), "memory snapshot") as written:
        written.write_bytes(data)


def memory_snapshot(result: Result) -> dict[str, Any]:
    """The snapshot as torch.cuda.memory._snapshot() gives it: `segments` at the end, and `device_traces`.

    Times (`time_us`) are whole microseconds from the beginning of the step. Raises InputError for a result without
    the traced step.
    """
    detail = result.detail
    if detail is None or detail.traced is None:
        raise InputError("memory snapshot: this result has no traced step; simulate the run again")
    replay = _Replay()
    _resident(replay, detail.traced)
    for change in _changes(detail, detail.traced, result.worst_rank):
        replay.apply(change)
    return {
        "segments": [replay.segment()],
        "device_traces": [replay.entries],
        "allocator_settings": {},
        "simulated_by": "cosim; no step of this run was executed",
    }


class FirstFit:
    """Places blocks at the lowest address where they fit; a free neighbour is one with its neighbour."""

    def __init__(self) -> None:
        self._holes: list[tuple[int, int]] = []  # (address, end), in order
        self.top = BASE_ADDRESS  # nothing has been beyond it
        self._end = BASE_ADDRESS  # nothing is beyond it

    def allocate(self, size: int) -> int:
        """The address of `size` bytes."""
        for place, (low, high) in enumerate(self._holes):
            if high - low >= size:
                self._holes[place : place + 1] = [(low + size, high)] if high - low > size else []
                return low
        address, self._end = self._end, self._end + size
        self.top = max(self.top, self._end)
        return address

    def free(self, address: int, size: int) -> None:
        """Give back what `allocate` answered."""
        low, high = address, address + size
        place = bisect.bisect(self._holes, (low, high))
        if place < len(self._holes) and self._holes[place][0] == high:
            high = self._holes.pop(place)[1]
        if place and self._holes[place - 1][1] == low:
            place -= 1
            low = self._holes.pop(place)[0]
        if high == self._end:
            self._end = low
        else:
            self._holes.insert(place, (low, high))


@dataclass(frozen=True, slots=True)
class _Change:
    """An allocation (positive bytes) or a release of `key`; without a key, of any block that fits."""

    time_ps: int
    category: Category
    size_bytes: int
    key: tuple[int, int] | None  # micro-step and row of Lifetimes
    layer: int
    frames: Frames


@dataclass(slots=True)
class _Block:
    address: int
    size: int
    category: Category
    layer: int
    frames: Frames


@dataclass(slots=True)
class _Replay:
    """Allocations in order: what is alive, and the entries of the trace."""

    memory: FirstFit = field(default_factory=FirstFit)
    entries: list[dict[str, Any]] = field(default_factory=list)
    keyed: dict[tuple[int, int], _Block] = field(default_factory=dict)
    loose: dict[Category, list[_Block]] = field(default_factory=lambda: defaultdict(list))

    def apply(self, change: _Change) -> None:
        if change.size_bytes > 0:
            self.allocate(change)
        elif change.key is not None:
            self._drop(self.keyed.pop(change.key), change.time_ps)
        else:
            self._release(change)

    def allocate(self, change: _Change) -> None:
        size = change.size_bytes
        block = _Block(self.memory.allocate(size), size, change.category, change.layer, change.frames)
        if change.key is None:
            self.loose[change.category].append(block)
        else:
            self.keyed[change.key] = block
        self._enter("alloc", block, change.time_ps)

    def _release(self, change: _Change) -> None:
        """Free the oldest block of this layer and size, or of this size; else as many as it takes, the last in part."""
        blocks, left = self.loose[change.category], -change.size_bytes
        fits = [block for block in blocks if block.size == left]
        chosen = next((block for block in fits if block.layer == change.layer), fits[0] if fits else None)
        while left > 0:
            if chosen is None and not blocks:
                break  # the program gives back more than it took
            if chosen is None:
                chosen = min(blocks, key=lambda block: (block.layer != change.layer, block.size > left))
            blocks.remove(chosen)
            self._drop(chosen, change.time_ps)
            kept = chosen.size - left
            if kept > 0:
                rest = _Change(change.time_ps, change.category, kept, None, chosen.layer, chosen.frames)
                self.allocate(rest)
            left -= chosen.size
            chosen = None

    def _drop(self, block: _Block, time_ps: int) -> None:
        self._enter("free_requested", block, time_ps)
        self._enter("free_completed", block, time_ps)
        self.memory.free(block.address, block.size)

    def _enter(self, action: str, block: _Block, time_ps: int) -> None:
        entry = {
            "action": action,
            "addr": block.address,
            "size": block.size,
            "stream": 0,
            "time_us": time_ps * 1_000_000 // PICOSECONDS_PER_S,
            "frames": block.frames,
            "category": _NAMES[block.category],
        }
        self.entries.append(entry)

    def segment(self) -> dict[str, Any]:
        """The one segment with its blocks at the end of the step."""
        alive = [*self.keyed.values(), *(block for blocks in self.loose.values() for block in blocks)]
        blocks: list[dict[str, Any]] = []
        cursor = BASE_ADDRESS
        used = sum(block.size for block in alive)
        total = max(1, -(-(self.memory.top - BASE_ADDRESS) // _SEGMENT_BYTES)) * _SEGMENT_BYTES
        for block in sorted(alive, key=lambda block: block.address):
            if block.address > cursor:
                blocks.append(_block(cursor, block.address - cursor, "inactive", []))
            blocks.append(_block(block.address, block.size, "active_allocated", block.frames))
            cursor = block.address + block.size
        if cursor < BASE_ADDRESS + total:
            blocks.append(_block(cursor, BASE_ADDRESS + total - cursor, "inactive", []))
        return {
            "device": _DEVICE,
            "address": BASE_ADDRESS,
            "total_size": total,
            "allocated_size": used,
            "active_size": used,
            "requested_size": used,
            "stream": 0,
            "segment_type": "large",
            "segment_pool_id": (0, 0),
            "is_expandable": False,
            "frames": [],
            "blocks": blocks,
        }


def _block(address: int, size: int, state: str, frames: Frames) -> dict[str, Any]:
    requested = size if state == "active_allocated" else 0
    return {"address": address, "size": size, "requested_size": requested, "state": state, "frames": frames}


def _frames(*named: tuple[str, str, int]) -> Frames:
    """Innermost first, as (op, module, its number): what a stack trace has as function, file and line."""
    return [
        {"name": words.plain_line(name), "filename": words.plain_line(where), "line": number}
        for name, where, number in named
    ]


def _resident(replay: _Replay, traced: TracedStep) -> None:
    """What is there from the beginning: weights and optimizer states by parameter, and the batch."""
    sizes = {p.storage: int(traced.graph.spec_bytes[p.spec]) for p in traced.graph.parameters}
    names = {p.storage: p.name for p in traced.graph.parameters}
    for category, held in traced.resident_bytes.items():
        if category == Category.FRAMEWORK or held <= 0:
            continue
        if category not in (Category.WEIGHTS, Category.OPTIMIZER, Category.GRADIENTS) or not sizes:
            sized = {"batch" if category == Category.INPUTS else _NAMES[category]: round(held)}
        else:  # each parameter's share of what this rank holds, in whole bytes that add up
            ends = np.rint(np.cumsum(list(sizes.values())) / sum(sizes.values()) * held).astype(np.int64)
            sized = dict(zip(names.values(), np.diff(ends, prepend=0).tolist(), strict=True))
        for name, size in sized.items():
            if size:
                frames = _frames((name, _NAMES[category], 0))
                replay.allocate(_Change(0, category, size, None, -1, frames))


def _changes(detail: Detail, traced: TracedStep, device: int) -> list[_Change]:
    """All changes on a device in the order in which `cosim.memory` counts them: by time, at one time by task."""
    program, timeline = detail.program, detail.timeline
    steps = _OpChanges(traced)
    changes: list[_Change] = []
    for task in np.flatnonzero(program.profile >= 0).tolist():
        if program.streams[int(program.stream[task])].device != device:
            continue
        start, end = int(timeline.start_ps[task]), int(timeline.end_ps[task])
        profile, label = program.profiles[int(program.profile[task])], program.labels[int(program.label[task])]
        rows = zip(profile.fraction.tolist(), profile.category.tolist(), profile.delta_bytes.tolist(), strict=True)
        micro_step = int(program.micro_step[task])
        for fraction, category, size, key, frames in steps.split(list(rows), label, micro_step):
            time = start + int(np.floor(fraction * (end - start)))
            changes.append(_Change(time, Category(category), size, key, label.layer, frames))
    return sorted(changes, key=lambda change: change.time_ps)


_Row = tuple[float, int, int]


class _OpChanges:
    """A task's changes of memory as those of single storages, with what is left for the task itself."""

    def __init__(self, traced: TracedStep) -> None:
        self.graph = traced.graph
        self.op_ps = np.rint(traced.prices.time_s * PICOSECONDS_PER_S).astype(np.int64)
        self.lifetimes = Lifetimes(traced.graph, traced.allocation_unit_bytes, traced.optimizer_shards)
        self.frames: dict[int, Frames] = {}
        self.task_frames: dict[Label, Frames] = {}
        self.known: dict[tuple[int, int], list[tuple[_Row, list[tuple[int, int]]]]] = {}

    def split(
        self, rows: list[_Row], label: Label, micro_step: int
    ) -> Iterator[tuple[float, int, int, tuple[int, int] | None, Frames]]:
        """(fraction, category, bytes, key, frames) of each storage where a row is the sum of some, else of the row."""
        sums = self.of_ops(*label.ops)
        following = 0
        for row in rows:
            if following < len(sums) and sums[following][0] == row:
                for storage, size in sums[following][1]:
                    yield row[0], row[1], size, (micro_step, storage), self.frames_of(storage)
                following += 1
            else:
                where = f"block {label.layer}" if label.layer >= 0 else label.phase
                frames = self.task_frames.setdefault(label, _frames((label.name, where, max(label.layer, 0))))
                yield *row, None, frames

    def of_ops(self, first: int, stop: int) -> list[tuple[_Row, list[tuple[int, int]]]]:
        """The profile of ops `first` to `stop`, as `cosim.engine.allocation.lifetime_profile` has it, each row with
        its storages and their bytes.
        """
        if (first, stop) not in self.known:
            kept = self.lifetimes
            ends = np.concatenate([[0], np.cumsum(self.op_ps[first:stop])])
            born = np.flatnonzero((kept.alloc >= first) & (kept.alloc < stop) & (kept.size > 0))
            gone = np.flatnonzero((kept.free >= first) & (kept.free < stop) & (kept.size > 0))
            # each op has two moments: it allocates as it begins and frees as it ends
            moment = np.concatenate([2 * (kept.alloc[born] - first), 2 * (kept.free[gone] - first) + 1])
            storage = np.concatenate([born, gone])
            size = np.concatenate([kept.size[born], -kept.size[gone]])
            groups: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
            for at, row, delta in zip(moment.tolist(), storage.tolist(), size.tolist(), strict=True):
                groups[at, int(kept.category[row])].append((row, delta))
            self.known[first, stop] = [
                ((int(ends[(at + 1) // 2]) / max(int(ends[-1]), 1), category, sum(delta for _, delta in held)), held)
                for (at, category), held in sorted(groups.items())
            ]
        return self.known[first, stop]

    def frames_of(self, storage: int) -> Frames:
        """The op that makes a storage, in its module, and the phase that it belongs to."""
        op = int(self.lifetimes.alloc[storage])
        if op not in self.frames:
            graph = self.graph
            phase = Phase(int(graph.op_phase[op])).name.lower()
            target = graph.kinds[graph.op_kind[op]].target
            module = graph.modules[graph.op_module[op]] or "model"
            self.frames[op] = _frames((target, module, op), (phase, "step", max(int(graph.op_layer[op]), 0)))
        return self.frames[op]
