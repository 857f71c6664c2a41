"""STREAM's kernels compute what STREAM says, on any number of threads."""

import numpy as np
import pytest
from cosim_native import stream_copy, stream_triad
from hypothesis import given
from hypothesis import strategies as st

LENGTHS = st.one_of(st.integers(0, 70), st.sampled_from([16383, 16385, 32768, 100_003]))


@given(n=LENGTHS, threads=st.integers(0, 5))
def test_copy_and_triad(n: int, threads: int) -> None:
    rng = np.random.default_rng(n)
    b, c = rng.standard_normal((2, n), dtype=np.float32)
    out = np.full(n, np.nan, dtype=np.float32)
    stream_copy(b, out, threads=threads)
    assert np.array_equal(out, b)
    stream_triad(b, c, 3.0, out, threads=threads)
    np.testing.assert_allclose(out, b.astype(np.float64) + 3.0 * c.astype(np.float64), rtol=1e-6, atol=1e-6)


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="a has 3 elements and out has 4"):
        stream_copy(np.zeros(3, dtype=np.float32), np.zeros(4, dtype=np.float32))
