"""A chip may have several units of a kind, special-function units of their own, and no memory beside it."""

from typing import Any

import pytest

from hwmodels.accelerator import Accelerator, load, load_raw
from hwmodels.check import check
from hwmodels.describe import parts
from hwmodels.units import InputError
from hwmodels.work import Attention, Gemm, HostCopy, Pass

GPU, EDGE = "a100-sxm-80gb", "systolic-edge"
ARRAY = {"unit": "systolic-array", "rows": 128, "columns": 128, "count": 64, "formats": {"bf16": 1, "fp8": 2}}
LARGE = Gemm(4096, 4096, 4096)


def with_parts(base: str, **parts: Any) -> Accelerator:
    return load({"base": base, "set": parts})


def both(**array: Any) -> Accelerator:
    """A100's tensor cores with systolic arrays beside them."""
    return with_parts(GPU, matrix=[load_raw(GPU)["matrix"], {**ARRAY, **array}])


@pytest.mark.parametrize("count", [1, 8, 64, 512])
def test_work_takes_the_matrix_unit_on_which_it_is_faster(count: int) -> None:
    near = {key: load_raw(GPU)["memory"]["sram"][key] for key in ("size", "bandwidth")}
    kept = {"memory": load_raw(GPU)["calibration"]["memory"]}
    alone = with_parts(GPU, matrix={**ARRAY, "count": count}, calibration=kept, **{"memory.sram": near})
    for work in (LARGE, Gemm(128, 128, 128), Gemm(16384, 64, 512, 3)):
        one, other = load(GPU).cost(work), alone.cost(work)
        assert both(count=count).cost(work).time_s == min(one.time_s, other.time_s)


def test_a_format_that_only_the_second_unit_has_runs_there() -> None:
    chip = both()
    work = Gemm(4096, 4096, 4096, format="fp8")
    with pytest.raises(InputError, match="does not compute in fp8"):
        load(GPU).cost(work)
    cost = chip.cost(work)
    assert cost.cycles is not None
    assert set(cost.bytes_per_level) == {"hbm", "l2"}  # the shared level is called as the first unit calls it
    assert chip.peak_flops("fp8") == pytest.approx(2.0 * 64 * 128 * 128 * 2 * chip.clock_hz)


def test_the_peak_of_a_format_is_that_of_the_faster_unit() -> None:
    assert both(count=1).peak_flops("bf16") == load(GPU).peak_flops("bf16")
    assert both(count=512).peak_flops("bf16") == pytest.approx(2.0 * 512 * 128 * 128 * load(GPU).clock_hz)


def test_a_unit_runs_at_the_clock_of_its_own_domain() -> None:
    slow = both(clock="0.5 GHz")
    fp8 = slow.peak_flops("fp8") / both().peak_flops("fp8")
    assert fp8 == pytest.approx(0.5e9 / slow.clock_hz)
    assert slow.at_clock(0.5 * slow.clock_hz).peak_flops("fp8") == pytest.approx(0.5 * slow.peak_flops("fp8"))


def test_attention_takes_the_faster_of_two_units() -> None:
    work = Attention("flash-2", "forward", 4, 16, 16, 4096, 4096, 128, True)
    assert both(count=32).cost(work).time_s < load(GPU).cost(work).time_s
    assert both(count=1).cost(work).time_s == load(GPU).cost(work).time_s


def test_a_pass_takes_the_faster_lanes() -> None:
    lanes = load_raw(EDGE)["vector"]
    slow, fast = {**lanes, "lanes": 32}, {**lanes, "lanes": 4096, "clock": "2 GHz"}
    work = Pass(1e8, 1e8, vector_ops=1e11)
    times = [with_parts(EDGE, vector=unit).cost(work).time_s for unit in (slow, fast, [slow, fast], [fast, slow])]
    assert times[0] > times[1] == times[2] == times[3]


def test_units_beside_each_other_take_room_together() -> None:
    one, together = load(GPU).area, both().area
    assert one is not None
    assert together is not None
    assert together.parts_mm2["cores"] > one.parts_mm2["cores"]


def test_one_of_several_parts_is_set_by_its_place() -> None:
    two = {"base": GPU, "set": {"matrix": [load_raw(GPU)["matrix"], ARRAY]}}
    more = load({"base": two, "set": {"matrix[1].count": 128}})
    assert more.peak_flops("fp8") == 2.0 * both().peak_flops("fp8")
    for path, said in {
        "matrix.count": r"matrix: there are 2 of them; say which, as in matrix\[0\]\.count",
        "matrix[2].count": "matrix.2: there are 2 of them, counted from 0",
        "vector[0].lanes": r"vector is one part; leave out \[0\]",
    }.items():
        with pytest.raises(InputError, match=said):
            load({"base": two, "set": {path: 3}})


def test_constants_are_of_one_unit_each() -> None:
    fitted = load_raw(GPU)["calibration"]["gemm"]
    chip = with_parts(
        GPU,
        **{
            "matrix": [load_raw(GPU)["matrix"], {**ARRAY, "count": 4}],
            "calibration.gemm": [fitted, {"efficiency": 0.5, "fixed_time": "1 us"}],
        },
    )
    work = Gemm(8192, 8192, 8192, format="fp8")
    assert chip.cost(work).time_s > 1.5 * both(count=4).cost(work).time_s
    with pytest.raises(InputError, match=r"calibration\.gemm: there are 2 for 1"):
        with_parts(GPU, **{"calibration.gemm": [fitted, fitted]})


def test_special_functions_have_units_and_a_clock_of_their_own() -> None:
    lanes = {key: value for key, value in load_raw(EDGE)["vector"].items() if key != "special_function_rate"}
    work = Pass(1e6, 1e6, special_ops=1e10)

    def time_s(**unit: Any) -> float:
        return with_parts(EDGE, vector=lanes, special_function=unit).cost(work).time_s

    assert time_s(per_cycle=100) == pytest.approx(1e10 / (100 * load(EDGE).clock_hz), rel=0.01)
    assert time_s(per_cycle=100, clock="2 GHz") == pytest.approx(1e10 / (100 * 2e9), rel=0.01)
    assert with_parts(EDGE, vector={**lanes, "lanes": 256}, special_function={"per_cycle": 100}).cost(
        work
    ).time_s == time_s(per_cycle=100)
    with pytest.raises(InputError, match="the file has special_function"):
        with_parts(
            EDGE, vector=load_raw(EDGE)["vector"] | {"special_function_rate": 0.25}, special_function={"per_cycle": 1}
        )


def without_memory(levels: Any) -> Accelerator:
    return with_parts(EDGE, memory={"sram": levels}, **{"vector.lanes": 2**20})


def test_a_chip_may_have_its_memory_on_it_alone() -> None:
    chip = without_memory({"size": "40 GiB", "bandwidth": "20 TB/s"})
    assert (chip.memory.hbm.capacity_bytes, chip.memory.hbm.rate("gather")) == (40 * 2**30, 20e12)
    work = Pass(1e9, 1e9)
    assert chip.cost(work).time_s == pytest.approx(2e9 / 20e12, rel=0.05)
    assert chip.cost(work).time_s < load(EDGE).cost(work).time_s
    assert parts(chip)["hbm"].startswith("40 GiB on-chip")
    area = chip.area
    assert area is not None
    assert (area.memory_usd, area.parts_mm2["memory interface"]) == (0.0, 0.0)


def test_the_last_of_several_levels_is_the_main_memory() -> None:
    near, far = {"size": "64 MB", "bandwidth": "20 TB/s"}, {"size": "40 GiB", "bandwidth": "2 TB/s"}
    chip = without_memory([near, far])
    assert chip.cost(Pass(1e9, 1e9)).time_s == pytest.approx(2e9 / 2e12, rel=0.05)
    assert chip.memory.behind == ()


def test_a_chip_without_memory_beside_it_is_noticed() -> None:
    found = check({"base": EDGE, "set": {"memory": {"sram": {"size": "40 GiB", "bandwidth": "20 TB/s"}}}})
    assert any("memory.hbm is left out: the chip has no memory but the 40 GiB on it" in line for line in found.warnings)


def test_a_copy_to_the_host_takes_its_link_or_the_memory_whichever_is_slower() -> None:
    chip = load("h100-sxm-80gb")
    host = chip.links.host
    copy = chip.cost(HostCopy(1e9))
    assert copy.time_s > 1e9 / host.bandwidth_bytes_per_s
    assert copy.limited_by == "link"
    assert copy.core_share == 0.0
    assert copy.energy_j > 0.0
    assert chip.cost(HostCopy(0.0)).time_s == pytest.approx(host.latency_s + host.p2p_launch_s)
    fast = load({"base": "h100-sxm-80gb", "set": {"links.host.bandwidth": "100 TB/s"}})
    assert fast.cost(HostCopy(1e9, "device_to_host")).limited_by == "memory"
    assert fast.cost(HostCopy(1e12)).time_s >= 1e12 / fast.memory.hbm.bandwidth_bytes_per_s
