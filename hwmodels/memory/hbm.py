"""Stacked DRAM: its capacity, its pin bandwidth, and what of that each way of walking through it sustains."""

from dataclasses import dataclass, field

from hwmodels.parameters import Provenance, Section
from hwmodels.units import format_quantity

# Gb/s per pin and pins of one stack (HBM), one chip (GDDR), one channel (LPDDR, DDR), where a file gives no bandwidth.
# HBM2: JESD235B (2.4 Gb/s, 1024 pins, 307 GB/s). HBM2e: JESD235C, 2020 (3.2). HBM3: JESD238 (6.4, 819 GB/s). HBM3e:
# vendors ship 9.2 to 9.8 on the same interface, hosts run it at about 8 (B200: 8 TB/s from eight stacks). GDDR6:
# JESD250C (16, 32 pins). GDDR7: JESD239 (32, 32 pins). LPDDR5: JESD209-5 (6.4, 16 pins). DDR4: JESD79-4 (3.2, 64 pins).
# DDR5: JESD79-5 (4.8, 64 pins). HBM2 and HBM3 as JEDEC's announcements say it; the others were not checked.
_INTERFACES = {
    "hbm2": (2.4, 1024),
    "hbm2e": (3.2, 1024),
    "hbm3": (6.4, 1024),
    "hbm3e": (8.0, 1024),
    "gddr6": (16.0, 32),
    "gddr7": (32.0, 32),
    "lpddr5": (6.4, 16),
    "ddr4": (3.2, 64),
    "ddr5": (4.8, 64),
}
KINDS = ("stream", "row", "gather", "transpose", "gemm")
# Fractions of pin bandwidth where nothing was measured: the middle of what the calibrated chips in the library sustain.
DEFAULT_SUSTAINED = {"stream": 0.88, "row": 0.88, "gather": 0.60, "transpose": 0.60, "gemm": 0.85}


@dataclass(frozen=True, slots=True)
class Hbm:
    """DRAM beside the chip. Question: how long do these bytes take, walked in this way?

    `bandwidth_bytes_per_s` is the datasheet's, or that of `stacks` interfaces of the technology; `sustained` the
    fraction of it that a large kernel reaches, by access kind.
    """

    technology: str
    stacks: int
    capacity_bytes: float
    bandwidth_bytes_per_s: float
    sustained: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_SUSTAINED))

    @classmethod
    def read(cls, section: Section, calibration: Section) -> "Hbm":
        """From `memory.hbm` of an accelerator file and its fitted `calibration.memory`."""
        technology = section.text("technology", choices=tuple(_INTERFACES))
        stacks = section.integer("stacks", 1)
        interface = interface_bytes_per_s(technology, stacks)
        if not section.has("bandwidth"):
            text = format_quantity(interface, "bandwidth")
            section.log.append(Provenance("memory.hbm.bandwidth", text, "derived", f"{stacks} x {technology}"))
        part = cls(
            technology=technology,
            stacks=stacks,
            capacity_bytes=section.quantity("capacity", "data"),
            bandwidth_bytes_per_s=section.quantity("bandwidth", "bandwidth", interface),
            sustained={kind: calibration.number(kind, DEFAULT_SUSTAINED[kind], high=1.0) for kind in KINDS},
        )
        section.close()
        calibration.close()
        return part

    def rate(self, kind: str) -> float:
        """Sustained bytes per second for an access kind."""
        return self.bandwidth_bytes_per_s * self.sustained[kind]


def interface_bytes_per_s(technology: str, stacks: int) -> float:
    """Pin bandwidth of `stacks` stacks, chips or channels of a technology (see the table above)."""
    pin_rate, pins = _INTERFACES[technology]
    return stacks * pins * pin_rate * 1e9 / 8.0
