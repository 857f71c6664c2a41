"""Number formats: how many bits an element takes, and how many more its block's scale adds."""

from dataclasses import dataclass

from hwmodels.units import InputError


@dataclass(frozen=True, slots=True)
class NumberFormat:
    """One format: element bits (sign, exponent, mantissa), and for block formats the elements and bits of one scale."""

    name: str
    bits: int
    exponent_bits: int
    mantissa_bits: int
    block: int = 0
    scale_bits: int = 0

    @property
    def bytes_per_element(self) -> float:
        """Bytes that one element occupies, its share of the block's scale included."""
        return (self.bits + (self.scale_bits / self.block if self.block else 0.0)) / 8.0


# IEEE 754; bfloat16 and tf32 as NVIDIA's A100 whitepaper; OCP 8-bit and MX specifications v1.0; NVFP4 as NVIDIA's
# Blackwell notes.
FORMATS: dict[str, NumberFormat] = {
    f.name: f
    for f in (
        NumberFormat("fp64", 64, 11, 52),
        NumberFormat("fp32", 32, 8, 23),
        NumberFormat("tf32", 32, 8, 10),
        NumberFormat("bf16", 16, 8, 7),
        NumberFormat("fp16", 16, 5, 10),
        NumberFormat("fp8", 8, 4, 3),
        NumberFormat("fp8_e4m3", 8, 4, 3),
        NumberFormat("fp8_e5m2", 8, 5, 2),
        NumberFormat("fp6", 6, 3, 2),
        NumberFormat("fp4", 4, 2, 1),
        NumberFormat("int64", 64, 0, 63),
        NumberFormat("int32", 32, 0, 31),
        NumberFormat("int8", 8, 0, 7),
        NumberFormat("bool", 8, 0, 1),
        NumberFormat("mxfp8", 8, 4, 3, 32, 8),
        NumberFormat("mxfp6", 6, 3, 2, 32, 8),
        NumberFormat("mxfp4", 4, 2, 1, 32, 8),
        NumberFormat("nvfp4", 4, 2, 1, 16, 8),
    )
}

# The rate at which a unit multiplies a format is listed under this name when it has no entry of its own.
COMPUTES_AS = {"fp8_e4m3": "fp8", "fp8_e5m2": "fp8", "mxfp8": "fp8", "mxfp6": "fp6", "mxfp4": "fp4", "nvfp4": "fp4"}


def number_format(name: str) -> NumberFormat:
    """The format called `name`. Raises InputError: no such format."""
    try:
        return FORMATS[name]
    except KeyError:
        raise InputError(f"number format {name!r} is not known; known are {', '.join(FORMATS)}") from None


def bytes_of(name: str) -> float:
    """Bytes per element of the format called `name`, scales included. Raises InputError: no such format."""
    return number_format(name).bytes_per_element
