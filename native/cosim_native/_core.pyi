from typing import Any

import numpy as np
from numpy.typing import NDArray

def gemm(a: Any, b: Any, out: Any, threads: int, stream: int, instructions: str) -> None: ...
def stream_copy(a: Any, out: Any, threads: int) -> None: ...
def stream_triad(b: Any, c: Any, scalar: float, out: Any, threads: int) -> None: ...
def cuda_info() -> tuple[bool, int, str]: ...
def cpu_instructions() -> list[str]: ...
def play_columns(
    *,
    streams: int,
    meetings: int,
    capacity: NDArray[np.float64],
    stream: NDArray[np.int32],
    work_ps: NDArray[np.int64],
    host: NDArray[np.int32],
    launch_ps: NDArray[np.int64],
    span_ps: NDArray[np.int64],
    synchronises: NDArray[np.bool_],
    priority: NDArray[np.int8],
    rendezvous: NDArray[np.int32],
    depends_indptr: NDArray[np.int32],
    depends: NDArray[np.int32],
    demands_indptr: NDArray[np.int32],
    demands: NDArray[np.int32],
    amount: NDArray[np.float64],
    issue_ps: NDArray[np.int64],
    start_ps: NDArray[np.int64],
    end_ps: NDArray[np.int64],
) -> bool:
    """Writes `issue_ps`, `start_ps` and `end_ps`; False, with -1 in them, when tasks wait for each other.

    The columns are those of `cosim.engine.program`, and must have passed `cosim.engine.check`; amounts are positive,
    and rendezvous are numbered 0 to meetings - 1. Raises OverflowError for more than 2**63 picoseconds.
    """
