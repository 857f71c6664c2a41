"""2:4 sparse weights and block-scaled formats on matrix units, against counts of bits and what vendors print."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.accelerator import load
from hwmodels.units import InputError
from hwmodels.work import Gemm

A100, H100, B200 = load("a100-sxm-80gb"), load("h100-sxm-80gb"), load("b200-sxm")
SIZES = st.integers(1, 256).map(lambda n: 32 * n)


def sparse(work: Gemm) -> Gemm:
    return replace(work, sparsity="2:4")


def test_compressed_weights_take_nine_sixteenths_in_sixteen_bit() -> None:
    """Half of the values and two bits for each that is kept: 0.5625 of bf16, 0.625 of 8 bit (arXiv 2104.08378, 3.1)."""
    work = sparse(Gemm(64, 64, 64))
    assert work.compressed_bytes(2.0) / 2.0 == 0.5625
    assert work.compressed_bytes(1.0) == 0.625


def test_a_large_product_is_up_to_twice_as_fast() -> None:
    large = Gemm(8192, 8192, 8192)
    for chip in (A100, H100, B200):
        ratio = chip.cost(large).time_s / chip.cost(sparse(large)).time_s
        assert 1.7 < ratio <= 2.0
        assert chip.cost(sparse(large)).flops == chip.cost(large).flops / 2


@given(SIZES, SIZES, SIZES)
@settings(max_examples=100, deadline=None)
def test_sparse_is_never_slower_and_never_under_its_compressed_bytes(m: int, n: int, k: int) -> None:
    dense, thin = H100.cost(Gemm(m, n, k)), H100.cost(sparse(Gemm(m, n, k)))
    assert thin.time_s <= dense.time_s * (1 + 1e-12)
    assert thin.bytes_per_level["hbm"] >= 2 * m * k + 1.125 * k * n + 2 * m * n
    assert thin.energy_j < dense.energy_j


def test_reading_weights_alone_gains_their_compression() -> None:
    """One row: the time is the weights' bytes."""
    work = Gemm(1, 16384, 16384)
    bytes_of = {s: H100.cost(replace(work, sparsity=s)).bytes_per_level["hbm"] for s in ("dense", "2:4")}  # type: ignore[arg-type]
    assert bytes_of["2:4"] / bytes_of["dense"] == pytest.approx(0.5625, abs=0.001)


def test_units_without_sparsity_refuse_it_in_a_sentence() -> None:
    for name in ("v100-sxm2-16gb", "systolic-edge"):
        with pytest.raises(InputError, match="no 2:4 structured sparsity"):
            load(name).cost(Gemm(64, 64, 64, format="fp16" if name.startswith("v") else "bf16", sparsity="2:4"))


def test_a_unit_multiplies_block_scaled_formats_only_if_it_applies_scales() -> None:
    assert B200.peak_flops("mxfp8") == B200.peak_flops("fp8")
    assert B200.peak_flops("nvfp4") == B200.peak_flops("fp4")
    for name in ("mxfp8", "mxfp4", "nvfp4"):
        with pytest.raises(InputError, match=f"h100-sxm-80gb does not compute in {name}; it has"):
            H100.peak_flops(name)
    assert H100.peak_flops("fp8_block128") == H100.peak_flops("fp8")  # its fp32 scales are applied outside the unit


def test_the_rate_of_block_scaled_formats_is_the_files() -> None:
    slower = load({"base": "b200-sxm", "set": {"matrix.block_scaled.mxfp8": 0.5}})
    assert slower.peak_flops("mxfp8") == B200.peak_flops("fp8") / 2
    work = Gemm(8192, 8192, 8192, format="mxfp8")
    assert slower.cost(work).time_s > 1.8 * B200.cost(work).time_s


@pytest.mark.parametrize("format", ["mxfp8", "nvfp4", "mxfp4", "fp8"])
def test_scales_do_not_make_a_product_unaligned(format: str) -> None:
    """16 bytes are 16 elements of eight bits and 32 of four: what counts is the elements' bits."""
    at, beside = (B200.cost(Gemm(4096, 4096, k, format=format)).time_s for k in (4096, 4098))
    assert beside > 1.5 * at


@pytest.mark.parametrize("format", ["fp6", "fp6_e2m3", "mxfp6"])
def test_rows_of_whole_loads_of_six_bits_are_aligned(format: str) -> None:
    """64 elements of six bits are three loads of 16 bytes: the least number of elements that fills whole loads."""
    chip = load("mi355x")
    best = chip.cost(Gemm(8192, 8192, 8192, format=format)).time_s
    assert chip.cost(Gemm(8192, 8192, 8192 + 64, format=format)).time_s < 1.1 * best
    assert chip.cost(Gemm(8192, 8192, 8192 + 21, format=format)).time_s > 1.5 * best
    assert best <= 1.01 * chip.cost(Gemm(8192, 8192, 8192, format="fp8")).time_s


def test_bytes_of_operands_hold_their_scales() -> None:
    """Once through HBM: 4.5 bits an element of both operands, 16 of the result."""
    work = Gemm(128, 128, 4096, format="nvfp4")
    assert B200.cost(work).bytes_per_level["hbm"] == 2 * 128 * 4096 * 4.5 / 8 + 128 * 128 * 2
