"""Time and traffic of work on chips with systolic arrays: physical bounds, directions, and what the files say."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hwmodels.accelerator import Accelerator, load
from hwmodels.matrix_units.systolic_array import DATAFLOWS, SystolicArray
from hwmodels.units import InputError
from hwmodels.work import Attention, Gemm, Pass, Phase

V5P, EDGE = load("tpu-v5p"), load("systolic-edge")
OS, WS, IS = DATAFLOWS


def chip(rows: int, columns: int, count: int, dataflow: str, double: bool, sram: float, near: float) -> Accelerator:
    """The template with other arrays and another SRAM (bytes, bytes per second)."""
    unit = SystolicArray(rows, columns, count, dataflow, EDGE.clock_hz, {"bf16": 1.0}, double)
    memory = replace(EDGE.memory, sram=replace(EDGE.memory.sram, capacity_bytes=sram, bandwidth_bytes_per_s=near))
    return replace(EDGE, matrices=(unit,), memory=memory)


CHIPS = st.builds(
    chip,
    st.integers(1, 256),
    st.integers(1, 256),
    st.integers(1, 8),
    st.sampled_from(DATAFLOWS),
    st.booleans(),
    st.floats(64.0, 2.0**27),
    st.floats(1e10, 1e14),
)
SIZES = st.integers(1, 5000)
GEMMS = st.builds(Gemm, m=SIZES, n=SIZES, k=SIZES, batch=st.integers(1, 4))


def with_hbm(device: Accelerator, factor: float) -> Accelerator:
    hbm = replace(device.memory.hbm, bandwidth_bytes_per_s=device.memory.hbm.bandwidth_bytes_per_s * factor)
    return replace(device, memory=replace(device.memory, hbm=hbm))


def with_sram(device: Accelerator, size: float, bandwidth: float) -> Accelerator:
    sram = device.memory.sram
    larger = replace(
        sram,
        capacity_bytes=sram.capacity_bytes * size,
        bandwidth_bytes_per_s=sram.bandwidth_bytes_per_s * bandwidth,
    )
    return replace(device, memory=replace(device.memory, sram=larger))


@given(CHIPS, GEMMS)
@settings(max_examples=300, deadline=None)
def test_traffic_is_between_compulsory_and_no_reuse_and_time_no_less_than_any_pipeline(
    device: Accelerator, work: Gemm
) -> None:
    cost = device.cost(work)
    m, n, k = work.m, work.n, work.k
    compulsory = 2 * work.batch * (m * k + k * n + m * n)
    products = work.batch * m * n * k
    hbm, sram = cost.bytes_per_level["hbm"], cost.bytes_per_level["sram"]
    assert compulsory <= hbm <= 2 * (2 * products + work.batch * m * n)
    assert compulsory <= sram <= 2 * 2 * products + 2 * 4 * products + 2 * work.batch * m * n
    assert cost.flops == 2 * products
    assert cost.cycles is not None
    assert cost.time_s >= cost.cycles / device.clock_hz >= cost.flops / device.peak_flops("bf16") * (1 - 1e-12)
    assert cost.time_s >= hbm / device.memory.hbm.bandwidth_bytes_per_s
    assert cost.time_s >= sram / device.memory.sram.bandwidth_bytes_per_s
    assert 0 <= cost.core_share <= 1
    assert 0 <= cost.memory_share <= 1
    assert cost.energy_j > 0


@given(CHIPS, GEMMS, st.floats(1.0, 4.0))
@settings(max_examples=150, deadline=None)
def test_more_bandwidth_clock_or_sram_is_never_slower(device: Accelerator, work: Gemm, factor: float) -> None:
    alone = device.cost(work).time_s * (1 + 1e-12)
    assert with_hbm(device, factor).cost(work).time_s <= alone
    assert with_sram(device, 1.0, factor).cost(work).time_s <= alone
    assert with_sram(device, factor, 1.0).cost(work).time_s <= alone
    assert device.at_clock(device.clock_hz * factor).cost(work).time_s <= alone


@given(CHIPS, GEMMS, st.sampled_from(["m", "n", "k", "batch"]), st.integers(1, 500))
@settings(max_examples=200, deadline=None)
def test_a_larger_product_is_never_faster(device: Accelerator, work: Gemm, dimension: str, more: int) -> None:
    larger = replace(work, **{dimension: getattr(work, dimension) + more})
    assert device.cost(larger).time_s >= device.cost(work).time_s * (1 - 1e-12)


@pytest.mark.parametrize("dataflow", ["output-stationary", "weight-stationary", "input-stationary"])
def test_less_sram_reads_operands_more_often_and_more_reads_them_once(dataflow: str) -> None:
    """16384^3 in bf16: 512 MiB a matrix. From a scratchpad that holds all to one of 1 MiB, traffic only grows."""
    work = Gemm(16384, 16384, 16384)
    moved, times = [], []
    for size in ("2 GiB", "64 MiB", "16 MiB", "4 MiB", "1 MiB"):
        device = load({"base": "systolic-edge", "set": {"matrix.dataflow": dataflow, "memory.sram.size": size}})
        cost = device.cost(work)
        moved.append(cost.bytes_per_level["hbm"])
        times.append(cost.time_s)
    assert moved[0] == 3 * 2 * 16384**2
    assert all(more > less for less, more in itertools.pairwise(moved))
    assert times == sorted(times)


def test_traffic_by_hand() -> None:
    """256 x 512 x 128 on one 64 x 64 array, 2-byte operands and results; sums of folds along k are 4 bytes, twice."""
    work = Gemm(m=256, n=512, k=128)
    a, b, c = 2 * 256 * 128, 2 * 128 * 512, 2 * 256 * 512
    moved = {flow: chip(64, 64, 1, flow, True, 2**24, 1e12).cost(work).bytes_per_level["sram"] for flow in DATAFLOWS}
    assert moved[OS] == a * (512 / 64) + b * (256 / 64) + c
    assert moved[WS] == a * (512 / 64) + b + c + 2 * 4 * 256 * 512 * (128 / 64 - 1)
    assert moved[IS] == a + b * (256 / 64) + c + 2 * 4 * 256 * 512 * (128 / 64 - 1)
    large = chip(64, 64, 1, WS, True, 2**24, 1e12).cost(work).bytes_per_level["hbm"]
    assert large == a + b + c  # A stays in SRAM
    # 32 KiB: half holds 64 rows of A, so B passes four times; or 64 columns of B and A passes eight times; 64 x 64 sums
    # would let A pass eight and B four times
    small = chip(64, 64, 1, WS, True, 2**15, 1e12).cost(work).bytes_per_level["hbm"]
    assert small == min(a + 4 * b, b + 8 * a) + c


def test_with_double_buffering_large_products_reach_the_peak_and_small_ones_wait_for_memory() -> None:
    large, thin = V5P.cost(Gemm(8192, 8192, 8192)), V5P.cost(Gemm(8, 8192, 8192))
    assert 0.98 < large.flops / large.time_s / V5P.peak_flops("bf16") < 1.0
    assert large.limited_by == "compute"
    assert thin.limited_by == "memory"
    assert thin.time_s > 2 * 8192 * 8192 / 2765e9


def test_what_a_calibration_says_is_lost_slows_products_but_takes_no_cycles() -> None:
    half = load({"base": "tpu-v5p", "set": {"calibration.gemm.efficiency": 0.5}})
    late = load({"base": "tpu-v5p", "set": {"calibration.gemm.fixed_time": "1 ms"}})
    work = Gemm(8192, 8192, 8192)
    assert half.cost(work).cycles == late.cost(work).cycles == V5P.cost(work).cycles
    assert half.cost(work).time_s == pytest.approx(2 * V5P.cost(work).time_s, rel=0.01)
    assert late.cost(work).time_s == pytest.approx(V5P.cost(work).time_s + 1e-3, rel=1e-3)


def test_a_head_of_64_uses_half_of_the_rows_of_a_128_array() -> None:
    def rate(dim: int) -> float:
        cost = V5P.cost(Attention("flash-2", "forward", 1, 32, 32, 8192, 8192, dim, False))
        return cost.flops / cost.time_s

    assert rate(64) < 0.6 * rate(128)


@given(
    st.sampled_from([V5P, load("tpu-v4"), EDGE]),
    st.sampled_from(["forward", "backward"]),
    st.integers(1, 20000),
    st.integers(1, 64),
    st.sampled_from([32, 64, 80, 128, 256]),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_attention_is_never_faster_than_peak_or_compulsory_traffic(
    device: Accelerator, phase: Phase, seq: int, heads: int, head_dim: int, causal: bool
) -> None:
    cost = device.cost(Attention("flash-2", phase, 1, heads, heads, seq, seq, head_dim, causal))
    compulsory = (4 if phase == "forward" else 8) * 2 * heads * seq * head_dim
    no_reuse = 10 * 4 * heads * seq * (seq + 512) * head_dim
    assert cost.time_s >= cost.flops / device.peak_flops("bf16")
    assert compulsory <= cost.bytes_per_level["hbm"] <= no_reuse + 100 * compulsory
    assert cost.time_s >= compulsory / device.memory.hbm.bandwidth_bytes_per_s


def test_keys_that_do_not_fit_in_sram_are_read_again() -> None:
    work = Attention("flash-2", "forward", 1, 8, 8, 8192, 8192, 128, False)
    fits, small = V5P.cost(work), with_sram(V5P, 0.1, 1.0).cost(work)
    assert small.bytes_per_level["hbm"] > 5 * fits.bytes_per_level["hbm"]


def test_kernels_of_other_chips_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="tpu-v5p has no attention kernel 'flash-3'; it has flash-2"):
        V5P.cost(Attention("flash-3", "forward", 1, 8, 8, 512, 512, 128, True))
    with pytest.raises(InputError, match="tpu-v5p does not compute in fp16; it has bf16"):
        V5P.cost(Gemm(8, 8, 8, format="fp16"))


def test_work_without_the_array_has_no_cycles() -> None:
    """fp32 products of a chip whose cells have no fp32 run on its lanes; passes and attention are not counted."""
    lanes = EDGE.cost(Gemm(512, 512, 512, format="fp32", output_format="fp32"))
    assert lanes.cycles is None
    assert lanes.time_s >= lanes.flops / EDGE.vector.peak_flops("fp32")
    assert EDGE.cost(Pass(1e6, 1e6)).cycles is None
    assert load("h100-sxm-80gb").cost(Gemm(512, 512, 512)).cycles is None


# The file that the documentation shows, key by key.
EXAMPLE = """
name: systolic-edge
clock: 1.0 GHz
matrix: {unit: systolic-array, rows: 128, columns: 128, count: 2, dataflow: weight-stationary,
         formats: {int8: 1.0, bf16: 1.0}}
vector: {lanes: 1024, formats: {fp32: 1, bf16: 2}, special_function_rate: 0.25}
memory: {sram: {size: 16 MiB, bandwidth: 4 TB/s}, hbm: {technology: hbm2e, stacks: 2, capacity: 32 GiB}}
links: {fabric: {bandwidth: 100 GB/s, latency: 1 us, topology: torus-2d}, host: {bandwidth: 32 GB/s}}
power: {limit: 250 W}
process: 7 nm
calibration: {}
sources: [a note, another]
"""


def test_the_documented_file_loads_as_it_is_and_the_template_is_the_same_chip(tmp_path: Path) -> None:
    path = tmp_path / "edge.yaml"
    path.write_text(EXAMPLE)
    mine = load(str(path))
    assert mine.matrix == EDGE.matrix
    assert (mine.vector, mine.memory, mine.links) == (EDGE.vector, EDGE.memory, EDGE.links)
    assert mine.peak_flops("bf16") == 2 * 2 * 128 * 128 * 1e9
    assert mine.memory.hbm.bandwidth_bytes_per_s == 2 * 1024 * 3.2e9 / 8
    derived = [entry for entry in mine.provenance if entry.path == "memory.hbm.bandwidth"]
    assert [entry.kind for entry in derived] == ["derived"]


def test_a_variation_of_the_template_is_another_array() -> None:
    changed = load({"base": "systolic-edge", "set": {"matrix.rows": 32, "matrix.dataflow": "output-stationary"}})
    assert isinstance(changed.matrix, SystolicArray)
    assert (changed.matrix.rows, changed.matrix.dataflow) == (32, OS)
    assert changed.peak_flops("bf16") == EDGE.peak_flops("bf16") / 4


BAD: list[tuple[dict[str, Any], str]] = [
    ({"matrix.dataflow": "row-stationary"}, "'row-stationary' is not one of output-stationary, weight-stationary"),
    ({"matrix.rows": 0}, r"matrix\.rows: 0 must be"),
    ({"matrix.cores": 4}, r"matrix\.cores is not a known key"),
    ({"matrix.double_buffering": "yes"}, r"double_buffering: 'yes' must be true or false"),
    ({"memory.sram.multicast": 2}, r"memory\.sram\.multicast is not a known key"),
    ({"links.host.links": 4}, r"links\.host\.links is not a known key"),
    ({"calibration.gemm.tile_loss": 0.1}, r"calibration\.gemm\.tile_loss is not a known key"),
    ({"calibration.gemm.efficiency": 1.1}, r"calibration\.gemm\.efficiency: 1\.1 must be between 0 and 1"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_a_bad_value_is_one_sentence(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load({"base": "systolic-edge", "set": change})
    assert "\n" not in str(caught.value)


def test_every_number_of_the_template_changes_some_answer() -> None:
    """An eighth of each number, one by one; links and power are compared as they are, their answers elsewhere."""
    works: list[Gemm | Attention | Pass] = [
        *(
            Gemm(m, n, k, format=f, output_format=f)
            for m, n, k in ((640, 640, 640), (8, 4096, 4096))
            for f in ("bf16", "int8", "fp32")
        ),
        Gemm(4096, 65536, 2048),
        Attention("flash-2", "forward", 1, 8, 8, 8192, 8192, 128, True),
        Pass(1e8, 1e8, 1e9, 1e9, kind="row"),
    ]

    def answers(device: Accelerator) -> list[object]:
        costs = [device.cost(work) for work in works]
        return [*((c.time_s, c.energy_j, c.bytes_per_level) for c in costs), device.links, device.power]

    path = Path(__file__).parents[2] / "hwmodels" / "library" / "systolic-edge.yaml"
    data = yaml.safe_load(path.read_text())
    base, silent = answers(EDGE), []

    def walk(node: dict[str, Any], prefix: str) -> None:
        for key, value in node.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict):
                walk(value, f"{name}.")
                continue
            number, _, unit = str(value).partition(" ")
            try:
                less = float(number) / 8
            except ValueError:
                continue
            whole = isinstance(value, int) and ".formats." not in name
            changed = f"{less:g} {unit}" if unit else max(1, round(less)) if whole else less
            if name not in ("process", "memory.hbm.capacity"):
                if answers(load({"base": "systolic-edge", "set": {name: changed}})) == base:
                    silent.append(name)

    walk(data, "")
    # bf16 on the lanes is used only where the cells lack it
    assert silent == ["vector.formats.bf16"]
