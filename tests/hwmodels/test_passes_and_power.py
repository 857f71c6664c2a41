"""Passes over memory, and the clock that a power limit leaves."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.accelerator import Accelerator, load
from hwmodels.units import InputError
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


def test_a_row_that_is_read_three_times_comes_from_memory_again_once_rows_in_flight_fill_the_cache() -> None:
    """Softmax of long rows moves four times its tensor instead of twice; of short rows, twice."""
    size = 2.0**30
    rows = {n: A100.cost(Pass(size, size, kind="row", row_bytes=4.0 * n, sweeps=3)) for n in (2048, 8192, 12288, 65536)}
    assert rows[2048].bytes_per_level["hbm"] == 2 * size
    assert rows[65536].bytes_per_level["hbm"] == 4 * size
    moved = [cost.bytes_per_level["hbm"] for cost in rows.values()]
    assert moved == sorted(moved)
    assert rows[65536].time_s > 1.2 * rows[2048].time_s
    larger = replace(A100.memory.sram, capacity_bytes=8 * A100.memory.sram.capacity_bytes)
    chip = replace(A100, memory=replace(A100.memory, sram=larger))
    assert chip.cost(Pass(size, size, kind="row", row_bytes=4.0 * 65536, sweeps=3)).time_s < rows[65536].time_s


def test_a_row_in_registers_is_a_stream() -> None:
    once = A100.cost(Pass(1e9, 1e9, kind="row", row_bytes=4096.0, sweeps=1)).time_s
    assert once == pytest.approx(A100.cost(Pass(1e9, 1e9)).time_s)
    assert once < A100.cost(Pass(1e9, 1e9, kind="row", row_bytes=8192.0, sweeps=3)).time_s


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


def _without_energies(name: str) -> Accelerator:
    """A library chip whose energies follow from its process and its memory's technology."""
    power = load(name).power
    limits = {"limit": f"{power.limit_w} W", "idle": f"{power.idle_w} W"}
    return load({"base": name, "set": {"power": limits}})


@pytest.mark.parametrize("name", ["v100-sxm2-16gb", "a100-sxm-80gb", "h100-sxm-80gb"])
def test_energies_from_the_process_bring_large_gemms_near_the_limit_that_was_chosen_for_them(name: str) -> None:
    """V100 213 W of 300, A100 354 W of 400, H100 702 W of 700: only active power, a sixth, knows of the limit."""
    chip = _without_energies(name)
    cost = chip.cost(Gemm(8192, 8192, 8192, format="fp16", output_format="fp16"))
    drawn = chip.idle_power_w + cost.energy_j / cost.time_s
    assert 0.7 * chip.power_limit_w < drawn < 1.1 * chip.power_limit_w


def test_a_systolic_cell_takes_what_is_left_of_a_tpu_s_measured_power() -> None:
    listed = load("tpu-v4").power.energy_per_flop_j["bf16"]  # from measured power: 0.3 pJ
    assert _without_energies("tpu-v4").power.energy_per_flop_j["bf16"] == pytest.approx(listed, rel=0.05)


def test_a_finer_process_takes_less_energy_and_so_keeps_a_higher_clock() -> None:
    work, last_energy, last_clock = Gemm(8192, 8192, 8192), 1e9, 0.0
    for process in ("28 nm", "16 nm", "7 nm", "5 nm", "3 nm"):
        chip = load({"base": "gpu-like", "set": {"process": process, "power": {"limit": "300 W"}}})
        cost = chip.cost(work)
        clock = chip.power.sustained_clock(cost.energy_j / cost.time_s, chip.clock_hz)
        assert cost.energy_j < last_energy
        assert clock >= last_clock
        last_energy, last_clock = cost.energy_j, clock
    with pytest.raises(InputError, match="process: '9 nm' is not one of"):
        load({"base": "gpu-like", "set": {"process": "9 nm"}})


def test_memory_of_another_technology_takes_another_energy() -> None:
    stacked, graphics = (
        load({"base": "gpu-like", "set": {"power": {"limit": "600 W"}, "memory.hbm": memory}}).power
        for memory in (
            {"technology": "hbm3", "stacks": 6, "capacity": "96 GiB"},
            {"technology": "gddr6", "stacks": 12, "capacity": "24 GiB"},
        )
    )
    assert stacked.energy_per_byte_j["hbm"] == pytest.approx(8 * 3.9e-12)
    assert graphics.energy_per_byte_j["hbm"] == pytest.approx(8 * 7.5e-12)


def test_an_h100_draws_far_more_than_idle_when_it_only_moves_bytes() -> None:
    """300 W in memory-bound decoding (ML.ENERGY benchmark v3): what its active power is derived from."""
    cost = H100.cost(Pass(2e9, 1e9))
    assert H100.idle_power_w + cost.energy_j / cost.time_s == pytest.approx(300, rel=0.1)


def test_below_the_lowest_voltage_power_goes_with_the_clock_alone() -> None:
    power = replace(H100.power, lowest_clock=0.01)
    budget, lowest = power.limit_w - power.idle_w, power.lowest_voltage
    at_lowest = power.sustained_clock(budget / lowest**3, 1.0)
    assert at_lowest == pytest.approx(lowest)
    assert power.sustained_clock(2 * budget / lowest**3, 1.0) == pytest.approx(lowest / 2)
    assert power.voltage(0.1) == lowest
    assert power.voltage(0.9) == 0.9


@given(st.floats(1.0, 5000.0), st.floats(200.0, 1000.0), st.floats(1.0, 2.0))
def test_the_clock_keeps_the_limit_and_more_limit_or_less_power_is_never_slower(
    core: float, limit: float, more: float
) -> None:
    power = replace(H100.power, limit_w=limit, lowest_clock=1e-6)
    clock = power.sustained_clock(core, 1.0)
    drawn = power.idle_w + core * clock * power.voltage(clock) ** 2
    assert drawn <= limit * (1 + 1e-9)
    assert clock == 1.0 or drawn == pytest.approx(limit)
    assert replace(power, limit_w=limit * more).sustained_clock(core, 1.0) >= clock
    assert power.sustained_clock(core * more, 1.0) <= clock


def test_at_another_clock_only_what_the_clock_drives_changes() -> None:
    slow = H100.at_clock(0.8 * H100.clock_hz)
    assert slow.peak_flops("bf16") == pytest.approx(0.8 * H100.peak_flops("bf16"))
    assert slow.cost(Pass(1e9, 1e9)).time_s == pytest.approx(H100.cost(Pass(1e9, 1e9)).time_s, rel=0.05)
    assert slow.cost(Gemm(8192, 8192, 8192)).time_s > 1.2 * H100.cost(Gemm(8192, 8192, 8192)).time_s
