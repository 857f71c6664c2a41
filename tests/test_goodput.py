"""Runs with failures: against a run played failure by failure, and against what Llama 3's training reported."""

import math
from typing import Any

import numpy as np
import pytest

from cosim.goodput import best_interval_s, run_with_failures
from cosim.simulate import simulate
from cosim.spec import RunSpec
from hwmodels.units import InputError

HOUR = 3600.0


def _played(training: float, failure: float, checkpoint: float, restart: float, interval: float, seed: int) -> float:
    """One run, failure by failure; a failure may come at any time, and time to the next one is exponential."""
    random = np.random.default_rng(seed)
    clock, done, left = 0.0, 0.0, random.exponential(failure)
    while done < training:
        need = interval + checkpoint
        if left >= need:
            clock, left, done = clock + need, left - need, done + interval
            continue
        clock += left
        left = random.exponential(failure)
        while left < restart:
            clock += left
            left = random.exponential(failure)
        clock, left = clock + restart, left - restart
    return clock


@pytest.mark.parametrize(
    ("failure", "checkpoint", "restart", "interval"),
    [(3 * HOUR, 60.0, 600.0, 1800.0), (HOUR, 300.0, 1200.0, 1500.0), (600.0, 60.0, 300.0, 600.0)],
)
def test_expected_time_is_that_of_runs_played_failure_by_failure(
    failure: float, checkpoint: float, restart: float, interval: float
) -> None:
    training = 400 * interval
    found = run_with_failures(training, failure, checkpoint, restart, interval)
    played = [_played(training, failure, checkpoint, restart, interval, seed) for seed in range(60)]
    assert found.time_s == pytest.approx(float(np.mean(played)), rel=0.02)
    assert found.again_s > 0
    total = found.training_s + found.checkpoints_s + found.restarts_s + found.again_s
    assert total == pytest.approx(found.time_s)


@pytest.mark.parametrize("checkpoint", [1.0, 60.0, 1200.0])
def test_the_best_interval_is_the_best(checkpoint: float) -> None:
    failure = 3 * HOUR

    def time(interval: float) -> float:
        return run_with_failures(1e9, failure, checkpoint, 600.0, interval).time_s

    best = best_interval_s(checkpoint, failure)
    tried = min(time(best * 1.02**n) for n in range(-60, 61))
    assert time(best) == pytest.approx(tried, rel=1e-4)
    assert run_with_failures(1e9, failure, checkpoint, 600.0).checkpoint_interval_s == pytest.approx(best)


def test_young_is_the_first_term() -> None:
    assert best_interval_s(0.01, 1e6) == pytest.approx(math.sqrt(2 * 0.01 * 1e6), rel=1e-3)
    assert best_interval_s(100.0, 10.0) == 10.0  # checkpoints longer than what is between failures: M (Daly)


def test_llama_3_trained_more_than_nine_tenths_of_its_time() -> None:
    """arXiv 2407.21783, section 3.3.4: 466 interruptions in 54 days on 16,384 H100, 419 of them unexpected, and more
    than 90 % effective training time. Checkpoints of 405B parameters with fp32 masters and two fp32 Adam states, 12
    bytes each, over storage of 2 TB/s sustained (section 3.3.1); 10 minutes for a restart are assumed.
    """
    failure_s = 54 * 24 * HOUR / 466
    found = run_with_failures(54 * 24 * HOUR * 0.93, failure_s, 405e9 * 12 / 2e12, 600.0)
    assert 0.90 < found.goodput < 0.96
    assert found.failures == pytest.approx(466, rel=0.05)
    assert found.time_s == pytest.approx(54 * 24 * HOUR, rel=0.05)
    assert failure_s * 16_384 == pytest.approx(45_600 * HOUR, rel=0.01)  # of one device


def _result(failures: str | None) -> dict[str, Any]:
    base: dict[str, Any] = {
        "workload": {"model": "gpt2-small", "seq_len": 1024, "global_batch": 8, "tokens": 1e10},
        "system": {"accelerator": "h100-sxm-80gb", "devices": 8},
    }
    overrides = [] if failures is None else [f"system.failures={failures}"]
    return simulate(RunSpec.from_mapping(base, overrides=overrides)).to_json()


def test_a_run_with_failures_takes_longer_costs_more_and_says_its_goodput() -> None:
    usual = _result(None)
    found = _result("{mean_time_between_failures: 100 h, checkpoint_time: 60 s, restart_time: 10 min}")
    assert found["step_time_s"] == usual["step_time_s"]
    run = found["run"]
    assert run["training_s"] == pytest.approx(usual["run"]["time_s"])
    assert run["time_s"] == pytest.approx(run["training_s"] / run["goodput"])
    assert run["cost_usd"] == pytest.approx(usual["run"]["cost_usd"] / run["goodput"])
    assert usual["run"]["energy_j"] < run["energy_j"] < usual["run"]["energy_j"] / run["goodput"]
    assert "goodput" not in usual["run"]


def test_a_checkpoint_is_weights_and_states_over_the_bandwidth_of_storage() -> None:
    """124 million parameters of GPT-2, fp32 masters and Adam's two fp32 states: 12 bytes each."""
    found = _result("{mean_time_between_failures: 100 h, storage_bandwidth: 100 MB/s}")
    assert found["run"]["checkpoint_time_s"] == pytest.approx(124.4e6 * 12 / 100e6, rel=0.01)


def test_a_run_that_gets_nowhere_is_one_sentence() -> None:
    with pytest.raises(InputError, match=r"system\.failures: something fails every .* gets nowhere"):
        _result("{mean_time_between_failures: 1 min, checkpoint_time: 5 h}")
    with pytest.raises(InputError, match=r"system\.failures.*give checkpoint_time or storage_bandwidth"):
        _result("{mean_time_between_failures: 1 min}")
