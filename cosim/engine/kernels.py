"""Many kernels as one task: its work, launch and span, in exact integers.

A kernel launched L after its issue, that works for w, ends at max(end of the one before, issue + L) + w. So a chain of
them maps (start, issue) to max(start + work, issue + span).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def merge_kernels(work_ps: NDArray[np.int64], launch_ps: NDArray[np.int64]) -> tuple[int, int, int]:
    """Work, launch and span (int picoseconds) of the one task that stands for kernels issued one after another.

    work = sum of work_i, launch = sum of launch_i, span = max over k of (launch_i for i <= k plus work_j for j >= k):
    kernel k cannot begin before it is launched, and those after it follow on the stream. No kernels: zeros.
    """
    work = np.asarray(work_ps, dtype=np.int64)
    launched = np.cumsum(launch_ps, dtype=np.int64)
    if not len(work):
        return 0, 0, 0
    total = int(work.sum())
    after = total - np.cumsum(work) + work
    return total, int(launched[-1]), int((launched + after).max())
