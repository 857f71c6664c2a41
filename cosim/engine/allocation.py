"""Allocations as tasks state them: rounded as the allocator does, placed by the ops that make and end them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cosim.engine.program import MemoryProfile

GRANULARITY_BYTES = 512  # kMinBlockSize, pytorch/c10/cuda/CUDACachingAllocator.cpp


def round_allocation(size_bytes: ArrayLike, granularity: int = GRANULARITY_BYTES) -> NDArray[np.int64]:
    """What PyTorch's caching allocator takes for allocations of `size_bytes`: whole blocks, and nothing for 0.

    pytorch/c10/cuda/CUDACachingAllocator.cpp, `round_size` and `allocate`, with `roundup_power2_divisions` off. A block
    that is reused without being split (by up to 1 MiB larger) is not modelled.
    """
    size = np.asarray(size_bytes, dtype=np.int64)
    return -(-size // granularity) * granularity


def lifetime_profile(
    op_time_ps: ArrayLike, alloc_op: ArrayLike, free_op: ArrayLike, size_bytes: ArrayLike, category: ArrayLike
) -> MemoryProfile:
    """What a task of n ops (n,) allocates and frees, from the lifetimes of m storages (m,): ops, bytes, categories.

    A storage is allocated as op `alloc_op` begins and freed as op `free_op` ends; an index outside 0..n-1 is an event
    that lies outside the task. Frees come before the next op's allocations, allocations before the frees of their own
    op. Events of one moment and category are added up. Raises ValueError for a storage freed before it is allocated.
    """
    time, alloc, free = (np.asarray(column, dtype=np.int64) for column in (op_time_ps, alloc_op, free_op))
    size, kind = np.asarray(size_bytes, dtype=np.int64), np.asarray(category, dtype=np.int64)
    ops = len(time)
    born, gone = (alloc >= 0) & (alloc < ops), (free >= 0) & (free < ops)
    backward = np.flatnonzero(born & gone & (free < alloc))
    if len(backward):
        raise ValueError(f"storage {backward[0]} is freed by op {free[backward[0]]}, before op {alloc[backward[0]]}")
    # Each op has two moments, 2 op and 2 op + 1: in their order events happen, also where no time passes between them.
    moment = np.concatenate([2 * alloc[born], 2 * free[gone] + 1])
    delta = np.concatenate([size[born], -size[gone]])
    moment, kind, delta = _added_up(moment, np.concatenate([kind[born], kind[gone]]), delta)
    ends = np.concatenate([[0], np.cumsum(time)])
    fraction = ends[(moment + 1) // 2] / max(int(ends[-1]), 1)
    return MemoryProfile(fraction, kind.astype(np.int8), delta)


def _added_up(
    moment: NDArray[np.int64], kind: NDArray[np.int64], delta: NDArray[np.int64]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """One event for each moment and kind, in order; those that come to nothing are left out."""
    order = np.lexsort((kind, moment))
    moment, kind, delta = moment[order], kind[order], delta[order]
    first = np.flatnonzero(np.diff(moment, prepend=-1) | np.diff(kind, prepend=-1))
    total = np.add.reduceat(delta, first) if len(first) else delta
    kept = first[total != 0]
    return moment[kept], kind[kept], total[total != 0]
