"""Stacked DRAM: its capacity, its pin bandwidth, and what of that each way of walking through it sustains."""

from dataclasses import dataclass, field

from hwmodels.parameters import Section

KINDS = ("stream", "row", "gather", "transpose", "gemm")
# Fractions of pin bandwidth where nothing was measured: the middle of what the calibrated chips in the library sustain.
DEFAULT_SUSTAINED = {"stream": 0.88, "row": 0.88, "gather": 0.60, "transpose": 0.60, "gemm": 0.85}


@dataclass(frozen=True, slots=True)
class Hbm:
    """DRAM beside the chip. Question: how long do these bytes take, walked in this way?

    `bandwidth_bytes_per_s` is the datasheet's; `sustained` the fraction of it that a large kernel reaches, by access
    kind.
    """

    technology: str
    stacks: int
    capacity_bytes: float
    bandwidth_bytes_per_s: float
    sustained: dict[str, float] = field(default_factory=lambda: dict(DEFAULT_SUSTAINED))

    @classmethod
    def read(cls, section: Section, calibration: Section) -> "Hbm":
        """From `memory.hbm` of an accelerator file and its fitted `calibration.memory`."""
        technologies = ("hbm2", "hbm2e", "hbm3", "hbm3e", "gddr6", "gddr7", "lpddr5", "ddr4", "ddr5")
        part = cls(
            technology=section.text("technology", choices=technologies),
            stacks=section.integer("stacks", 1),
            capacity_bytes=section.quantity("capacity", "data"),
            bandwidth_bytes_per_s=section.quantity("bandwidth", "bandwidth"),
            sustained={kind: calibration.number(kind, DEFAULT_SUSTAINED[kind], high=1.0) for kind in KINDS},
        )
        section.close()
        calibration.close()
        return part

    def rate(self, kind: str) -> float:
        """Sustained bytes per second for an access kind."""
        return self.bandwidth_bytes_per_s * self.sustained[kind]
