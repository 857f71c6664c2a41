"""GEMM on tensor cores: bounded by peak and compulsory traffic, and monotone in what physics says it is."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.accelerator import Accelerator, load
from hwmodels.units import InputError
from hwmodels.work import Gemm

A100, H100 = load("a100-sxm-80gb"), load("h100-sxm-80gb")
SIZES = st.integers(1, 1024).map(lambda n: 8 * n)
GEMMS = st.builds(Gemm, m=SIZES, n=SIZES, k=SIZES, batch=st.integers(1, 16))
CHIPS = st.sampled_from([A100, H100])


def with_bandwidth(chip: Accelerator, factor: float) -> Accelerator:
    hbm = replace(chip.memory.hbm, bandwidth_bytes_per_s=chip.memory.hbm.bandwidth_bytes_per_s * factor)
    return replace(chip, memory=replace(chip.memory, hbm=hbm))


@given(CHIPS, GEMMS)
@settings(max_examples=200, deadline=None)
def test_never_faster_than_peak_nor_than_its_compulsory_bytes(chip: Accelerator, work: Gemm) -> None:
    cost = chip.cost(work)
    compulsory = 2 * work.batch * (work.m * work.k + work.k * work.n + work.m * work.n)
    no_reuse = 2 * work.batch * (2 * work.m * work.n * work.k + work.m * work.n)
    assert cost.flops == 2 * work.batch * work.m * work.n * work.k
    assert cost.time_s >= cost.flops / chip.peak_flops("bf16")
    assert cost.time_s >= compulsory / chip.memory.hbm.bandwidth_bytes_per_s
    assert compulsory <= cost.bytes_per_level["hbm"] <= max(no_reuse, 10 * compulsory)
    assert compulsory <= cost.bytes_per_level["l2"] * (1 + 1e-12)
    assert 0 <= cost.core_share <= 1
    assert 0 <= cost.memory_share <= 1
    assert cost.energy_j > 0


@given(CHIPS, GEMMS, st.floats(1.0, 4.0))
@settings(max_examples=100, deadline=None)
def test_more_bandwidth_or_more_clock_is_never_slower(chip: Accelerator, work: Gemm, factor: float) -> None:
    alone = chip.cost(work).time_s
    assert with_bandwidth(chip, factor).cost(work).time_s <= alone * (1 + 1e-12)
    assert chip.at_clock(chip.clock_hz * factor).cost(work).time_s <= alone * (1 + 1e-12)


@given(CHIPS, GEMMS, st.sampled_from(["m", "n", "k", "batch"]))
@settings(max_examples=100, deadline=None)
def test_a_doubled_dimension_is_not_faster_beyond_tile_noise(chip: Accelerator, work: Gemm, dimension: str) -> None:
    larger = replace(work, **{dimension: 2 * getattr(work, dimension)})
    assert chip.cost(larger).time_s >= 0.9 * chip.cost(work).time_s


def test_one_tile_more_than_a_full_wave_costs_part_of_a_wave() -> None:
    """108 cores: 108 tiles of 256 x 128 are one wave; one tile more makes the GEMM slower by more than its share."""
    wave, more = Gemm(256 * 12, 128 * 9, 8192), Gemm(256 * 12, 128 * 10, 8192)
    assert A100.cost(more).time_s / A100.cost(wave).time_s > 1.15


def test_a_small_grid_with_a_long_k_is_split() -> None:
    """256 x 256 x 65536 has 2 to 16 tiles; without splitting k it would use a tenth of the chip at best."""
    cost = A100.cost(Gemm(256, 256, 65536))
    assert cost.flops / cost.time_s > 0.2 * A100.peak_flops("bf16")


def test_unaligned_16_bit_operands_leave_the_fast_path_and_fp32_is_on_the_lanes() -> None:
    aligned, odd = A100.cost(Gemm(4096, 4096, 4096)), A100.cost(Gemm(4096, 4096, 4095))
    assert odd.time_s > 1.5 * aligned.time_s
    single = A100.cost(Gemm(4096, 4096, 4096, format="fp32", output_format="fp32"))
    assert 0.6 * 19.5e12 < single.flops / single.time_s < 19.5e12
    with pytest.raises(InputError, match="does not compute in fp8"):
        A100.cost(Gemm(64, 64, 64, format="fp8"))


def test_a_weight_gradient_of_odd_tokens_is_aligned_in_memory() -> None:
    """In layout NT the tokens are k, which is not contiguous: only m and n have to be multiples of 8."""
    odd, even = H100.cost(Gemm(4096, 4096, 4095, layout="NT")), H100.cost(Gemm(4096, 4096, 4096, layout="NT"))
    assert odd.time_s == pytest.approx(even.time_s, rel=0.01)


def test_shared_memory_bounds_the_tile() -> None:
    """Three stages of 64 bytes of k: 256 x 128 needs 72 KiB, 64 x 64 needs 24."""
    work = Gemm(8192, 8192, 8192)
    times = []
    for size in (24, 32, 64, 96, 228):
        matrix = replace(H100.matrix, shared_memory_bytes=size * 1024.0)  # type: ignore[type-var]
        times.append(replace(H100, matrices=(matrix,)).cost(work).time_s)
    assert times == sorted(times, reverse=True)
    assert times[0] > 1.3 * times[-1]
    assert times[-2] == times[-1]


def test_a_short_sum_on_the_lanes_waits_for_its_operands_no_longer_than_on_tensor_cores() -> None:
    """Filling the pipeline is a latency: a batch of fp32 products with k = 64 keeps half of the lanes' long-k rate."""
    short, long = (Gemm(256, 256, k, 512, "fp32", "fp32") for k in (64, 4096))
    rates = [A100.cost(work).flops / A100.cost(work).time_s for work in (short, long)]
    assert rates[0] > 0.5 * rates[1]


def test_tiny_and_senseless_sizes() -> None:
    assert 0 < A100.cost(Gemm(1, 1, 1)).time_s < 1e-4
    with pytest.raises(InputError, match="every size must be at least 1"):
        A100.cost(Gemm(0, 4, 4))


def test_best_shapes_of_the_public_search_are_an_envelope() -> None:
    """ml-engineering's search: 0.87 of peak on A100 SXM and 0.80 on H100 is the best that any shape reaches."""
    for chip, best in ((A100, 0.87), (H100, 0.81)):
        reached = max(
            chip.cost(w).flops / chip.cost(w).time_s for w in (Gemm(n, n, n) for n in range(2048, 16385, 1024))
        )
        assert 0.6 < reached / chip.peak_flops("bf16") <= best
