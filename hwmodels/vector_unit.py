"""Vector lanes and special-function units: what element-wise arithmetic costs beside the bytes it moves."""

from dataclasses import dataclass

from hwmodels.number_formats import FORMATS
from hwmodels.parameters import Section
from hwmodels.units import InputError


@dataclass(frozen=True, slots=True)
class VectorUnit:
    """SIMD lanes of all cores together. Question: how long do these vector and special operations take?

    `lanes` fp32 lanes in total, each one fused multiply-add per cycle times the format's factor; `special_function_rate` special
    functions (exp, rsqrt, tanh) per lane and cycle.
    """

    lanes: int
    clock_hz: float
    formats: dict[str, float]
    special_function_rate: float

    @classmethod
    def read(cls, section: Section, clock_hz: float) -> "VectorUnit":
        """From `vector` of an accelerator file; `clock_hz` is the chip's, for a unit that names none of its own."""
        part = cls(
            lanes=section.integer("lanes"),
            clock_hz=section.quantity("clock", "frequency", clock_hz),
            formats=section.table("formats", tuple(FORMATS), required=True),
            special_function_rate=section.number("special_function_rate", 0.25, high=1.0),
        )
        section.close()
        if "fp32" not in part.formats:
            raise InputError(f"{section.at('formats')}: must list fp32, the format that vector work is counted in")
        return part

    def peak_flops(self, format: str) -> float:
        """FLOP/s of fused multiply-adds in `format` on the lanes (not the matrix unit); 0 for one that the lanes lack."""
        return 2.0 * self.lanes * self.clock_hz * self.formats.get(format, 0.0)

    def vector_time_s(self, operations: float) -> float:
        """Seconds for `operations` fp32 vector operations (pointwise kernels compute in fp32 whatever they store)."""
        return operations / (self.lanes * self.clock_hz * self.formats["fp32"])

    def special_time_s(self, operations: float) -> float:
        """Seconds for `operations` special functions."""
        return operations / (self.lanes * self.clock_hz * self.special_function_rate)
