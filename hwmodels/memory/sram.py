"""On-chip memory that all cores share: a GPU's L2 cache, a scratchpad, a last-level cache behind them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hwmodels.memory.hbm import KINDS, Hbm
from hwmodels.parameters import Section
from hwmodels.units import InputError, format_quantity
from hwmodels.work import Cost

_TILE_ROW_BYTES = 64.0  # a transposing kernel turns tiles of 32 elements of 16 bits
_ROUNDED = 1.01


@dataclass(frozen=True, slots=True)
class Sram:
    """Shared on-chip memory. Questions: does this fit, and how long do its bytes take to reach the cores?

    `bandwidth_bytes_per_s` is the total; `core_bytes_per_cycle` what one core's port takes; `multicast` how many
    cores one read can serve (Hopper's thread-block clusters); `banks` of `bank_bytes` each per cycle (0 banks: they
    are not known, and no access conflicts). `level` is what answers call it where it lies behind another.
    """

    capacity_bytes: float
    bandwidth_bytes_per_s: float
    core_bytes_per_cycle: float = 64.0
    multicast: float = 1.0
    banks: int = 0
    bank_bytes: float = 32.0
    level: str = ""

    @classmethod
    def read(cls, section: Section, cache: bool, clock_hz: float, behind: bool = False) -> "Sram":
        """From `memory.sram` of an accelerator file; ports and multicast are those of a `cache` that cores read by
        themselves; `behind`: it lies behind another level.

        Raises InputError: neither a bandwidth nor banks, or a bandwidth above that of the banks.
        """
        banks = section.integer("banks", 0, low=0)
        width = section.quantity("bank_width", "data", 32.0)
        of_banks = banks * width * clock_hz
        bandwidth = section.quantity("bandwidth", "bandwidth", of_banks if banks else None)
        if banks and bandwidth > of_banks * _ROUNDED:
            raise InputError(
                f"{section.at('bandwidth')}: {format_quantity(bandwidth, 'bandwidth')} is more than the "
                f"{format_quantity(of_banks, 'bandwidth')} of {banks} banks"
            )
        part = cls(
            capacity_bytes=section.quantity("size", "data"),
            bandwidth_bytes_per_s=bandwidth,
            core_bytes_per_cycle=section.number("core_bytes_per_cycle", 64.0) if cache and not behind else 64.0,
            multicast=section.number("multicast", 1.0, low=1.0, high=16.0) if cache and not behind else 1.0,
            banks=banks,
            bank_bytes=width,
            level=section.text("level", "llc", ("l2", "llc")) if behind else "",
        )
        section.close()
        return part

    def conflict_ways(self, stride_bytes: float) -> int:
        """Accesses that the busiest bank serves when every bank could serve one, in a walk with this stride.

        A stride of s bank widths visits banks / gcd(s, banks) of the banks.
        """
        step = max(1, round(stride_bytes / self.bank_bytes))
        return math.gcd(step, self.banks) if self.banks else 1

    def rate(self, kind: str) -> float:
        """Bytes per second for an access kind of a pass. A transpose reads columns of tiles, whose rows it pads by one
        bank where that helps.
        """
        if kind != "transpose":
            return self.bandwidth_bytes_per_s
        padded = _TILE_ROW_BYTES + self.bank_bytes
        return self.bandwidth_bytes_per_s / min(self.conflict_ways(_TILE_ROW_BYTES), self.conflict_ways(padded))

    def as_memory(self, behind: Hbm) -> Hbm:
        """This level as what a nearer one is filled from: at its bandwidth, whatever the walk."""
        return replace(
            behind,
            capacity_bytes=self.capacity_bytes,
            bandwidth_bytes_per_s=self.bandwidth_bytes_per_s,
            sustained=dict.fromkeys(KINDS, 1.0),
            in_flight_bytes=0.0,
        )


def through_levels(
    price: Callable[[Sram, Hbm], Cost], near: Sram, behind: Sequence[Sram], memory: Hbm, near_level: str
) -> Cost:
    """The cost of tiled work on a hierarchy: `price` answers for one cache before one memory.

    Each level is asked in turn as the memory of the caches before it, of which the largest holds what is kept. All
    levels work at once, so the slowest counts; each level's traffic is that of the question in which it was the memory.
    """
    if not behind:
        return price(near, memory)
    slowest: Cost | None = None
    moved: dict[str, float] = {}
    kept = near.capacity_bytes
    limit = ""
    for place, level in enumerate([*behind, None]):
        cost = price(replace(near, capacity_bytes=kept), memory if level is None else level.as_memory(memory))
        if place == 0:
            moved[near_level] = cost.bytes_per_level[near_level]
        moved["hbm" if level is None else level.level] = cost.bytes_per_level["hbm"]
        if slowest is None or cost.time_s > slowest.time_s:
            slowest = cost
            limit = level.level if level is not None and cost.limited_by == "memory" else cost.limited_by
        if level is not None:
            kept = max(kept, level.capacity_bytes)
    assert slowest is not None
    share = min(1.0, cost.memory_share * cost.time_s / slowest.time_s)  # of the memory itself, asked last
    return replace(slowest, bytes_per_level=moved, limited_by=limit, memory_share=share)
