"""What every pipeline rank holds over the step, of which a result keeps only the rank that holds most."""

from __future__ import annotations

from cosim.memory import memory_over_time
from cosim.result import Detail, MemoryCurve, Result


def curves(detail: Detail) -> tuple[MemoryCurve, ...]:
    """The curve of each device of the program; without the ranks' graphs that of the rank that holds most alone."""
    if not detail.ranks:
        return (detail.memory,)
    return tuple(
        memory_over_time(detail.program, detail.timeline, device, step.resident_bytes)[0]
        for device, step in enumerate(detail.ranks)
    )


def peaks(result: Result) -> tuple[float, ...]:
    """The most bytes that each pipeline rank holds; empty where there is one rank."""
    detail = result.detail
    if detail is None or len(detail.ranks) < 2:
        return ()
    return tuple(float(curve.bytes.sum(axis=0).max()) for curve in curves(detail))
