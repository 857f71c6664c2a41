"""Formats by role, against ZeRO's count of bytes (arXiv 1910.02054) and the stacks' own statements."""

import dataclasses

import pytest

from cosim import stacks
from cosim.stacks.stack import Stack
from cosim.techniques.precision import StepFormats, resolve


@pytest.fixture(scope="module")
def stack() -> Stack:
    return stacks.load("pytorch")


def bytes_per_parameter(formats: StepFormats) -> float:
    """Weights, masters where there are two copies, the reduced gradient and optimizer states."""
    masters = formats.master if formats.master != formats.parameter else 0
    return formats.parameter + masters + formats.gradient + formats.optimizer_state


@pytest.mark.parametrize(
    ("way", "weights", "total"),
    [
        ("master_weights", 2, 2 + 4 + 4 + 8),
        ("autocast", 4, 4 + 4 + 8),
        ("cast_parameters", 2, 2 + 4 + 4 + 8),
    ],
)
def test_mixed_precision_keeps_one_fp32_copy_and_adams_moments(
    stack: Stack, way: str, weights: int, total: int
) -> None:
    """12 bytes of masters and moments per parameter in every way of doing it; the 16-bit copy is there or made."""
    chosen = dataclasses.replace(stack, mixed_precision_replicated=way, gradient_format="fp32")  # type: ignore[arg-type]
    precision = resolve("bf16", chosen, False, None, None)
    formats = precision.step_formats(8)
    assert formats.parameter == weights
    assert bytes_per_parameter(formats) == total
    assert (precision.autocast == "bf16") == (way == "autocast")
    assert precision.compute == "bf16"


def test_sixteen_bytes_with_16_bit_gradients(stack: Stack) -> None:
    """2 + 2 + 12: the count of the ZeRO paper, section 3.1."""
    chosen = dataclasses.replace(stack, mixed_precision_replicated="master_weights")
    assert bytes_per_parameter(resolve("fp16", chosen, False, "fp16", None).step_formats(8)) == 16


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_wide_formats_have_one_copy_and_differ_in_products_only(stack: Stack, precision: str) -> None:
    wide = resolve(precision, stack, True, None, None)
    assert bytes_per_parameter(wide.step_formats(8)) == 4 + 4 + 8
    assert (wide.fp32_matmul, wide.compute) == (precision, precision)


def test_the_runs_own_formats_come_first(stack: Stack) -> None:
    for sharded in (False, True):
        formats = resolve("bf16", stack, sharded, "bf16", "fp32").step_formats(8)
        assert (formats.gradient, formats.reduce) == (2, 4)
