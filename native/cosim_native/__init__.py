"""The simulator's engine in C++; kernels in C++ and CUDA, to check its hardware models against and run real steps with.

The kernels' arrays are NumPy arrays or PyTorch tensors, float32 and contiguous. They are used where they lie, never
copied or converted, and `gemm` runs where its arrays are, on a CPU or a CUDA device. `play_columns` is for
`cosim.engine`, which checks what it is given.
"""

from typing import Any, NamedTuple

from cosim_native import _core
from cosim_native._core import play_columns

__all__ = ["CudaInfo", "cpu_instructions", "cuda_info", "gemm", "play_columns", "stream_copy", "stream_triad"]


class CudaInfo(NamedTuple):
    """What this build can do on CUDA devices: were kernels built, how many devices are there, and why none."""

    built: bool
    devices: int
    message: str


def gemm(a: Any, b: Any, out: Any, *, threads: int = 0, stream: int = 0, instructions: str = "") -> None:
    """Write the matrix product of `a` (m, k) and `b` (k, n) into `out` (m, n), in fp32.

    On a CPU it uses `threads` threads (0: one per processor), on which the result does not depend, and `instructions`
    (of `cpu_instructions()`; "": the best). On a CUDA device it is queued on `stream` (a cudaStream_t as an integer; 0
    is the default stream) and returns at once. Raises TypeError or ValueError for arrays of another type, shape or
    layout, for devices that differ, and where `out` shares memory with an input; RuntimeError where CUDA is not built
    or fails.
    """
    _core.gemm(a, b, out, threads, stream, instructions)


def stream_copy(a: Any, out: Any, *, threads: int = 0) -> None:
    """Copy `a` (n,) to `out` (n,) on a CPU: STREAM's copy, 8 n bytes as STREAM counts them. Raises as `gemm` does."""
    _core.stream_copy(a, out, threads)


def stream_triad(b: Any, c: Any, scalar: float, out: Any, *, threads: int = 0) -> None:
    """Write b + scalar * c (n,) into `out` (n,) on a CPU: STREAM's triad, 12 n bytes. Raises as `gemm` does."""
    _core.stream_triad(b, c, scalar, out, threads)


def cuda_info() -> CudaInfo:
    """Say whether CUDA kernels were built and how many devices can run them."""
    return CudaInfo(*_core.cuda_info())


def cpu_instructions() -> list[str]:
    """Name the vector instructions that `gemm` can use on this processor, best first: of avx512, avx2, portable."""
    return _core.cpu_instructions()
