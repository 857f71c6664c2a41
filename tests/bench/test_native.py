"""How fast the reference kernels run on this machine, beside PyTorch's."""

from typing import Any

import numpy as np
import pytest
import torch
from cosim_native import gemm, stream_triad


@pytest.mark.parametrize("size", [512, 2048])
def test_gemm(benchmark: Any, size: int) -> None:
    a, b, out = (np.ones((size, size), dtype=np.float32) for _ in range(3))
    benchmark.extra_info["flop"] = 2 * size**3
    benchmark(gemm, a, b, out)


@pytest.mark.parametrize("size", [512, 2048])
def test_gemm_of_pytorch(benchmark: Any, size: int) -> None:
    a, b, out = (torch.ones(size, size) for _ in range(3))
    benchmark.extra_info["flop"] = 2 * size**3
    benchmark(torch.mm, a, b, out=out)


def test_stream_triad(benchmark: Any) -> None:
    b, c, out = (np.ones(1 << 25, dtype=np.float32) for _ in range(3))
    benchmark.extra_info["bytes"] = 12 * b.size
    benchmark(stream_triad, b, c, 3.0, out)
