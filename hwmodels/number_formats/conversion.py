"""Bit-exact reference conversion of arrays to number formats and back, in numpy.

Elements: a number is scaled by the power of two of its exponent, rounded to an integer (nearest-even, or up with the
probability of the part that is cut off), and checked against the format's largest. That is how IEEE 754 and OFP8
define it, so codes equal hardware's and ml_dtypes'.

Blocks: MX (OCP MX specification 1.0, section 6.3) shares 2^(floor(log2(max |v|)) - emax); what then exceeds the
element's largest is clamped to it. A block with NaN or infinity has the scale NaN, and all of its elements are NaN.
NVFP4 (arXiv 2509.25149, appendix C) scales a tensor by amax / (6 * 448) in fp32, and each block of 16 by its own
amax / 6 over that, in e4m3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hwmodels.number_formats.formats import NumberFormat, number_format
from hwmodels.units import InputError

Rounding = Literal["nearest-even", "stochastic"]
Floats = NDArray[np.float64]
_E8M0_NAN, _E8M0_BIAS = 255, 127


@dataclass(frozen=True)
class Quantized:
    """An array in a number format: `codes` have the array's shape (blocks along its last dimension).

    `scales` (..., blocks) are codes of the format's scale format, None where it has no blocks; `tensor_scale`
    multiplies everything.
    """

    format: str
    codes: NDArray[Any]
    scales: NDArray[Any] | None = None
    tensor_scale: float = 1.0


def quantize(
    array: ArrayLike,
    format: str,
    rounding: Rounding = "nearest-even",
    saturate: bool = True,
    scale: float = 1.0,
    seed: int = 0,
) -> Quantized:
    """`array` / `scale` in `format`; block formats find their own scales.

    What exceeds the largest number becomes the largest where `saturate`, else infinity or, in formats without one, NaN;
    formats in which every code is a number always saturate. `seed` is for stochastic rounding: a number between two
    neighbours goes to each with the probability of its nearness to it. Raises InputError: no such format or rounding,
    a NaN in an integer format.
    """
    f = number_format(format)
    if rounding not in ("nearest-even", "stochastic"):
        raise InputError(f"rounding: {rounding!r} is not one of nearest-even, stochastic")
    generator = np.random.default_rng(seed) if rounding == "stochastic" else None
    values = np.asarray(array)
    if not f.block:
        return Quantized(format, encode(_over(values, scale), f, generator, saturate), None, scale)
    blocked = _blocked(np.asarray(values, dtype=np.float32), f.block)
    if f.scale == "e8m0":
        scales, scaled = _mx_scaled(blocked, f)
        tensor_scale = 1.0
    elif f.tensor_scale_bits:
        scales, scaled, tensor_scale = _two_level_scaled(blocked, f)
    else:
        scales, scaled = _amax_scaled(blocked, f)
        tensor_scale = 1.0
    codes = encode(scaled, number_format(f.element), generator, saturate=True)
    return Quantized(format, _unblocked(codes, values.shape), scales, tensor_scale)


def dequantize(quantized: Quantized) -> Floats:
    """The numbers that the codes stand for, times their scales: exact products in float64, except NVFP4's, whose two
    scales are multiplied in fp32 as its kernels do.
    """
    f = number_format(quantized.format)
    if quantized.scales is None:
        return np.asarray(decode(quantized.codes, f) * quantized.tensor_scale)
    values = _blocked(decode(quantized.codes, number_format(f.element)), f.block)
    scales = decode_scales(quantized.scales, f) * np.float64(np.float32(quantized.tensor_scale))
    return _unblocked(values * scales[..., None], quantized.codes.shape)


def decode_scales(scales: NDArray[Any], format: NumberFormat) -> Floats:
    """What the codes of a block format's scales stand for."""
    if format.scale == "e8m0":
        found = np.ldexp(1.0, scales.astype(np.int64) - _E8M0_BIAS)
        return np.where(scales == _E8M0_NAN, np.nan, found)
    return decode(scales, number_format(format.scale))


# Elements


def code_type(format: NumberFormat) -> type[np.unsignedinteger[Any]]:
    """The unsigned integer in which numpy holds one code; narrower codes are in the low bits."""
    types: dict[int, type[np.unsignedinteger[Any]]] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
    return types[max(8, format.bits)]


def encode(
    values: ArrayLike, format: NumberFormat, generator: np.random.Generator | None = None, saturate: bool = True
) -> NDArray[Any]:
    """Codes of numbers (float64 holds them exactly); rounds to nearest-even without a `generator`."""
    numbers = np.asarray(values, dtype=np.float64)
    if format.name == "fp64":
        return numbers.view(np.uint64)
    if not format.is_float:
        return _encode_integer(numbers, format, generator)
    sign = np.signbit(numbers)
    with np.errstate(over="ignore"):
        magnitude = np.abs(numbers)
        finite = np.where(np.isfinite(magnitude), magnitude, 0.0)
        exponent = np.maximum(np.frexp(finite)[1] - 1, 1 - format.bias)
        exponent = np.where(finite == 0, 1 - format.bias, exponent)
        units = _rounded(np.ldexp(finite, format.mantissa_bits - exponent), generator)
    # A mantissa that rounds up to the next power of two carries into the exponent by itself: codes are contiguous.
    biased = (exponent + format.bias - 1).astype(np.int64) * 2**format.mantissa_bits
    code = np.where(units == 0, 0, biased + units.astype(np.int64))
    largest, infinity, nan = _special_codes(format)
    over = largest if saturate else infinity
    code = np.where((code > largest) | np.isinf(magnitude), over, code)
    # without a NaN: the negative zero, as ml_dtypes has it
    lost = np.isnan(numbers)
    code = np.where(lost, nan if format.specials != "none" else 0, code)
    sign = sign if format.specials != "none" else np.where(lost, ~sign, sign)
    width = format.exponent_bits + format.mantissa_bits
    shift = format.bits - 1 - width  # tf32 sits in the upper bits of a word
    return np.asarray(((sign.astype(np.int64) << width) | code) << shift).astype(code_type(format))


def decode(codes: NDArray[Any], format: NumberFormat) -> Floats:
    """The numbers that codes stand for."""
    if format.name == "fp64":
        return codes.view(np.float64)
    if not format.is_float:
        wide = codes.astype(np.int64)
        signed = np.where(wide >= 2 ** (format.bits - 1), wide - 2**format.bits, wide)
        return np.asarray(signed * format.smallest, dtype=np.float64)
    width = format.exponent_bits + format.mantissa_bits
    compact = codes.astype(np.int64) >> (format.bits - 1 - width)
    sign = np.where((compact >> width) & 1, -1.0, 1.0)
    exponent = (compact >> format.mantissa_bits) & (2**format.exponent_bits - 1)
    mantissa = compact & (2**format.mantissa_bits - 1)
    hidden = np.where(exponent == 0, 0, 2**format.mantissa_bits)
    power = np.maximum(exponent, 1) - format.bias - format.mantissa_bits
    found = np.ldexp((mantissa + hidden).astype(np.float64), power)
    largest, infinity, _ = _special_codes(format)
    magnitude = compact & (2**width - 1)
    found = np.where(magnitude > largest, np.nan, found)
    if format.specials == "ieee":
        found = np.where(magnitude == infinity, np.inf, found)
    return np.asarray(sign * found)


def _special_codes(format: NumberFormat) -> tuple[int, int, int]:
    """Codes without sign: of the largest number, of what lies beyond it, and of NaN."""
    last = int(2 ** (format.exponent_bits + format.mantissa_bits)) - 1
    if format.specials == "none":
        return last, last, last
    if format.specials == "nan":
        return last - 1, last, last
    infinity = last - (int(2**format.mantissa_bits) - 1)
    return infinity - 1, infinity, infinity + int(2 ** (format.mantissa_bits - 1))


def _encode_integer(numbers: Floats, format: NumberFormat, generator: np.random.Generator | None) -> NDArray[Any]:
    """Two's complement, saturated; MXINT8 leaves out its most negative code, so that it is symmetric."""
    if np.isnan(numbers).any():
        raise InputError(f"number format {format.name}: it has no code for NaN")
    units = _rounded(numbers / format.smallest, generator)
    highest = round(format.largest / format.smallest)
    lowest = -highest if format.block else -highest - 1
    codes = np.clip(units, lowest, highest).astype(np.int64)
    return np.asarray((codes & (2**format.bits - 1)).astype(code_type(format)))


def _rounded(units: Floats, generator: np.random.Generator | None) -> Floats:
    if generator is None:
        return np.rint(units)
    below = np.floor(units)
    return np.asarray(below + (generator.random(units.shape) < units - below))


# Blocks


def _over(values: NDArray[Any], scale: float) -> Floats:
    with np.errstate(invalid="ignore"):  # signalling NaN
        return np.asarray(values, dtype=np.float64) / scale


def _blocked(values: NDArray[Any], block: int) -> NDArray[Any]:
    """(..., n) as (..., blocks, block), the last block filled up with zeros."""
    values = np.atleast_1d(values)
    missing = -values.shape[-1] % block
    padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)])
    return padded.reshape(*values.shape[:-1], -1, block)


def _unblocked(values: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    rows = values.reshape(*values.shape[:-2], -1)
    return rows[..., : shape[-1] if shape else 1].reshape(shape)


def _mx_scaled(blocks: NDArray[np.float32], format: NumberFormat) -> tuple[NDArray[np.uint8], Floats]:
    """E8M0 codes of the shared scales, and the elements over them."""
    element = number_format(format.element)
    values = blocks.astype(np.float64)
    bad: NDArray[np.bool_] = np.asarray(~np.isfinite(values).all(axis=-1))
    amax = np.where(bad, 1.0, np.abs(values).max(axis=-1, initial=0.0, where=np.isfinite(values)))
    exponent = np.where(amax > 0, np.frexp(amax)[1] - 1 - element.largest_exponent, -_E8M0_BIAS)
    exponent = np.clip(exponent, -_E8M0_BIAS, _E8M0_BIAS)
    codes = np.where(bad, _E8M0_NAN, exponent + _E8M0_BIAS).astype(np.uint8)
    scaled = np.where(
        bad[..., np.newaxis], 0.0, np.ldexp(np.where(np.isfinite(values), values, 0.0), -exponent[..., np.newaxis])
    )
    return codes, scaled


def _two_level_scaled(blocks: NDArray[np.float32], format: NumberFormat) -> tuple[NDArray[Any], Floats, float]:
    """Codes of the blocks' scales, the elements over both scales, and the tensor's scale; arithmetic in fp32."""
    element, scale = number_format(format.element), number_format(format.scale)
    with np.errstate(invalid="ignore", over="ignore"):
        largest: NDArray[np.float32] = np.abs(blocks).max(axis=-1)
        tensor_scale = np.float32(largest.max(initial=np.float32(0))) / np.float32(element.largest * scale.largest)
        tensor_scale = tensor_scale if tensor_scale > 0 else np.float32(1)
        codes = encode(largest / np.float32(element.largest) / tensor_scale, scale)
        used = (decode(codes, scale).astype(np.float32) * tensor_scale)[..., np.newaxis]
        scaled = np.where(used > 0, blocks / np.where(used > 0, used, np.float32(1)), np.float32(0))
    return codes, scaled.astype(np.float64), float(tensor_scale)


def _amax_scaled(blocks: NDArray[np.float32], format: NumberFormat) -> tuple[NDArray[Any], Floats]:
    """fp32 scales amax / largest, and the elements over them."""
    amax = np.abs(blocks).max(axis=-1)
    scales = np.where(amax > 0, amax / np.float32(number_format(format.element).largest), np.float32(1))
    scales = scales.astype(np.float32)
    return scales.view(np.uint32), (blocks / scales[..., None]).astype(np.float64)
