"""Formats against the numbers printed in their specifications (OFP8 1.0, tables 1 and 2; MX 1.0, tables 1 to 5)."""

import ml_dtypes
import pytest

from hwmodels.number_formats import FORMATS, bytes_of, number_format, tensor_bytes
from hwmodels.units import InputError

# name: bias, largest number, smallest number greater than zero
PRINTED = {
    "fp64": (1023, 1.7976931348623157e308, 5e-324),
    "fp32": (127, 3.4028234663852886e38, 2.0**-149),
    "bf16": (127, 3.3895313892515355e38, 2.0**-133),
    "fp16": (15, 65504.0, 2.0**-24),
    "fp8_e4m3": (7, 448.0, 2.0**-9),
    "fp8_e5m2": (15, 57344.0, 2.0**-16),
    "fp6_e3m2": (3, 28.0, 2.0**-4),
    "fp6_e2m3": (1, 7.5, 0.125),
    "fp4_e2m1": (1, 6.0, 0.5),
    "mxint8": (0, 127 / 64, 1 / 64),
    "int8": (0, 127.0, 1.0),
    "int4": (0, 7.0, 1.0),
}


@pytest.mark.parametrize("name", PRINTED)
def test_range_is_the_specifications(name: str) -> None:
    f = number_format(name)
    assert (f.bias, f.largest, f.smallest) == PRINTED[name]


def test_largest_exponents_are_those_of_the_mx_specification() -> None:
    emax = {"mxfp8": 8, "mxfp8_e5m2": 15, "mxfp6": 4, "mxfp6_e2m3": 2, "mxfp4": 2, "mxint8": 0}
    assert {name: FORMATS[name].largest_exponent for name in emax} == emax
    assert all((FORMATS[name].block, FORMATS[name].scale) == (32, "e8m0") for name in emax)


def test_scales_add_a_quarter_bit_in_mx_and_half_a_bit_in_nvfp4() -> None:
    bits = {"mxfp8": 8.25, "mxfp6": 6.25, "mxfp4": 4.25, "nvfp4": 4.5, "fp8_block128": 8.25}
    assert {name: 8 * bytes_of(name) for name in bits} == bits


def test_element_bits_are_those_of_ml_dtypes() -> None:
    names = {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2", "fp6_e2m3": "float6_e2m3fn", "bf16": "bfloat16"}
    for name, other in (names | {"fp6_e3m2": "float6_e3m2fn", "fp4_e2m1": "float4_e2m1fn"}).items():
        info, f = ml_dtypes.finfo(getattr(ml_dtypes, other)), FORMATS[name]
        assert (f.mantissa_bits, f.largest, f.smallest) == (info.nmant, float(info.max), float(info.smallest_subnormal))


@pytest.mark.parametrize(
    ("name", "shape", "tile", "expected"),
    [
        ("bf16", (3, 5), (1, 1), 30),
        ("fp4", (2, 3), (1, 1), 4),  # a row of three nibbles is two bytes
        ("mxfp8", (4, 64), (1, 1), 4 * 64 + 4 * 2),
        ("mxfp8", (4, 65), (1, 1), 4 * 96 + 4 * 3),  # the third block is filled up
        ("mxfp8", (130, 64), (128, 4), 130 * 64 + 256 * 4),
        ("mxfp4", (1, 32), (1, 1), 16 + 1),
        ("nvfp4", (2, 32), (1, 1), 2 * 16 + 2 * 2 + 4),  # and the tensor's own scale
        ("fp8_block128", (2, 256), (1, 1), 2 * 256 + 2 * 2 * 4),
        ("fp32", (), (1, 1), 4),
    ],
)
def test_bytes_of_a_tensor_count_scales_and_padding(
    name: str, shape: tuple[int, ...], tile: tuple[int, int], expected: int
) -> None:
    assert tensor_bytes(name, shape, tile) == expected


def test_an_unknown_format_is_named_with_those_that_are_known() -> None:
    with pytest.raises(InputError, match=r"'fp5' is not known; known are .*nvfp4"):
        number_format("fp5")
