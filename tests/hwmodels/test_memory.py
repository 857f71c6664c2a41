"""DRAM: what of its pins each way of walking through it sustains, against closed forms and published measurements."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.accelerator import load, names
from hwmodels.memory.hbm import KINDS, Hbm, interface_bytes_per_s, refresh_share, rows_share, turnaround_share
from hwmodels.memory.technologies import TECHNOLOGIES
from hwmodels.units import InputError
from hwmodels.work import Pass

NAMES = sorted(TECHNOLOGIES)
kinds, technologies = st.sampled_from(KINDS), st.sampled_from(NAMES)


def memory(technology: str, stacks: int = 4, rate: float = 1.0) -> Hbm:
    """Uncalibrated memory at a share of its usual pin rate."""
    pins = interface_bytes_per_s(technology, stacks)
    return Hbm(technology, stacks, 1e10, pins * rate, latency_s=3e-7)


@pytest.mark.parametrize(
    ("technology", "bytes_per_s"),
    [  # of one stack or chip, as the JEDEC announcements and vendors print it
        ("hbm2", 307e9),
        ("hbm2e", 410e9),
        ("hbm3", 819e9),
        ("hbm4", 2048e9),
        ("gddr5", 32e9),
        ("gddr6", 64e9),
        ("gddr6x", 84e9),
        ("gddr7", 128e9),
        ("lpddr5", 12.8e9),
        ("ddr4", 25.6e9),
        ("ddr5", 38.4e9),
    ],
)
def test_one_unit_has_the_bandwidth_that_its_standard_announces(technology: str, bytes_per_s: float) -> None:
    assert interface_bytes_per_s(technology, 1) == pytest.approx(bytes_per_s, rel=0.005)


@pytest.mark.parametrize("technology", NAMES)
def test_a_read_of_whole_pages_loses_refresh_alone(technology: str) -> None:
    unit = TECHNOLOGIES[technology]
    lost = 1.0 - memory(technology).fraction("stream", write_share=0.0)
    assert lost == pytest.approx(unit.refresh_s / unit.refresh_interval_s)


def test_a_copy_on_hbm2_loses_one_turnaround_per_two_full_write_buffers() -> None:
    """64 bursts of 32 bytes each way at 19.2 GB/s take 213 ns; the bus turns round once for both, 22 ns."""
    share = turnaround_share(TECHNOLOGIES["hbm2"], 19.2e9, 0.5)
    assert share == pytest.approx(2 * 64 * 32 / 19.2e9 / (2 * 64 * 32 / 19.2e9 + 22e-9))


def test_single_bursts_from_random_rows_are_limited_by_four_activations_per_window() -> None:
    unit = TECHNOLOGIES["hbm2"]
    assert rows_share(unit, 19.2e9, 32) == pytest.approx(4 * 32 / 15e-9 / 19.2e9)
    assert rows_share(unit, 19.2e9, unit.page_bytes) == 1.0


@given(technologies, kinds, st.floats(0.1, 1.0), st.floats(0.0, 1.0))
def test_no_walk_is_faster_than_the_pins(technology: str, kind: str, rate: float, writes: float) -> None:
    part = memory(technology, rate=rate)
    assert 0.0 < part.rate(kind, writes) <= part.bandwidth_bytes_per_s


@given(technologies, kinds, st.floats(0.1, 1.0), st.floats(1.0, 4.0))
def test_more_bandwidth_and_more_channels_are_never_slower(
    technology: str, kind: str, rate: float, more: float
) -> None:
    part = memory(technology, rate=rate)
    faster = replace(part, bandwidth_bytes_per_s=part.bandwidth_bytes_per_s * more)
    assert faster.rate(kind) >= part.rate(kind) * (1 - 1e-12)
    channels = part.stacks * TECHNOLOGIES[technology].channels
    wider = replace(part, channels=int(channels * more))
    assert wider.rate(kind) >= part.rate(kind) * (1 - 1e-12)


@given(technologies, kinds, st.floats(0.0, 0.5), st.floats(0.0, 0.5))
def test_a_mix_nearer_to_half_is_never_faster(technology: str, kind: str, one: float, other: float) -> None:
    part, fewer, more = memory(technology), min(one, other), max(one, other)
    assert part.rate(kind, more) <= part.rate(kind, fewer)
    assert part.rate(kind, 1.0 - more) == pytest.approx(part.rate(kind, more))


@given(technologies, kinds)
def test_longer_refresh_and_more_latency_with_few_bytes_in_flight_are_slower(technology: str, kind: str) -> None:
    part = replace(memory(technology), in_flight_bytes=4096.0)
    assert part.rate(kind) <= 4096.0 / part.latency_s  # Little's law
    assert replace(part, latency_s=2 * part.latency_s).rate(kind) <= part.rate(kind)
    unit = TECHNOLOGIES[technology]
    assert refresh_share(replace(unit, refresh_s=2 * unit.refresh_s)) < refresh_share(unit)


def test_a_gather_is_never_faster_than_a_stream() -> None:
    for technology in NAMES:
        part = memory(technology)
        assert part.rate("transpose", 0.3) <= part.rate("gather", 0.3) <= part.rate("stream", 0.3)


# Sustained fraction of elementwise additions: calibrated from published kernels, and so never an input of the model.
MEASURED = {"v100-sxm2-16gb": 0.916, "a100-sxm-80gb": 0.880, "h100-sxm-80gb": 0.95}


@pytest.mark.parametrize("name", MEASURED)
def test_timings_alone_come_near_the_measured_fraction_of_an_addition(name: str) -> None:
    """Errors: V100 -0.3 %, A100 -0.1 %, H100 -7 %."""
    physical = replace(load(name).memory.hbm, sustained={}).fraction("stream")
    assert physical == pytest.approx(MEASURED[name], rel=0.08)


def test_a_chip_without_measurements_takes_its_timings_and_a_measured_one_its_measurement() -> None:
    a100 = load("a100-sxm-80gb").memory.hbm
    assert a100.rate("stream") == a100.sustained["stream"] * a100.bandwidth_bytes_per_s
    assert "gather" not in a100.sustained
    assert a100.rate("gather") == pytest.approx(a100.fraction("gather") * a100.bandwidth_bytes_per_s)


def test_a_pass_that_writes_as_much_as_it_reads_takes_longer_than_one_that_reads() -> None:
    chip = load({"base": "a100-sxm-80gb", "set": {"calibration": {}}})
    assert chip.cost(Pass(2e9, 0.0)).time_s < chip.cost(Pass(1e9, 1e9)).time_s


def _chip(**hbm: object) -> Hbm:
    return load({"base": "a100-sxm-80gb", "set": {f"memory.hbm.{key}": value for key, value in hbm.items()}}).memory.hbm


def test_pins_give_the_bandwidth_where_the_file_does_not() -> None:
    part = _chip(bandwidth=None, pin_rate="3.0 Gb/s", stacks=4)
    assert part.bandwidth_bytes_per_s == pytest.approx(4 * 1024 * 3e9 / 8)
    narrow = _chip(bandwidth=None, bus_width=512, technology="gddr6")
    assert narrow.bandwidth_bytes_per_s == pytest.approx(512 * 16e9 / 8)
    assert narrow.channels == 32


@pytest.mark.parametrize("change", [{"pin_rate": "3.0 Gb/s"}, {"bus_width": 4096}])
def test_a_bandwidth_above_the_pins_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"memory\.hbm\.bandwidth: .* is more than the .* pins of hbm2e"):
        _chip(**change)


def test_a_bandwidth_that_no_pins_are_given_for_is_taken_as_it_is() -> None:
    assert _chip(bandwidth="9 TB/s").bandwidth_bytes_per_s == 9e12


@pytest.mark.parametrize("name", names())
def test_no_datasheet_of_the_library_exceeds_the_fastest_pins_that_are_sold(name: str) -> None:
    part = load(name).memory.hbm
    unit = TECHNOLOGIES[part.technology]
    assert part.bandwidth_bytes_per_s <= 1.01 * part.stacks * unit.pins * unit.fastest_pin_bits_per_s / 8


def test_few_bytes_in_flight_limit_a_chip_by_its_latency() -> None:
    few = _chip(in_flight="64 KiB", latency="500 ns")
    assert few.rate("stream") == pytest.approx(65536 / 500e-9)
