"""Jitter: each compute task of a device takes a random factor longer or shorter, and whoever meets it waits.

A device's factor for a task is lognormal with mean 1; `spread` is the standard deviation of its logarithm. Devices that
share a task (tensor and context parallelism) wait for each other in its collectives, so that the task takes the largest
of their factors. Replicas wait for each other in the collectives of data parallelism, which the engine plays: with N
replicas of which K are played, deviations are widened by m(N) / m(K), m(n) being the expected largest of n standard
normal numbers, so that the latest of those played is as late as the latest of all is on average. That is exact for
sums of many tasks, which are normal.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from cosim.engine.program import Program

_NORMAL = NormalDist()
_RANGE, _POINTS = 9.0, 4001  # of the integral; beyond 9 standard deviations lies 1e-19


@dataclass(frozen=True, slots=True)
class Jitter:
    """`spread` and `seed` of the run file; `sharing` devices share each task; of `replicas`, `played` are there."""

    spread: float
    seed: int
    sharing: int
    replicas: int
    played: int

    def factors(self, count: int) -> NDArray[np.float64]:
        """One factor for each of `count` tasks."""
        random = np.random.default_rng(self.seed)
        if self.sharing == 1:
            drawn = random.standard_normal(count)
        else:  # the largest of n is below x with the n-th power of the probability of one
            below = np.clip(random.random(count), 1e-15, 1 - 1e-15) ** (1 / self.sharing)
            drawn = np.array([_NORMAL.inv_cdf(min(p, 1 - 1e-16)) for p in below.tolist()])
        center = expected_maximum(self.sharing)
        widened = 1.0
        if self.played < self.replicas and self.played > 1:
            widened = expected_maximum(self.replicas) / expected_maximum(self.played)
        deviation = center + widened * (drawn - center)
        return np.exp(self.spread * deviation - (self.spread * widened) ** 2 / 2)


def expected_maximum(count: int) -> float:
    """The mean of the largest of `count` standard normal numbers: the integral of 1 - P(x)^n above 0 less that of
    P(x)^n below it.
    """
    if count == 1:
        return 0.0
    x = np.linspace(0.0, _RANGE, _POINTS)
    below = np.array([0.5 * math.erfc(value / math.sqrt(2)) for value in x.tolist()])  # P(-x)
    above = -np.expm1(count * np.log1p(-below))
    return float(np.trapezoid(above - below**count, x))


def jittered(program: Program, jitter: Jitter) -> Program:
    """`program` with other work in its compute tasks, copies included; what the host takes stays."""
    compute = np.array([stream.kind == "compute" for stream in program.streams], dtype=np.bool_)[program.stream]
    rows = np.flatnonzero(compute & (program.work_ps > 0))
    work = program.work_ps.copy()
    work[rows] = np.maximum(1, np.rint(work[rows] * jitter.factors(len(rows)))).astype(np.int64)
    span = np.where(program.host >= 0, np.maximum(program.span_ps + work - program.work_ps, work), program.span_ps)
    return dataclasses.replace(program, work_ps=work, span_ps=span)
