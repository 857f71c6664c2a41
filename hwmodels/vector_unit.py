"""Vector lanes and special-function units: what element-wise arithmetic costs beside the bytes it moves."""

from dataclasses import dataclass
from typing import Literal

from hwmodels.number_formats import FORMATS
from hwmodels.parameters import Section
from hwmodels.units import InputError


@dataclass(frozen=True, slots=True)
class VectorUnit:
    """SIMD lanes of all cores together. Question: how long do these vector and special operations take?

    `lanes` fp32 lanes in total, each one fused multiply-add per cycle times the format's factor; `special_function_rate` special
    functions (exp, rsqrt, tanh) per lane and cycle; `issue_slots` instructions of single threads that all cores start per
    cycle, which limits pointwise kernels (a core may issue more than its fp32 lanes take).
    """

    lanes: int
    clock_hz: float
    formats: dict[str, float]
    special_function_rate: float
    issue_slots: int

    @classmethod
    def read(cls, section: Section, clock_hz: float) -> "VectorUnit":
        """From `vector` of an accelerator file; `clock_hz` is the chip's, for a unit that names none of its own."""
        lanes = section.integer("lanes")
        part = cls(
            lanes=lanes,
            clock_hz=section.quantity("clock", "frequency", clock_hz),
            formats=section.table("formats", tuple(FORMATS), required=True),
            special_function_rate=section.number("special_function_rate", 0.25, high=1.0),
            issue_slots=section.integer("issue_slots", lanes),
        )
        section.close()
        if "fp32" not in part.formats:
            raise InputError(f"{section.at('formats')}: must list fp32, the format that vector work is counted in")
        return part

    def peak_flops(self, format: str) -> float:
        """FLOP/s of fused multiply-adds in `format` on the lanes (not the matrix unit); 0 for one that the lanes lack."""
        return 2.0 * self.lanes * self.clock_hz * self.formats.get(format, 0.0)

    def vector_time_s(self, operations: float) -> float:
        """Seconds for `operations` vector instructions (pointwise kernels compute in fp32 whatever they store)."""
        return operations / (self.issue_slots * self.clock_hz * self.formats["fp32"])

    def special_time_s(self, operations: float) -> float:
        """Seconds for `operations` special functions."""
        return operations / (self.lanes * self.clock_hz * self.special_function_rate)


@dataclass(frozen=True, slots=True)
class ElementWork:
    """What one element of a well-known pass takes when each tensor is touched once: tensors read (one is written), instructions."""

    reads: float
    vector_ops: float
    special_ops: float
    kind: Literal["stream", "row", "gather", "transpose"]


# Instructions per output element. add, mul, relu, tanh: what the expression needs. gelu, softmax, layernorm: what kernels that are
# limited by issue imply (instructions = issue slots x clock x time / elements): gelu 48 (LLMCompass, A100), 57 (vidur, A100), 54
# (vidur, H100); softmax 70 to 90 (LLMCompass, fp16); layernorm 50 to 98 (LLMCompass), 80 (vidur, A100), 66 (vidur, H100).
ELEMENT_WORK: dict[str, ElementWork] = {
    "add": ElementWork(2, 3, 0, "stream"),
    "mul": ElementWork(2, 3, 0, "stream"),
    "relu": ElementWork(1, 3, 0, "stream"),
    "tanh": ElementWork(1, 12, 1, "stream"),
    "gelu": ElementWork(1, 52, 1, "stream"),
    "silu_mul": ElementWork(2, 12, 2, "stream"),
    "softmax": ElementWork(1, 80, 1, "row"),
    "layernorm": ElementWork(1, 72, 0, "row"),
    "rmsnorm": ElementWork(1, 60, 0, "row"),
    "embedding": ElementWork(1, 3, 0, "gather"),
}
