"""Vector lanes: what element-wise arithmetic costs beside the bytes it moves."""

from dataclasses import dataclass, replace
from typing import Literal

from hwmodels.number_formats import FORMATS
from hwmodels.parameters import Section
from hwmodels.special_function import SpecialFunctionUnit
from hwmodels.units import InputError
from hwmodels.work import Pass


@dataclass(frozen=True, slots=True)
class VectorUnit:
    """SIMD lanes of all cores together. Question: how long do these vector and special operations take?

    `lanes` fp32 lanes in total, each one fused multiply-add per cycle times the format's factor;
    `special` the special-function units beside them; `issue_slots` instructions of
    single threads that all cores start per cycle, which limits pointwise kernels (a core may issue more than its fp32
    lanes take).
    """

    lanes: int
    clock_hz: float
    formats: dict[str, float]
    special: SpecialFunctionUnit
    issue_slots: int

    @classmethod
    def read(cls, section: Section, clock_hz: float, special: SpecialFunctionUnit | None = None) -> "VectorUnit":
        """From `vector` of an accelerator file; `clock_hz` is the chip's, for a unit that names none of its own.

        Special functions are computed by the chip's units `special`, or where it names none, by some of the lanes'
        own: `special_function_rate` per lane and cycle. Raises InputError: both are given, or fp32 is missing.
        """
        lanes = section.integer("lanes")
        own_clock = section.quantity("clock", "frequency", clock_hz)
        if special is None:
            special = SpecialFunctionUnit(lanes * section.number("special_function_rate", 0.25, high=1.0), own_clock)
        elif section.has("special_function_rate"):
            raise InputError(f"{section.at('special_function_rate')}: the file has special_function.per_cycle too")
        part = cls(
            lanes=lanes,
            clock_hz=own_clock,
            formats=section.table("formats", tuple(FORMATS), required=True),
            special=special,
            issue_slots=section.integer("issue_slots", lanes),
        )
        section.close()
        if "fp32" not in part.formats:
            raise InputError(f"{section.at('formats')}: must list fp32, the format that vector work is counted in")
        return part

    def peak_flops(self, format: str) -> float:
        """FLOP/s of fused multiply-adds in `format` on the lanes (not the matrix unit); 0 for one that the lanes
        lack.
        """
        return 2.0 * self.lanes * self.clock_hz * self.formats.get(format, 0.0)

    def vector_time_s(self, instructions: float) -> float:
        """Seconds in which all cores start `instructions` of single threads (pointwise kernels compute in fp32)."""
        return instructions / (self.issue_slots * self.clock_hz)

    def at_clock(self, ratio: float) -> "VectorUnit":
        """The same lanes, and the special-function units beside them, with their clock times `ratio`."""
        return replace(self, clock_hz=self.clock_hz * ratio, special=self.special.at_clock(ratio))


@dataclass(frozen=True, slots=True)
class PassConstants:
    """What a pass over memory takes beside its formula: fixed time on the device, instructions to load, convert,
    index and store a byte (in row kernels also to sweep the row again and reduce across threads), instructions of a
    special function (exp, erf, tanh, division at library accuracy). `row_cache`: share of the cache that rows in flight
    may fill before their later sweeps miss it (caches in partitions keep a copy of each line in all of them).
    """

    fixed_time_s: float = 1e-6
    instructions_per_byte: float = 6.5
    row_instructions_per_byte: float = 16.0
    instructions_per_special: float = 22.0
    row_cache: float = 0.2

    @classmethod
    def read(cls, section: Section, default: "PassConstants") -> "PassConstants":
        """From `calibration.pass` of an accelerator file; what it leaves out takes the family's `default`."""
        part = cls(
            fixed_time_s=section.quantity("fixed_time", "time", default.fixed_time_s, zero=True),
            instructions_per_byte=section.number("instructions_per_byte", default.instructions_per_byte, zero=True),
            row_instructions_per_byte=section.number(
                "row_instructions_per_byte", default.row_instructions_per_byte, zero=True
            ),
            instructions_per_special=section.number(
                "instructions_per_special", default.instructions_per_special, zero=True
            ),
            row_cache=section.number("row_cache", default.row_cache, high=1.0),
        )
        section.close()
        return part

    def time_s(self, work: Pass, vector: VectorUnit) -> float:
        """Seconds of issue and special-function units for `work`, without its memory time."""
        row = work.kind == "row" and not (work.row_bytes and work.sweeps == 1.0)
        per_byte = self.row_instructions_per_byte if row else self.instructions_per_byte
        per_special = (
            1.0 if row else self.instructions_per_special
        )  # a row kernel's exp is a few instructions per sweep
        instructions = per_byte * (work.read_bytes + work.write_bytes)
        instructions += work.vector_ops + per_special * work.special_ops
        return max(vector.vector_time_s(instructions), vector.special.time_s(work.special_ops))

    def again_bytes(self, work: Pass, cores: int, cache_bytes: float) -> float:
        """Bytes that the later sweeps of a row kernel read from memory again: none while the rows in flight (two to a
        core) fit in their share of the cache, all of them at twice that.
        """
        in_flight = min(_ROWS_PER_CORE * cores * work.row_bytes, work.read_bytes)
        missed = min(1.0, max(0.0, in_flight / (self.row_cache * cache_bytes) - 1.0))
        return (work.sweeps - 1.0) * work.read_bytes * missed


# Thread blocks of a row kernel on a core: PyTorch gives a long row 1024 threads, and a core has room for 2048.
_ROWS_PER_CORE = 2
# A GPU's threads load, index and store with their own instructions. A chip whose vector unit runs one wide instruction
# word for all lanes moves data and computes addresses in other slots of that word: what is left is one conversion per
# 16-bit element, and special functions are single instructions. Assumed; not calibrated.
SIMT_PASSES = PassConstants()
WIDE_VECTOR_PASSES = PassConstants(
    instructions_per_byte=0.5, row_instructions_per_byte=1.0, instructions_per_special=1.0
)


@dataclass(frozen=True, slots=True)
class ElementWork:
    """What one element of a well-known pass takes when each tensor is touched once: tensors read (one is written),
    vector and special operations. `sweeps` times each row is read, unless it has at most `registers` elements, which
    stay in registers (aten/src/ATen/native/cuda/SoftMax.cu: the persistent softmax; layer_norm_kernel.cu has none).
    """

    reads: float
    vector_ops: float
    special_ops: float
    kind: Literal["stream", "row", "gather", "transpose"]
    sweeps: float = 1.0
    registers: int = 0


# Operations per output element as the formulas have them; a trailing u: the other operand is one number. A quotient is
# a reciprocal and a product, a power is log2, product and exp2; rope turns pairs of elements by one angle, whose sine
# and cosine are read from a small table.
ELEMENT_WORK: dict[str, ElementWork] = {
    "add": ElementWork(2, 1, 0, "stream"),
    "mul": ElementWork(2, 1, 0, "stream"),
    "div": ElementWork(2, 1, 1, "stream"),
    "pow": ElementWork(2, 1, 2, "stream"),
    "addu": ElementWork(1, 1, 0, "stream"),
    "mulu": ElementWork(1, 1, 0, "stream"),
    "divu": ElementWork(1, 1, 0, "stream"),  # by one number: a product with its reciprocal
    "powu": ElementWork(1, 1, 0, "stream"),  # a small whole power: products
    "relu": ElementWork(1, 1, 0, "stream"),
    "gelu": ElementWork(1, 6, 1, "stream"),
    "tanh": ElementWork(1, 0, 1, "stream"),
    "silu_mul": ElementWork(2, 2, 2, "stream"),
    "rope": ElementWork(1, 3, 0, "stream"),
    "softmax": ElementWork(1, 4, 1, "row", 3, 1024),
    "layernorm": ElementWork(1, 8, 0, "row", 2),
    "rmsnorm": ElementWork(1, 5, 0, "row", 2),
    "embedding": ElementWork(1, 0, 0, "gather"),
}
