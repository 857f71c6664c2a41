"""What a device holds: a rank's memory over the step, what is always in it, and all that must fit beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cosim.graph import Category
from cosim.mapping.replicas import first_replica
from cosim.memory import memory_over_time
from cosim.played import Played, RankPart
from cosim.result import MemoryCurve

_SEGMENT_BYTES = 2 * 2**20


def memory(played: Played) -> tuple[int, MemoryCurve, dict[str, float]]:
    """The pipeline rank that holds most, its memory over time, and its peak by category."""
    program, timeline = first_replica(played.program, played.timeline, played.replicas)
    found = [
        (rank, *memory_over_time(program, timeline, rank, resident(played, part)))
        for rank, part in enumerate(played.stages)
    ]
    return max(found, key=lambda one: sum(one[2].values()))


def resident(played: Played, rank: RankPart) -> dict[Category, float]:
    """What is in a rank's memory during the whole step."""
    graph, stack, plan = rank.graph, played.stack, rank.plan
    resident: dict[Category, float] = dict(plan.resident_bytes())
    inputs = (graph.storage_category == Category.INPUTS) & (graph.storage_alloc < 0)
    resident[Category.INPUTS] = float(graph.storage_bytes[inputs].sum())
    if plan.zero == 0 and plan.degree > 1:  # DDP's buckets, which stay from step to step
        resident[Category.GRADIENTS] = float((plan.trainable + plan.unused) * plan.formats.reduce)
    resident[Category.FRAMEWORK] = stack.blas_workspace_bytes.on(played.accelerator.architecture)
    return resident


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """All that is on the device at the peak (bytes), beside what its driver offers.

    `reserved` is the allocator's: the same in whole segments of 2 MiB (kLargeBuffer's granularity,
    pytorch/c10/cuda/CUDACachingAllocator.cpp), which is the least; fragmentation is not modelled.
    """

    allocated: float
    context: float
    communicators: float
    offered: float

    @property
    def reserved(self) -> float:
        return math.ceil(self.allocated / _SEGMENT_BYTES) * _SEGMENT_BYTES

    @property
    def total(self) -> float:
        return self.reserved + self.context + self.communicators

    def bytes(self) -> dict[str, float]:
        """By name, as a result has them."""
        return {
            "allocated": self.allocated,
            "reserved": self.reserved,
            "context": self.context,
            "communicators": self.communicators,
            "total": self.total,
            "offered": self.offered,
        }


def device_memory(played: Played) -> DeviceMemory:
    """What one device holds at the peak of the step."""
    return device_memory_at(played, float(sum(memory(played)[2].values())))


def device_memory_at(played: Played, allocated: float) -> DeviceMemory:
    stack, architecture = played.stack, played.accelerator.architecture
    communicators = sum(group.size > 1 for group in played.groups.distinct)
    capacity = float(played.accelerator.memory.hbm.capacity_bytes)
    return DeviceMemory(
        allocated=allocated,
        context=float(stack.context_bytes.on(architecture)),
        communicators=float(communicators * stack.communicator_bytes),
        offered=max(0.0, capacity - stack.driver_bytes.on(architecture)),
    )
