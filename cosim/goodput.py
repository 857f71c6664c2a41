"""A whole run with failures: checkpoints, what is computed again, restarts, and the share of time that is progress.

A failure of any device stops the run; failures come at a constant rate (exponential times between them), also during a
checkpoint or a restart. The run then goes on from the last checkpoint. J. T. Daly, "A higher order estimate of the
optimum checkpoint interval for restart dumps", Future Generation Computer Systems 22 (2006) 303-312: with M the mean
time between failures of the whole system, d the time of a checkpoint, R that of a restart and t the training between
two checkpoints, training of T takes

    M exp(R / M) (exp((t + d) / M) - 1) T / t

which is least for t = sqrt(2 d M) (1 + sqrt(d / 2M) / 3 + d / 18M) - d where d < 2M, else for t = M. The
first term is J. W. Young's, "A first order approximation to the optimum checkpoint interval", CACM 17 (1974) 530-531.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hwmodels.units import InputError

_MOST = 700.0  # of an exponent, before it is more than a float can hold


@dataclass(frozen=True, slots=True)
class Run:
    """A whole run, in seconds: `time_s` of the clock on the wall, of which only `training_s` is progress."""

    training_s: float
    time_s: float
    checkpoint_interval_s: float  # of training between two checkpoints
    checkpoints_s: float  # all that were needed
    restarts_s: float
    failures: float  # expected

    @property
    def goodput(self) -> float:
        """The share of the time that is progress."""
        return self.training_s / self.time_s if self.time_s else 1.0

    @property
    def again_s(self) -> float:
        """Training and checkpoints that were lost, and that were computed again."""
        return max(0.0, self.time_s - self.training_s - self.checkpoints_s - self.restarts_s)


def best_interval_s(checkpoint_s: float, failure_s: float) -> float:
    """Training between two checkpoints for which the run is shortest, by Daly's higher-order estimate."""
    if checkpoint_s >= 2 * failure_s:
        return failure_s
    ratio = checkpoint_s / (2 * failure_s)
    return math.sqrt(2 * checkpoint_s * failure_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - checkpoint_s


def run_with_failures(
    training_s: float, failure_s: float, checkpoint_s: float, restart_s: float, interval_s: float | None = None
) -> Run:
    """What a run of `training_s` takes, with `failure_s` between failures of the system on average.

    `interval_s` of None is the best one; it is never longer than the run. Raises InputError where a run gets nowhere:
    failures come so often that no checkpoint is reached.
    """
    best = best_interval_s(checkpoint_s, failure_s) if interval_s is None else interval_s
    interval = min(max(best, 1e-3), training_s) if training_s else best
    if not training_s:
        return Run(0.0, 0.0, interval, 0.0, 0.0, 0.0)
    exponent = (interval + checkpoint_s) / failure_s
    if exponent + restart_s / failure_s > _MOST:
        raise InputError(
            f"system.failures: something fails every {failure_s:.3g} s, so that a run with {interval:.3g} s between "
            f"checkpoints of {checkpoint_s:.3g} s and restarts of {restart_s:.3g} s gets nowhere"
        )
    parts = training_s / interval
    time_s = failure_s * math.exp(restart_s / failure_s) * math.expm1(exponent) * parts
    # each part is reached after exp(exponent) - 1 failures on average, each of which restarts until one is through
    failures = math.expm1(exponent) * parts
    restarts_s = failures * failure_s * math.expm1(restart_s / failure_s)
    return Run(training_s, time_s, interval, parts * checkpoint_s, restarts_s, time_s / failure_s)
