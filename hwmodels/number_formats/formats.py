"""Number formats: how many bits an element takes, what it can hold, and how many bits more the scale of its block adds.

Sources: IEEE 754-2019; bfloat16 and tf32 as NVIDIA's A100 whitepaper; OCP 8-bit Floating Point Specification (OFP8)
1.0; OCP Microscaling Formats (MX) Specification 1.0, section 5 (element formats, block size 32, E8M0 scales); NVFP4 as
"Pretraining Large Language Models with NVFP4" (arXiv 2509.25149), section 2.
"""

import math
from dataclasses import dataclass
from typing import Literal

from hwmodels.units import InputError

Specials = Literal["ieee", "nan", "none"]


@dataclass(frozen=True, slots=True)
class NumberFormat:
    """One format: element bits (sign, exponent, mantissa), and for block formats the elements and bits of one scale.

    `bits` is what an element occupies (tf32: a 32-bit word of which 19 count). `specials`: the largest exponent holds
    infinity and NaN ("ieee"), only its largest mantissa is NaN ("nan", as e4m3 of OFP8), or every code is a number
    ("none"). Without exponent bits the format is an integer of two's complement, or (MXINT8) a fixed-point number with
    `mantissa_bits` after the point. A block format names the format of its elements and of its scales; with
    `tensor_scale_bits` there is one more scale for the whole tensor.
    """

    name: str
    bits: int
    exponent_bits: int
    mantissa_bits: int
    block: int = 0
    scale_bits: int = 0
    specials: Specials = "ieee"
    element: str = ""
    scale: str = ""
    tensor_scale_bits: int = 0

    @property
    def bytes_per_element(self) -> float:
        """Bytes that one element occupies, its share of the block's scale included."""
        return (self.bits + (self.scale_bits / self.block if self.block else 0.0)) / 8.0

    @property
    def scaled_by_unit(self) -> bool:
        """Whether a matrix unit has to apply the blocks' scales itself: those narrower than fp32 (MX, NVFP4)."""
        return 0 < self.scale_bits < 32

    @property
    def is_float(self) -> bool:
        """Whether elements have an exponent."""
        return self.exponent_bits > 0

    @property
    def bias(self) -> int:
        """What is subtracted from the stored exponent (fp4 1, e4m3 7, e5m2 15, fp32 127)."""
        return int(2 ** (self.exponent_bits - 1)) - 1 if self.is_float else 0

    @property
    def largest_exponent(self) -> int:
        """The exponent of the largest number, emax of the MX specification (fp4 2, e4m3 8, e5m2 15, int8 0)."""
        if not self.is_float:
            return 0
        return int(2**self.exponent_bits) - 1 - self.bias - (self.specials == "ieee")

    @property
    def largest(self) -> float:
        """The largest finite number (e4m3 448, e5m2 57344, fp6 e2m3 7.5 and e3m2 28, fp4 6, MXINT8 127/64)."""
        if not self.is_float:
            integer = self.bits - 1 if self._fixed_point else self.mantissa_bits
            return (2.0**integer - 1.0) / (2.0**self.mantissa_bits if self._fixed_point else 1.0)
        mantissa = 2.0 - 2.0**-self.mantissa_bits * (2 if self.specials == "nan" else 1)
        return math.ldexp(mantissa, self.largest_exponent)

    @property
    def smallest(self) -> float:
        """The smallest number greater than zero: subnormal where there is an exponent."""
        if not self.is_float:
            return 2.0**-self.mantissa_bits if self._fixed_point else 1.0
        return math.ldexp(1.0, 1 - self.bias - self.mantissa_bits)

    @property
    def _fixed_point(self) -> bool:
        return not self.is_float and self.mantissa_bits < self.bits - 1


def _floats() -> tuple[NumberFormat, ...]:
    return (
        NumberFormat("fp64", 64, 11, 52),
        NumberFormat("fp32", 32, 8, 23),
        NumberFormat("tf32", 32, 8, 10),
        NumberFormat("bf16", 16, 8, 7),
        NumberFormat("fp16", 16, 5, 10),
        NumberFormat("fp8", 8, 4, 3, specials="nan"),  # e4m3, the format of a chip's "FP8" rate
        NumberFormat("fp8_e4m3", 8, 4, 3, specials="nan"),
        NumberFormat("fp8_e5m2", 8, 5, 2),
        NumberFormat("fp6", 6, 3, 2, specials="none"),
        NumberFormat("fp6_e3m2", 6, 3, 2, specials="none"),
        NumberFormat("fp6_e2m3", 6, 2, 3, specials="none"),
        NumberFormat("fp4", 4, 2, 1, specials="none"),
        NumberFormat("fp4_e2m1", 4, 2, 1, specials="none"),
    )


def _integers() -> tuple[NumberFormat, ...]:
    return (
        NumberFormat("int64", 64, 0, 63, specials="none"),
        NumberFormat("int32", 32, 0, 31, specials="none"),
        NumberFormat("int8", 8, 0, 7, specials="none"),
        NumberFormat("int4", 4, 0, 3, specials="none"),
        NumberFormat("bool", 8, 0, 1, specials="none"),
    )


def _blocks(elements: dict[str, NumberFormat]) -> tuple[NumberFormat, ...]:
    def of(
        name: str, element: str, block: int, scale: str, scale_bits: int, tensor_scale_bits: int = 0
    ) -> NumberFormat:
        e = elements[element]
        return NumberFormat(
            name,
            e.bits,
            e.exponent_bits,
            e.mantissa_bits,
            block,
            scale_bits,
            e.specials,
            element,
            scale,
            tensor_scale_bits,
        )

    fixed = NumberFormat("mxint8", 8, 0, 6, 32, 8, "none", "mxint8", "e8m0")  # one bit before the point, six after
    return (
        of("mxfp8", "fp8_e4m3", 32, "e8m0", 8),
        of("mxfp8_e5m2", "fp8_e5m2", 32, "e8m0", 8),
        of("mxfp6", "fp6_e3m2", 32, "e8m0", 8),
        of("mxfp6_e2m3", "fp6_e2m3", 32, "e8m0", 8),
        of("mxfp4", "fp4_e2m1", 32, "e8m0", 8),
        fixed,
        of("nvfp4", "fp4_e2m1", 16, "fp8_e4m3", 8, 32),
        # DeepSeek-V3 (arXiv 2412.19437, section 3.3.2): one fp32 scale for 128 elements of a row of activations
        of("fp8_block128", "fp8_e4m3", 128, "fp32", 32),
    )


def _table() -> dict[str, NumberFormat]:
    plain = {f.name: f for f in (*_floats(), *_integers())}
    return plain | {f.name: f for f in _blocks(plain)}


FORMATS: dict[str, NumberFormat] = _table()

# The rate at which a unit multiplies a format is listed under this name when it has no entry of its own.
COMPUTES_AS = {
    "fp8_e4m3": "fp8",
    "fp8_e5m2": "fp8",
    "fp8_block128": "fp8",
    "mxfp8": "fp8",
    "mxfp8_e5m2": "fp8",
    "fp6_e3m2": "fp6",
    "fp6_e2m3": "fp6",
    "mxfp6": "fp6",
    "mxfp6_e2m3": "fp6",
    "fp4_e2m1": "fp4",
    "mxfp4": "fp4",
    "nvfp4": "fp4",
    "mxint8": "int8",
}


def number_format(name: str) -> NumberFormat:
    """The format called `name`. Raises InputError: no such format."""
    try:
        return FORMATS[name]
    except KeyError:
        raise InputError(f"number format {name!r} is not known; known are {', '.join(FORMATS)}") from None


def bytes_of(name: str) -> float:
    """Bytes per element of the format called `name`, scales included. Raises InputError: no such format."""
    return number_format(name).bytes_per_element


def tensor_bytes(name: str, shape: tuple[int, ...], scale_tile: tuple[int, int] = (1, 1)) -> int:
    """Bytes of a tensor of `shape` in a format, blocks along its last dimension: elements, scales and padding.

    A row is padded to whole blocks (of elements narrower than a byte, to whole bytes). `scale_tile` (rows, scales): the
    tile to whose multiples the scales of the matrix are padded; (128, 4) is cuBLAS's for its block-scaled formats
    (cuBLAS documentation, "1D Block Scaling Factors Layout"). Raises InputError: no such format.
    """
    f = number_format(name)
    row = shape[-1] if shape else 1
    rows = math.prod(shape[:-1])
    if not f.block:
        return rows * -(-row * f.bits // 8)
    blocks = -(-row // f.block)
    scale_rows, scales = (-(-n // tile) * tile for n, tile in ((rows, scale_tile[0]), (blocks, scale_tile[1])))
    return (
        rows * -(-blocks * f.block * f.bits // 8) + scale_rows * scales * f.scale_bits // 8 + f.tensor_scale_bits // 8
    )
