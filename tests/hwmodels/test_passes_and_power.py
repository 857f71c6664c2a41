"""Passes over memory, and the clock that a power limit leaves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.accelerator import load
from hwmodels.work import Gemm, Pass

A100, H100 = load("a100-sxm-80gb"), load("h100-sxm-80gb")


@given(st.floats(0, 1e10), st.floats(0, 1e10), st.sampled_from(["stream", "row", "gather", "transpose"]))
def test_a_pass_is_never_faster_than_its_bytes_and_more_bytes_are_never_faster(
    read: float, write: float, kind: str
) -> None:
    work = Pass(read, write, kind=kind)  # type: ignore[arg-type]
    cost = A100.cost(work)
    assert cost.time_s >= (read + write) / A100.memory.hbm.bandwidth_bytes_per_s
    assert A100.cost(Pass(2 * read, write, kind=kind)).time_s >= cost.time_s  # type: ignore[arg-type]
    assert cost.bytes_per_level["hbm"] == read + write


def test_a_large_addition_streams_and_a_small_one_is_all_latency() -> None:
    large, small = A100.cost(Pass(2e9, 1e9, 5e8)), A100.cost(Pass(2e3, 1e3, 5e2))
    assert 0.8 < 3e9 / large.time_s / A100.memory.hbm.bandwidth_bytes_per_s < 0.95
    assert large.limited_by == "memory"
    assert small.limited_by == "latency"


def test_a_pass_with_heavy_arithmetic_is_limited_by_it() -> None:
    plain, heavy = A100.cost(Pass(1e9, 1e9)), A100.cost(Pass(1e9, 1e9, 5e8, 4 * 5e8))
    assert heavy.time_s > 1.5 * plain.time_s
    assert heavy.limited_by == "vector"
    assert heavy.core_share > 0.9


def test_work_under_the_limit_keeps_its_clock_and_work_over_it_follows_the_cube_root() -> None:
    power, clock = H100.power, H100.clock_hz
    budget = power.limit_w - power.idle_w
    assert power.sustained_clock(budget, clock) == clock
    assert power.sustained_clock(8 / 7 * budget, clock) == pytest.approx(clock * (7 / 8) ** (1 / 3))
    assert power.sustained_clock(1e9, clock) == pytest.approx(power.lowest_clock * clock)


def test_a_500_w_part_runs_its_large_gemms_slower_than_a_700_w_part() -> None:
    work = Gemm(8192, 8192, 8192)
    clocks = {}
    for name in ("h100-sxm-80gb", "h100-sxm-96gb-hbm2e-500w"):
        chip = load(name)
        cost = chip.cost(work)
        clocks[name] = chip.power.sustained_clock(cost.energy_j / cost.time_s, chip.clock_hz)
    assert clocks["h100-sxm-80gb"] > 0.95 * H100.clock_hz
    assert 0.8 * H100.clock_hz < clocks["h100-sxm-96gb-hbm2e-500w"] < 0.95 * H100.clock_hz


def test_at_another_clock_only_what_the_clock_drives_changes() -> None:
    slow = H100.at_clock(0.8 * H100.clock_hz)
    assert slow.peak_flops("bf16") == pytest.approx(0.8 * H100.peak_flops("bf16"))
    assert slow.cost(Pass(1e9, 1e9)).time_s == pytest.approx(H100.cost(Pass(1e9, 1e9)).time_s, rel=0.05)
    assert slow.cost(Gemm(8192, 8192, 8192)).time_s > 1.2 * H100.cost(Gemm(8192, 8192, 8192)).time_s
