"""On-chip levels: what of a product's operands they keep, their banks, and caches behind caches."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels.accelerator import Accelerator, load
from hwmodels.memory.sram import Sram
from hwmodels.number_formats import bytes_of
from hwmodels.units import InputError
from hwmodels.work import Attention, Gemm, Pass

GPU, ARRAYS = load("a100-sxm-80gb"), load("systolic-edge")
LEVELS = [{"size": "8 MiB", "bandwidth": "8 TB/s"}, {"size": "128 MiB", "bandwidth": "5 TB/s"}]

sizes = st.integers(1, 20000)
works = st.builds(Gemm, sizes, sizes, sizes, st.sampled_from([1, 3]))
chips = st.sampled_from([GPU, ARRAYS])
capacities = st.integers(14, 30).map(lambda power: 2.0**power)


def with_capacity(chip: Accelerator, capacity: float) -> Accelerator:
    sram = replace(chip.memory.sram, capacity_bytes=capacity)
    return replace(chip, memory=replace(chip.memory, sram=sram))


def compulsory(work: Gemm) -> float:
    element, out = bytes_of(work.format), bytes_of(work.output_format)
    return work.batch * (element * work.k * (work.m + work.n) + out * work.m * work.n)


def no_reuse(work: Gemm) -> float:
    """Every multiplication reads both operands; every partial sum is written and read in fp32."""
    return work.batch * work.m * work.n * (work.k * (2.0 * bytes_of(work.format) + 8.0) + bytes_of(work.output_format))


@given(chips, works, capacities)
def test_traffic_of_every_level_is_between_compulsory_and_no_reuse(
    chip: Accelerator, work: Gemm, capacity: float
) -> None:
    moved = with_capacity(chip, capacity).cost(work).bytes_per_level
    for level in ("hbm", chip.matrix.shared_level):
        assert moved[level] >= compulsory(work) * (1 - 1e-12)
    assert moved["hbm"] <= max(no_reuse(work), 16.0 * compulsory(work))


@given(chips, works, capacities, st.integers(1, 64))
def test_more_capacity_never_moves_more_from_memory(chip: Accelerator, work: Gemm, capacity: float, more: int) -> None:
    small, large = with_capacity(chip, capacity), with_capacity(chip, capacity * more)
    assert large.cost(work).time_s <= small.cost(work).time_s * (1 + 1e-12)
    assert large.cost(work).bytes_per_level["hbm"] <= small.cost(work).bytes_per_level["hbm"]


def test_banks_give_the_bandwidth_where_the_file_does_not() -> None:
    chip = load(
        {"base": "systolic-edge", "set": {"memory.sram": {"size": "16 MiB", "banks": 128, "bank_width": "16 B"}}}
    )
    assert chip.memory.sram.bandwidth_bytes_per_s == 128 * 16 * 1.0e9
    with pytest.raises(InputError, match=r"memory\.sram\.bandwidth: 4 TB/s is more than the 2.048 TB/s of 128 banks"):
        load({"base": "systolic-edge", "set": {"memory.sram.banks": 128, "memory.sram.bank_width": "16 B"}})


@given(st.integers(1, 64), st.integers(1, 200))
def test_a_strided_walk_meets_as_many_conflicts_as_brute_force_counts(banks: int, step: int) -> None:
    part = Sram(1e6, 1e12, banks=banks, bank_bytes=16.0)
    visited = [access * step % banks for access in range(banks)]
    busiest = max(visited.count(bank) for bank in set(visited))
    assert part.conflict_ways(step * 16.0) == busiest


def test_a_transpose_through_few_banks_is_slower_and_padding_avoids_conflicts_of_powers_of_two() -> None:
    even = Sram(1e6, 1e12, banks=64, bank_bytes=32.0)
    assert even.rate("transpose") == even.rate("stream")
    six = Sram(1e6, 1e12, banks=6, bank_bytes=32.0)  # rows of two or of three banks
    assert six.rate("transpose") == six.rate("stream") / 2


def test_a_pass_takes_at_least_its_bytes_through_every_level() -> None:
    narrow = {"base": "systolic-edge", "set": {"memory.sram": [LEVELS[0], {"size": "1 GiB", "bandwidth": "100 GB/s"}]}}
    cost = load(narrow).cost(Pass(1e9, 1e9))
    assert cost.time_s >= 2e9 / 100e9
    assert cost.limited_by == "llc"


def two_levels(base: str = "a100-sxm-80gb", **changes: object) -> Accelerator:
    behind = {**LEVELS[1], **changes}
    return load({"base": base, "set": {"memory.sram": [LEVELS[0], behind]}})


BASES = ("a100-sxm-80gb", "systolic-edge")
ONE = {base: load({"base": base, "set": {"memory.sram": LEVELS[0]}}) for base in BASES}
BOTH = {base: two_levels(base) for base in BASES}


@given(st.sampled_from(BASES), works)
def test_a_cache_behind_a_cache_takes_traffic_off_memory_and_none_off_itself(base: str, work: Gemm) -> None:
    one, both = ONE[base], BOTH[base]
    moved = both.cost(work).bytes_per_level
    assert moved["llc"] >= compulsory(work) * (1 - 1e-12)
    assert moved["hbm"] >= compulsory(work) * (1 - 1e-12)
    assert both.cost(work).time_s <= one.cost(work).time_s * (1 + 1e-9)


def test_a_cache_as_fast_as_memory_and_no_larger_than_the_one_before_changes_only_the_count() -> None:
    work = Gemm(16384, 16384, 16384)
    one = ONE["systolic-edge"]
    same = two_levels("systolic-edge", size="8 MiB")
    assert same.cost(work).bytes_per_level["hbm"] == one.cost(work).bytes_per_level["hbm"]
    assert same.cost(work).bytes_per_level["llc"] == one.cost(work).bytes_per_level["hbm"]
    assert same.cost(work).time_s == pytest.approx(one.cost(work).time_s)


@given(st.floats(0.01, 1.0), works)
def test_a_slower_last_level_is_never_faster(share: float, work: Gemm) -> None:
    fast = BOTH["a100-sxm-80gb"]
    behind = replace(fast.memory.behind[0], bandwidth_bytes_per_s=5e12 * share)
    slow = replace(fast, memory=replace(fast.memory, behind=(behind,)))
    assert slow.cost(work).time_s >= fast.cost(work).time_s * (1 - 1e-12)


def test_attention_goes_through_every_level() -> None:
    work = Attention("flash-2", "forward", 4, 32, 32, 4096, 4096, 128, True)
    assert two_levels().cost(work).bytes_per_level["llc"] == two_levels().cost(work).bytes_per_level["hbm"]
    starved = two_levels(bandwidth="10 GB/s").cost(work)
    assert starved.limited_by == "llc"
    assert math.isclose(starved.time_s, starved.bytes_per_level["llc"] / 10e9, rel_tol=0.05)


def test_a_slower_clock_slows_every_level_on_the_chip() -> None:
    half = two_levels().at_clock(two_levels().clock_hz / 2)
    assert half.memory.behind[0].bandwidth_bytes_per_s == 2.5e12
