"""Conversion against ml_dtypes for every code and many floats, and against the specifications by brute force."""

import math
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest

from hwmodels.number_formats.conversion import decode, decode_scales, dequantize, encode, quantize
from hwmodels.number_formats.formats import number_format
from hwmodels.units import InputError

TWINS = {
    "fp32": np.float32,
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
}
NARROW = [name for name in TWINS if number_format(name).bits <= 16]
MX = ("mxfp8", "mxfp8_e5m2", "mxfp6", "mxfp6_e2m3", "mxfp4", "mxint8")


def edge_floats() -> np.ndarray:
    """Random floats of every magnitude, and for every narrow format its numbers, their middles and next neighbours."""
    rng = np.random.default_rng(7)
    random = rng.integers(0, 2**32, 20_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    near = rng.normal(0, 100, 20_000).astype(np.float32)
    codes = [decode(np.arange(2 ** number_format(n).bits, dtype=np.uint32), number_format(n)) for n in NARROW[2:]]
    numbers = np.unique(np.concatenate([c[np.isfinite(c)] for c in codes])).astype(np.float32)
    middles = (numbers[1:] + numbers[:-1]) / np.float32(2)
    exact = np.concatenate([numbers, middles])
    beside = [np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(-np.inf))]
    special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 448, 464, 465, 480, 65504, 65520, 1e-45], np.float32)
    return np.concatenate([random, near, exact, *beside, special])


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    """Equal bit by bit as numbers: NaN equals NaN, 0 and -0 differ."""
    with np.errstate(invalid="ignore"):  # signalling NaN
        found, expected = found.astype(np.float64), expected.astype(np.float64)
    equal = (found == expected) & (np.signbit(found) == np.signbit(expected))
    return bool((equal | (np.isnan(found) & np.isnan(expected))).all())


@pytest.mark.parametrize("name", NARROW)
def test_every_code_stands_for_the_number_that_ml_dtypes_reads(name: str) -> None:
    f = number_format(name)
    codes = np.arange(2**f.bits, dtype=np.uint16 if f.bits == 16 else np.uint8)
    with np.errstate(invalid="ignore"):
        assert same(decode(codes, f), codes.view(TWINS[name]).astype(np.float64))


@pytest.mark.parametrize("name", TWINS)
def test_rounding_to_nearest_even_has_the_codes_of_ml_dtypes(name: str) -> None:
    f, values = number_format(name), edge_floats()
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(TWINS[name])
    codes = quantize(values, name, saturate=False).codes
    number = ~np.isnan(values) if f.specials != "none" else np.ones(len(values), bool)
    assert (codes[number] == expected.view(codes.dtype)[number]).all()
    assert same(dequantize(quantize(values, name, saturate=False)), expected)


@pytest.mark.parametrize("name", [*NARROW, "tf32", "fp32"])
def test_every_number_survives_there_and_back(name: str) -> None:
    f = number_format(name)
    codes = np.arange(2 ** min(f.bits, 16), dtype=np.uint32) << max(0, f.bits - 16)
    values = decode(codes, f)
    finite = np.isfinite(values)
    assert (encode(values[finite], f) == codes[finite]).all()


def test_tf32_is_fp32_rounded_to_ten_bits_of_mantissa() -> None:
    values = np.random.default_rng(1).normal(0, 1, 1000).astype(np.float32)
    words = values.view(np.uint32).astype(np.uint64)
    kept = (words + 0xFFF + ((words >> 13) & 1)) >> 13 << 13  # to nearest, ties to even, on the word itself
    assert (quantize(values, "tf32").codes == kept).all()


@pytest.mark.parametrize(("name", "largest"), [("fp8_e4m3", 448.0), ("fp8_e5m2", 57344.0), ("fp16", 65504.0)])
def test_what_is_too_large_saturates_or_leaves_the_format(name: str, largest: float) -> None:
    values = np.array([1e30, -1e30, np.inf])
    assert dequantize(quantize(values, name)).tolist() == [largest, -largest, largest]
    left = dequantize(quantize(values, name, saturate=False))
    assert (np.isnan(left) if name == "fp8_e4m3" else np.isinf(left)).all()


# Blocks


def brute_force_mx(block: list[float], name: str) -> tuple[int, list[float]]:
    """Section 6.3 of the MX specification, one number at a time, with the nearest element found by trying them all."""
    f = number_format(name)
    amax = max(abs(v) for v in block)
    exponent = -127 if amax == 0 else max(-127, min(127, math.floor(math.log2(amax)) - f.largest_exponent))
    if name == "mxint8":
        numbers = [i / 64 for i in range(-127, 128)]
    else:
        twin = TWINS[f.element]
        numbers = sorted({float(c) for c in np.arange(2**f.bits, dtype=np.uint8).view(twin) if np.isfinite(float(c))})

    def nearest(v: float) -> float:
        if abs(v) >= numbers[-1]:
            return math.copysign(numbers[-1], v)
        below, above = next((a, b) for a, b in pairwise(numbers) if a <= v <= b)
        if v - below != above - v:
            return below if v - below < above - v else above
        return below if round(below / (above - below)) % 2 == 0 else above

    return exponent + 127, [nearest(v / 2.0**exponent) * 2.0**exponent for v in block]


@pytest.mark.parametrize("name", MX)
def test_mx_blocks_are_the_specifications(name: str) -> None:
    rng = np.random.default_rng(3)
    rows = (rng.normal(0, 1, (24, 32)) * 2.0 ** rng.integers(-60, 60, (24, 1))).astype(np.float32)
    rows[0] = 0
    rows[1, 1:] = 0
    rows[2] = np.float32(1.99)  # above the largest element: clamped
    rows[3] *= np.float32(2.0**-100)
    found = quantize(rows, name)
    assert found.scales is not None
    numbers = dequantize(found)
    for row, scale, values in zip(rows.tolist(), found.scales[:, 0].tolist(), numbers.tolist(), strict=True):
        assert (scale, values) == brute_force_mx(row, name)


@pytest.mark.parametrize("name", MX)
def test_a_block_with_nan_or_infinity_is_nan_and_others_are_not(name: str) -> None:
    values = np.ones((1, 96), np.float32)
    values[0, 5], values[0, 70] = np.nan, np.inf
    found = quantize(values, name)
    assert found.scales is not None
    assert found.scales[0].tolist()[::2] == [255, 255]
    numbers = dequantize(found)[0]
    assert np.isnan(numbers[:32]).all()
    assert np.isnan(numbers[64:]).all()
    assert (numbers[32:64] == 1).all()


def test_scales_of_mx_are_ml_dtypes_e8m0() -> None:
    codes = np.arange(256, dtype=np.uint8)
    assert same(decode_scales(codes, number_format("mxfp8")), codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float64))


def test_nvfp4_has_two_levels_of_scales() -> None:
    """Every step of arXiv 2509.25149, appendix C, done again with ml_dtypes' conversions in fp32."""
    rng = np.random.default_rng(5)
    values = (rng.normal(0, 1, (8, 64)) * 2.0 ** rng.integers(-6, 6, (8, 1))).astype(np.float32)
    found = quantize(values, "nvfp4")
    assert found.scales is not None
    tensor_scale = np.abs(values).max() / np.float32(6 * 448)
    assert found.tensor_scale == tensor_scale
    blocks = values.reshape(8, 4, 16)
    scales = (np.abs(blocks).max(axis=-1) / np.float32(6) / tensor_scale).astype(ml_dtypes.float8_e4m3fn)
    assert (found.scales == scales.view(np.uint8)).all()
    decoded = scales.astype(np.float32) * tensor_scale
    elements = (blocks / np.where(decoded == 0, 1, decoded)[..., None]).astype(ml_dtypes.float4_e2m1fn)
    elements = np.where(decoded[..., None] == 0, ml_dtypes.float4_e2m1fn(0), elements)
    assert (found.codes.reshape(8, 4, 16) == elements.view(np.uint8)).all()
    error = np.abs(dequantize(found) - values).reshape(8, 4, 16).max(axis=-1)
    # half of the gap between 4 and 6 under a scale rounded up by 1/16, or what a subnormal scale loses
    assert (error <= np.abs(blocks).max(axis=-1) * (17 / 96 + 1e-5) + tensor_scale * 6 * 2.0**-10).all()


def test_nvfp4_of_zeros_is_zeros() -> None:
    assert (dequantize(quantize(np.zeros((2, 16)), "nvfp4")) == 0).all()


def test_blocks_follow_the_last_dimension_and_may_end_early() -> None:
    values = np.random.default_rng(2).normal(0, 1, (3, 40)).astype(np.float32)
    found = quantize(values, "mxfp4")
    assert found.scales is not None
    assert (found.scales.shape, found.codes.shape) == ((3, 2), (3, 40))
    assert (dequantize(found)[:, :32] == dequantize(quantize(values[:, :32], "mxfp4"))).all()


def test_blocks_of_128_hold_outliers_that_one_scale_loses() -> None:
    """What DeepSeek-V3's scales per 128 elements are for (arXiv 2412.19437, section 3.3.2)."""
    values = np.full((1, 256), 1e-3, np.float32)
    values[0, 200] = 1e4
    scale = 1e4 / 448
    assert (dequantize(quantize(values, "fp8_e4m3", scale=scale))[0, :128] == 0).all()
    assert dequantize(quantize(values, "fp8_block128"))[0, :128] == pytest.approx(1e-3, rel=1e-6)


# Stochastic rounding


@pytest.mark.parametrize("name", ["fp4_e2m1", "fp8_e4m3", "bf16", "int8"])
def test_stochastic_rounding_is_unbiased(name: str) -> None:
    """The mean over n draws lies within four standard errors of the number itself; nearest-even is off by far more."""
    n = 200_000
    value = 2.0 + 0.3 * float(
        number_format(name).smallest if name == "int8" else 2.0 ** (1 - number_format(name).mantissa_bits)
    )
    drawn = dequantize(quantize(np.full(n, value), name, rounding="stochastic", seed=11))
    neighbours = np.unique(drawn)
    assert len(neighbours) == 2
    assert neighbours[0] < value < neighbours[1]
    assert abs(drawn.mean() - value) < 4 * drawn.std() / math.sqrt(n)
    assert abs(dequantize(quantize(np.array([value]), name))[0] - value) > 50 * drawn.std() / math.sqrt(n)


@pytest.mark.parametrize("name", [*NARROW, "mxfp4", "nvfp4", "int4"])
def test_stochastic_rounding_leaves_exact_numbers_alone(name: str) -> None:
    values = np.array([[0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0, 6.0]])
    if name == "int4":
        values = np.round(values)
    if name == "nvfp4":
        values *= 448  # so that the tensor's scale is 1, and that of the block 448
    for seed in range(3):
        assert (dequantize(quantize(values, name, rounding="stochastic", seed=seed)) == values).all()


def test_a_seed_gives_the_same_draws() -> None:
    values = np.random.default_rng(0).normal(0, 1, 500)
    first, again, other = (quantize(values, "fp4", rounding="stochastic", seed=s).codes for s in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_what_cannot_be_is_one_sentence() -> None:
    with pytest.raises(InputError, match="no code for NaN"):
        quantize([np.nan], "int8")
    with pytest.raises(InputError, match="is not one of nearest-even, stochastic"):
        quantize([1.0], "fp8", rounding="up")  # type: ignore[arg-type]
