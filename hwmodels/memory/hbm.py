"""Stacked DRAM: its capacity, its pin bandwidth, and what of that each way of walking through it sustains."""

from dataclasses import dataclass, field

from hwmodels.memory.technologies import TECHNOLOGIES
from hwmodels.parameters import Provenance, Section
from hwmodels.units import format_quantity

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
        technology = section.text("technology", choices=tuple(TECHNOLOGIES))
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
    """Pin bandwidth of `stacks` stacks, chips or channels of a technology at its usual pin rate."""
    unit = TECHNOLOGIES[technology]
    return stacks * unit.pins * unit.pin_bits_per_s / 8.0
