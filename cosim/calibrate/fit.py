"""Bounded fits of a few named constants to measured rows, on the half that a hash chose; the other half is only
reported.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cosim.calibrate.rows import Row
from hwmodels.accelerator import Accelerator
from hwmodels.work import Attention, Gemm, Pass

Predict = Callable[[Row], float]


@dataclass(frozen=True, slots=True)
class Free:
    """A constant to fit: where the search starts, and its bounds."""

    start: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Errors:
    """Relative errors (prediction / measured - 1) of some rows: number, mean and median absolute, 90th percentile,
    mean.
    """

    rows: int
    mean: float
    median: float
    p90: float
    bias: float

    def __str__(self) -> str:
        if self.rows == 0:
            return "no rows"
        size = f"mean {self.mean:6.1%}  median {self.median:6.1%}  p90 {self.p90:6.1%}"
        return f"n {self.rows:5d}  {size}  bias {self.bias:+6.1%}"


@dataclass(frozen=True, slots=True)
class Fit:
    """Fitted values, each one's standard error, and errors on both halves.

    `uncertainty` is infinite for a constant that no row depends on, `at_bound` names those that ended on a bound.
    """

    values: dict[str, float]
    uncertainty: dict[str, float]
    at_bound: tuple[str, ...]
    fitted: Errors
    held_out: Errors


def price(accelerator: Accelerator, row: Row) -> float:
    """Seconds that `accelerator` needs for the row's kernels, one after the other."""
    return sum(accelerator.cost(work).time_s for work in row.works if isinstance(work, Gemm | Attention | Pass))


def errors(predict: Predict, rows: Sequence[Row]) -> Errors:
    """How far `predict` is from the measured times of `rows`."""
    import numpy as np

    if not rows:
        return Errors(0, 0.0, 0.0, 0.0, 0.0)
    found = np.array([predict(row) / row.time_s - 1.0 for row in rows])
    size = np.abs(found)
    return Errors(len(rows), *(float(v) for v in (size.mean(), np.median(size), np.quantile(size, 0.9), found.mean())))


def fit(
    free: Mapping[str, Free],
    model: Callable[[dict[str, float]], Predict],
    rows: Sequence[Row],
    starts: Sequence[Mapping[str, float]] = (),
) -> Fit:
    """Fits `free` so that `model(values)` prices the fitted half of `rows` (relative errors, outliers damped beyond 2
    %), from its own start and from others in `starts`; the one that ends lowest is kept.
    """
    import numpy as np
    from scipy.optimize import least_squares

    names = list(free)
    used = [row for row in rows if row.fitted]
    measured = np.array([row.time_s for row in used])

    def residual(x: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
        predict = model(dict(zip(names, map(float, x), strict=True)))
        return np.asarray(np.array([predict(row) for row in used]) / measured - 1.0)

    bounds = [free[name].low for name in names], [free[name].high for name in names]

    def search(start: Mapping[str, float]) -> Any:
        return least_squares(
            residual,
            [start.get(name, free[name].start) for name in names],
            bounds=bounds,
            loss="soft_l1",
            f_scale=0.02,
            diff_step=0.02,  # tiles and waves are steps: a smaller difference sees none of them
            x_scale=[max(free[name].start, 1e-3) / 4 for name in names],
            max_nfev=40,
        )

    found = min((search(start) for start in ({}, *starts)), key=lambda one: float(one.cost))
    values = {name: float(value) for name, value in zip(names, found.x, strict=True)}
    covariance = np.linalg.pinv(found.jac.T @ found.jac) * float(np.mean(found.fun**2))
    spread = [
        float(np.sqrt(error)) if column > 1e-12 else float("inf")
        for error, column in zip(np.diag(covariance), np.sum(found.jac**2, axis=0), strict=True)
    ]
    at_bound = tuple(name for name, side in zip(names, found.active_mask, strict=True) if side)
    predict = model(values)
    return Fit(
        values=values,
        uncertainty=dict(zip(names, spread, strict=True)),
        at_bound=at_bound,
        fitted=errors(predict, used),
        held_out=errors(predict, [row for row in rows if not row.fitted]),
    )


def cross_validated(
    free: Mapping[str, Free], model: Callable[[dict[str, float]], Predict], rows: Sequence[Row], folds: int = 3
) -> float:
    """Mean absolute error of the fitted half of `rows`, each part of it predicted by a fit to the others: by this, and
    never by the other half, one variant of a model is preferred to another. Parts go by a hash of the row's id.
    """
    used = sorted((r for r in rows if r.fitted), key=lambda row: hashlib.sha256(f"fold {row.id}".encode()).digest())
    total = 0.0
    for fold in range(folds):
        apart = used[fold::folds]
        predict = model(fit(free, model, [row for row in used if row not in apart]).values)
        total += sum(abs(predict(row) / row.time_s - 1.0) for row in apart)
    return total / max(1, len(used))
