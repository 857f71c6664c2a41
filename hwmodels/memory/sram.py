"""The on-chip memory that all cores share (a GPU's L2 cache, an accelerator's scratchpad)."""

from dataclasses import dataclass

from hwmodels.parameters import Section


@dataclass(frozen=True, slots=True)
class Sram:
    """Shared on-chip memory. Questions: does this fit, and how long do its bytes take to reach the cores?

    `bandwidth_bytes_per_s` is the total; `core_bytes_per_cycle` what one core's port takes; `multicast` how many
    cores one read can serve (Hopper's thread-block clusters).
    """

    capacity_bytes: float
    bandwidth_bytes_per_s: float
    core_bytes_per_cycle: float = 64.0
    multicast: float = 1.0

    @classmethod
    def read(cls, section: Section, cache: bool) -> "Sram":
        """From `memory.sram` of an accelerator file; ports and multicast are those of a `cache` that cores read by
        themselves.
        """
        part = cls(
            capacity_bytes=section.quantity("size", "data"),
            bandwidth_bytes_per_s=section.quantity("bandwidth", "bandwidth"),
            core_bytes_per_cycle=section.number("core_bytes_per_cycle", 64.0) if cache else 64.0,
            multicast=section.number("multicast", 1.0, low=1.0, high=16.0) if cache else 1.0,
        )
        section.close()
        return part
