"""ZeRO 3's parameters come and go: units are gathered, copied out where the stack does that, and freed.

In torch's FSDP 2 (torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py):
- unshard gathers into one buffer; wait_for_unshard copies it out to the parameters on the compute stream.
- forward: the host runs ahead and issues the next gather without being asked to. Its stream first waits for the copy of
  the unit two before (all_gather_state); the buffer of a unit stays until the next one's copy.
- backward: the next gather is issued right after this unit's copy (_backward_prefetch, in reverse post-forward order)
  and waits for that; the buffer goes with its own copy.
Without copies (FSDP 1, torch/distributed/fsdp/_limiter_utils.py) parameters are views of the gathered buffer, and a
gather waits until the unit `gathers_in_flight` before it has been freed.
"""

from __future__ import annotations

from cosim.engine.program import MemoryProfile
from cosim.graph import Category, Phase
from cosim.mapping.rank import Rank, joined
from cosim.parallel.data_parallel import ROOT, DataParallelPlan, Unit
from cosim.stacks.stack import Stack


class Gathering:
    """Which units are here, and who waits for whom."""

    def __init__(self, plan: DataParallelPlan, stack: Stack, rank: Rank) -> None:
        self.plan, self.stack, self.rank = plan, stack, rank
        self.units: dict[int, Unit] = {unit.layer: unit for unit in plan.units}
        self.sharded = plan.zero == 3 and plan.degree > 1
        self.copies = self.sharded and stack.gather_copies > 0
        self.gathers: dict[int, int] = {}  # units that are here -> the gather
        self.copied: dict[int, int] = {}  # of these, those that were copied out -> the copy
        self.buffers: set[int] = set()  # of these, those whose buffer is still there
        self.done: list[int | None] = []  # of the n-th gather of a block: the task that lets a later gather begin
        self.place: dict[int, int] = {}  # block -> n

    def gather(self, layer: int, phase: Phase, micro_step: int) -> bool:
        """Bring a unit's parameters here, unless they are; answers whether it had to."""
        if not self.sharded or layer in self.gathers or not self.units[layer].elements:
            return False
        unit, waits = self.units[layer], self._waits(layer, phase)
        appears = None
        if phase == Phase.BACKWARD or not self.copies:
            appears = self._weights(layer, self.plan.formats.gather if self.copies else self.plan.formats.parameter)
            self.buffers |= {layer} if self.copies else set()
        size = unit.elements * self.plan.formats.gather
        of_experts = unit.expert_elements * self.plan.formats.gather
        self.gathers[layer] = self.rank.collective(
            "all_gather", size, layer, phase, micro_step, waits, appears, of_experts
        )
        return True

    def _waits(self, layer: int, phase: Phase) -> list[int | None]:
        waits: list[int | None] = []
        limit = self.stack.gathers_in_flight
        if limit and self.copies and phase == Phase.BACKWARD:
            limit = 1
        if layer != ROOT:
            if limit and len(self.done) >= limit:
                waits.append(self.done[-limit])
            self.place[layer] = len(self.done)
            self.done.append(None)
        if not self.plan.overlap_parameters:
            waits.append(self.rank.last_compute)
        return waits

    def _weights(self, layer: int, itemsize: float, sign: int = 1) -> MemoryProfile:
        """A unit's gathered elements come at the beginning of a task, or (-1) go at its end."""
        size = self.units[layer].elements * itemsize
        return self.rank.delta(Category.WEIGHTS, sign * size, 0.0 if sign > 0 else 1.0)

    def ready(self, layer: int, phase: Phase, micro_step: int, after: list[int | None]) -> list[int | None]:
        """What a unit's first segment waits for, `after` included: its parameters, copied out of the gathered buffer
        where that is done.
        """
        waits = [self.gathers.get(layer), self.gathers.get(ROOT), *after]
        if not self.copies or layer not in self.gathers or layer in self.copied:
            return waits
        formats, copies = self.plan.formats, self.stack.gather_copies
        appears: list[MemoryProfile | None] = [self._weights(layer, formats.parameter)]
        if phase == Phase.BACKWARD:
            appears.append(self._weights(layer, formats.gather, -1))
            self.buffers.discard(layer)
        else:  # the host allocates the buffer when it comes to the unit
            appears.append(self._weights(layer, formats.gather))
            self.buffers.add(layer)
        size = float(self.units[layer].elements * formats.gather * copies)
        copy = self.rank.memory_kernel(
            "copy gathered parameters",
            layer,
            phase,
            micro_step,
            read_bytes=size,
            write_bytes=size,
            kernels=copies,
            depends=waits,
            profile=joined(*appears),
        )
        self.copied[layer] = copy
        if layer in self.place:
            self.done[self.place[layer]] = copy
        return [copy]

    def buffer_goes(self, layer: int) -> MemoryProfile | None:
        """What the unit was gathered into goes with the task that is added next, where the copy left it there."""
        if layer not in self.buffers:
            return None
        self.buffers.discard(layer)
        return self._weights(layer, self.plan.formats.gather, -1)

    def freed(self, layer: int) -> MemoryProfile | None:
        """A gathered unit goes with the task that is added next."""
        if layer not in self.gathers:
            return None
        del self.gathers[layer]
        whole = None
        if not self.copies or self.copied.pop(layer, None) is not None:
            whole = self._weights(layer, self.plan.formats.parameter, -1)
        return joined(self.buffer_goes(layer), whole)

    def leave(self, layer: int) -> None:
        """The block's compute has been issued: where nothing was copied, a later gather may wait for its end."""
        if layer in self.place and not self.copies:
            self.done[self.place[layer]] = self.rank.last_compute
