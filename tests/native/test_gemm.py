"""The reference GEMM against NumPy in double precision, and what it refuses."""

from typing import Any

import numpy as np
import pytest
import torch
from cosim_native import cpu_instructions, gemm
from hypothesis import given
from hypothesis import strategies as st

# Around the edges of register tiles (4 to 12 by 8 to 32), cache tiles (144 by 512) and panels (256).
SIZES = st.one_of(st.integers(0, 40), st.sampled_from([143, 144, 145, 255, 256, 257, 511, 513]))


def _matrices(m: int, n: int, k: int) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(m * 1000003 + n * 1009 + k)
    a, b = (rng.standard_normal(shape, dtype=np.float32) for shape in ((m, k), (k, n)))
    return a, b, np.full((m, n), np.nan, dtype=np.float32)


@pytest.mark.parametrize("instructions", cpu_instructions())
@given(m=SIZES, n=SIZES, k=SIZES, threads=st.integers(0, 3))
def test_product_is_within_the_rounding_bound_of_double_precision(
    instructions: str, m: int, n: int, k: int, threads: int
) -> None:
    a, b, out = _matrices(m, n, k)
    gemm(a, b, out, threads=threads, instructions=instructions)
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    # Higham, Accuracy and Stability of Numerical Algorithms (2nd ed.), eq. 3.13: |error| <= gamma_k |A||B|
    unit = 2.0**-24
    bound = (k + 1) * unit / (1 - (k + 1) * unit) * (np.abs(wide_a) @ np.abs(wide_b))
    assert np.all(np.abs(out - wide_a @ wide_b) <= bound)


def test_result_does_not_depend_on_the_number_of_threads() -> None:
    a, b, one = _matrices(301, 1100, 517)
    many = np.empty_like(one)
    gemm(a, b, one, threads=1)
    gemm(a, b, many, threads=7)
    assert np.array_equal(one, many)


def test_nan_and_infinity_reach_the_result() -> None:
    a, b, out = _matrices(3, 3, 3)
    a[0, 0], a[1, 1] = np.nan, np.inf
    gemm(a, b, out)
    assert np.isnan(out[0]).all()
    assert np.isinf(out[1]).all()
    assert np.isfinite(out[2]).all()


def test_torch_tensors_are_used_where_they_lie() -> None:
    a, b, out = torch.randn(33, 65), torch.randn(65, 17), torch.zeros(33, 17)
    address = out.data_ptr()
    gemm(a, b, out)
    assert out.data_ptr() == address
    torch.testing.assert_close(out, a @ b)


def test_every_processor_can_run_the_portable_kernel() -> None:
    assert cpu_instructions()[-1] == "portable"


def test_instructions_that_the_processor_lacks_are_refused_with_those_it_has() -> None:
    with pytest.raises(ValueError, match=r"instructions is 'sse9'; this processor has: .*portable"):
        gemm(GOOD, GOOD, GOOD.copy(), instructions="sse9")


def _read_only(array: Any) -> Any:
    array.flags.writeable = False
    return array


GOOD = np.ones((4, 4), dtype=np.float32)


@pytest.mark.parametrize(
    ("arrays", "error", "said"),
    [
        ((GOOD.astype(np.float64), GOOD, GOOD.copy()), TypeError, "a must be float32"),
        ((GOOD, torch.ones(4, 4, dtype=torch.bfloat16), GOOD.copy()), TypeError, "b must be float32"),
        ((GOOD, GOOD, GOOD.astype(np.int32)), TypeError, "out must be float32"),
        ((np.ones((4, 8), dtype=np.float32)[:, ::2], GOOD, GOOD.copy()), ValueError, "a must be contiguous"),
        ((GOOD, np.ones((4, 5), dtype=np.float32).T[:4], GOOD.copy()), ValueError, "b must be contiguous"),
        ((GOOD, GOOD, torch.ones(4, 8)[:, :4]), ValueError, "out must be contiguous"),
        ((GOOD, GOOD, _read_only(GOOD.copy())), TypeError, "out must be a writable"),
        ((GOOD[0], GOOD, GOOD.copy()), ValueError, "a must have 2 dimensions"),
        ((GOOD, np.ones((5, 4), dtype=np.float32), GOOD.copy()), ValueError, "shapes do not fit: a (4, 4), b (5, 4)"),
        ((GOOD, GOOD, np.ones((4, 5), dtype=np.float32)), ValueError, "shapes do not fit"),
        (([[1.0]], GOOD, GOOD.copy()), TypeError, "a must be a NumPy array or PyTorch tensor"),
        ((GOOD, torch.ones(4, 4, device="meta"), GOOD.copy()), TypeError, "b must be a NumPy array or PyTorch tensor"),
    ],
)
def test_what_it_cannot_take_is_refused_in_a_sentence(arrays: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as refused:
        gemm(*arrays)
    assert said in str(refused.value)


def test_output_that_overlaps_an_input_is_refused() -> None:
    square = np.ones((4, 4), dtype=np.float32)
    with pytest.raises(ValueError, match="out must not share memory with a"):
        gemm(square, GOOD, square)


def test_negative_thread_count_is_refused() -> None:
    with pytest.raises(ValueError, match="threads must be 0"):
        gemm(GOOD, GOOD, GOOD.copy(), threads=-1)
