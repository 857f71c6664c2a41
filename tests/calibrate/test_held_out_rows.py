"""The library's constants on the half of the published rows that they were not fitted to."""

from dataclasses import replace
from pathlib import Path

import pytest

from cosim.calibrate.fit import Errors, Free, errors, fit, price
from cosim.calibrate.gemm import gemm_rows
from cosim.calibrate.passes import pass_rows
from cosim.calibrate.rows import Row, in_fitted_half, read_collectives, read_kernels
from hwmodels.accelerator import load
from hwmodels.cluster import Cluster
from hwmodels.matrix_units.tensor_core import TensorCore
from hwmodels.units import InputError
from hwmodels.work import Attention, Collective, Gemm

PUBLISHED = Path(__file__).parents[2] / "cosim" / "validate" / "published"
CHIPS = {
    name: load(name)
    for name in (
        *("a100-sxm-80gb", "a100-pcie-80gb", "a100-pcie-40gb", "h100-sxm-80gb"),
        *("v100-sxm2-16gb", "v100-pcie-32gb"),
    )
}


@pytest.fixture(scope="module")
def kernels() -> list[Row]:
    return read_kernels(PUBLISHED / "kernels.csv")


def held_out(rows: list[Row]) -> Errors:
    return errors(lambda row: price(CHIPS[row.accelerator], row), [row for row in rows if not row.fitted])


@pytest.mark.parametrize(
    ("chip", "source"),
    [
        ("a100-sxm-80gb", "vidur"),
        ("a100-pcie-80gb", "simumax"),
        ("a100-sxm-80gb", "llmcompass"),
        ("h100-sxm-80gb", "vidur"),
    ],
)
def test_gemms_of_16_bits_are_within_ten_percent(kernels: list[Row], chip: str, source: str) -> None:
    found = held_out(gemm_rows(kernels, {chip: CHIPS[chip]}, source))
    assert found.rows >= 6
    assert found.mean <= 0.10


def test_the_power_limit_brings_the_300_w_part_to_its_measured_gemms(kernels: list[Row]) -> None:
    """Constants of the 400 W part and the cube-root law, against SimuMax's large GEMMs on PCIe: no fit of the clock."""
    chip = CHIPS["a100-pcie-80gb"]
    ratios = []
    for row in gemm_rows(kernels, {chip.name: chip}, "simumax"):
        cost = chip.cost(row.works[0])  # type: ignore[arg-type]
        if cost.flops > 1e12:
            clock = chip.power.sustained_clock(cost.energy_j / cost.time_s, chip.clock_hz)
            ratios.append(price(chip.at_clock(clock), row) / row.time_s)
    assert len(ratios) > 10
    assert 0.93 < sum(ratios) / len(ratios) < 1.07


def test_gemms_of_fp32_on_the_lanes_are_within_fifteen_percent(kernels: list[Row]) -> None:
    found = held_out(gemm_rows(kernels, CHIPS, "neusight", ("fp32",)))
    assert found.rows > 100
    assert found.mean <= 0.15


ALGORITHMS = [
    *[("a100-sxm-80gb", name) for name in ("flash-1", "flash-2", "flash-triton")],
    *[("h100-sxm-80gb", name) for name in ("flash-1", "flash-2", "flash-3", "flash-triton", "cudnn")],
]


@pytest.mark.parametrize(("chip", "algorithm"), ALGORITHMS)
def test_attention_is_within_ten_percent(kernels: list[Row], chip: str, algorithm: str) -> None:
    found = held_out([row for row in kernels if row.label == algorithm and row.accelerator == chip])
    assert found.rows >= 8
    assert found.mean <= 0.10


@pytest.mark.parametrize("op", ["elementwise_add", "elementwise_gelu", "softmax"])
@pytest.mark.parametrize("chip", ["a100-sxm-80gb", "a100-pcie-40gb", "h100-sxm-80gb", "v100-pcie-32gb"])
def test_streams_gelu_and_softmax_are_within_fifteen_percent(kernels: list[Row], chip: str, op: str) -> None:
    for source, rows in pass_rows(kernels, {chip: CHIPS[chip]}, op).items():
        assert held_out(rows).mean <= 0.15, source


@pytest.mark.parametrize(("chip", "system"), [("a100-sxm-80gb", "a100_node"), ("h100-sxm-80gb", "h100_dgx")])
def test_all_reduces_of_a_mebibyte_and_more_are_within_twelve_percent(chip: str, system: str) -> None:
    cluster = Cluster.build(CHIPS[chip], 8, 8)

    def seconds(row: Row) -> float:
        work = row.works[0]
        assert isinstance(work, Collective)
        return cluster.collective_cost(work).time_s

    rows = [
        row for row in read_collectives(PUBLISHED / "collectives.csv") if (row.label, row.op) == (system, "all_reduce")
    ]
    found = errors(seconds, [row for row in rows if not row.fitted and row.works[0].bytes >= 2**20])  # type: ignore[union-attr]
    assert found.rows > 30
    assert found.mean <= 0.12


def test_a_hash_of_the_id_halves_the_rows(kernels: list[Row]) -> None:
    assert 0.45 < sum(row.fitted for row in kernels) / len(kernels) < 0.55
    assert [in_fitted_half(f"k-{n}") for n in range(8)] == [in_fitted_half(f"k-{n}") for n in range(8)]


def test_rows_become_the_work_that_was_timed(kernels: list[Row]) -> None:
    """A GEMM row's printed TFLOP/s and time, and an attention row's, give the FLOPs of the work that we price."""
    gemm = next(row for row in kernels if row.source == "vidur" and row.op == "gemm")
    work = gemm.works[0]
    assert isinstance(work, Gemm)
    assert 2 * work.m * work.n * work.k / gemm.time_s == pytest.approx(1.5487e12, rel=1e-3)
    both = next(row for row in kernels if row.op == "attention_fwd_bwd" and row.label == "flash-2")
    assert [work.phase for work in both.works if isinstance(work, Attention)] == ["forward", "backward"]
    flops = sum(CHIPS["a100-sxm-80gb"].cost(work).flops for work in both.works if isinstance(work, Attention))
    assert 20e12 < flops / both.time_s < 312e12


def test_a_fit_finds_the_constant_that_made_the_rows() -> None:
    """Rows made with efficiency 0.6: half of them suffice to find it, and the other half is then predicted exactly."""
    chip = load("a100-sxm-80gb")

    def with_efficiency(value: float):  # type: ignore[no-untyped-def]
        assert isinstance(chip.matrix, TensorCore)
        constants = replace(chip.matrix.constants, efficiency=value)
        return replace(chip, matrices=(replace(chip.matrix, constants=constants),))

    truth = with_efficiency(0.6)
    works = [Gemm(1024 * (1 + n % 4), 2048 + 128 * n, 4096) for n in range(24)]
    rows = [
        Row(f"made-{n}", "made", chip.name, "gemm", (work,), truth.cost(work).time_s, in_fitted_half(f"made-{n}"))
        for n, work in enumerate(works)
    ]

    def model(values: dict[str, float]):  # type: ignore[no-untyped-def]
        candidate = with_efficiency(values["efficiency"])
        return lambda row: price(candidate, row)

    found = fit({"efficiency": Free(0.8, 0.3, 1.0)}, model, rows)
    assert found.values["efficiency"] == pytest.approx(0.6, rel=1e-3)
    assert found.held_out.mean < 1e-3


def test_a_missing_table_or_column_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_kernels(tmp_path / "none.csv")
    (tmp_path / "wrong.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="has no column 'op'; its columns are a, b"):
        read_kernels(tmp_path / "wrong.csv")
