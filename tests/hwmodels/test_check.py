"""`cosim hw check` finds everything that is wrong with a file at once; what is right has no warnings."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from hwmodels.accelerator import load, load_raw, names
from hwmodels.check import check
from hwmodels.describe import differences
from hwmodels.units import InputError


def changed(**changes: Any) -> Any:
    return {"base": "h100-sxm-80gb", "set": {key.replace("__", "."): value for key, value in changes.items()}}


@pytest.mark.parametrize("name", names())
def test_the_library_has_no_problems_and_all_its_numbers_have_sources(name: str) -> None:
    found = check(name)
    assert found.problems == ()
    assert [warning for warning in found.warnings if "peaks." not in warning] == []


BAD: dict[str, Any] = {
    "name": "bad",
    "clock": "1.4 GB",
    "matrx": {},
    "matrix": {"unit": "tensor-core", "cores": 0, "shared_memory": "1 KB/s", "formats": {"fp9": 1, "bf16": "x"}},
    "vector": {"lanes": 1.5, "formats": {"bf16": 1}},
    "memory": {"hbm": {"technology": "hbm9", "capacity": "80 GiB", "bandwidth": 3}},
    "links": {"host": {}},
    "power": {"limit": "500 W", "idle": "900 W"},
    "process": "3 furlongs",
}
NAMED = (
    *("clock", "matrix.cores", "matrix.formats.fp9", "matrix.formats.bf16", "matrix.shared_memory", "vector.lanes"),
    *("vector.formats", "memory.sram", "memory.hbm.technology", "memory.hbm.bandwidth", "links.host.bandwidth"),
    *("power.idle", "matrx", "process"),
)


def test_every_problem_of_a_file_is_a_sentence_that_names_file_and_key(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(BAD))
    problems = check(str(path)).problems
    found = [problem.removeprefix("bad.yaml: ").split(":")[0].split(" ")[0] for problem in problems]
    assert sorted(found) == sorted(NAMED)
    with pytest.raises(InputError) as first:  # what a run is refused with is one of them
        load(str(path))
    assert str(first.value) in problems


@pytest.mark.parametrize("part", ["matrix", "vector", "memory", "links", "power", "clock", "name"])
def test_a_part_that_is_missing_is_one_problem(part: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in load_raw("a100-sxm-80gb").items() if key != part}))
    assert check(str(path)).problems == (f"mine.yaml: {part} is missing",)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (changed(memory__hbm__bandwidth="3.35 GB/s"), "memory.hbm.bandwidth: 3.35 GB/s is implausible"),
        (changed(memory__hbm__bandwidth="3.35 GB/s"), "was 3.35 TB/s meant?"),
        (changed(clock="1.83 MHz"), "clock: 1.83 MHz is implausible; usual are 50 MHz to 10 GHz; was 1.83 GHz meant?"),
        (changed(power__energy_per_flop__bf16="0.75 nJ"), "bf16 at its peak"),
        (changed(memory__sram__bandwidth="2 TB/s"), "less than the 3.35 TB/s of the memory behind it"),
        (changed(links__fabric__bandwidth="450 TB/s"), "links.fabric.bandwidth: 450 TB/s"),
        (changed(links__fabric__latency="0.6 s"), "links.fabric.latency: 0.6 s is implausible"),
        (changed(peaks={"bf16": "1200 TFLOP/s"}), "bf16: 1.2 PFLOP/s is published, the parts give 989.4 TFLOP/s"),
        (changed(peaks={"bandwidth": "3.0 TB/s"}), "bandwidth: 3 TB/s is published, memory.hbm is given 3.35 TB/s"),
        (changed(peaks={"int4": "1 TFLOP/s"}), "peaks.int4: 1 TFLOP/s is published, and no part has the format"),
    ],
)
def test_what_can_hardly_be_meant_is_a_warning(change: Any, sentence: str) -> None:
    found = check(change)
    assert found.problems == ()
    assert any(sentence in warning for warning in found.warnings), found.warnings


def test_published_peaks_may_be_rounded_as_they_are_written() -> None:
    assert check(changed(peaks={"bf16": "989 TFLOP/s", "fp8": "1979 TFLOP/s", "bandwidth": "3.4 TB/s"})).warnings == ()


def test_numbers_without_a_source_are_named(tmp_path: Path) -> None:
    data = load_raw("a100-sxm-80gb")
    data["power"] = {"limit": "400 W", "idle": {"value": "50 W", "source": "hearsay"}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data))
    warnings = check(str(tmp_path / "mine.yaml")).warnings
    assert any("say not where they come from" in warning and "power.limit" in warning for warning in warnings)
    assert any("power.idle: the source 'hearsay' is not one of `sources`" in warning for warning in warnings)


def test_three_lines_make_a_chip_and_its_calibration_says_whose_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "base: h100-sxm-80gb\n"
        "set: {memory.hbm: {technology: hbm2e, stacks: 6, capacity: 96 GB, bandwidth: 2.4 TB/s}, power.limit: 500 W}\n"
        "source: torchtitan\n"
    )
    chip = load(str(path))
    assert (chip.memory.hbm.bandwidth_bytes_per_s, chip.memory.hbm.capacity_bytes) == (2.4e12, 96e9)
    assert chip.power_limit_w == 500
    assert chip.calibrated_on == ("h100-sxm-80gb", ("memory.hbm",))


def test_what_calibration_was_fitted_on_is_followed_through_all_bases(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("name: one\nbase: h100-sxm-80gb\nset: {clock: 1.5 GHz}\n")
    (tmp_path / "two.yaml").write_text("name: two\nbase: one.yaml\nset: {power.limit: 500 W, matrix.cores: 100}\n")
    assert load(str(tmp_path / "two.yaml")).calibrated_on == ("h100-sxm-80gb", ("clock", "matrix.cores"))
    assert load("h100-sxm-80gb").calibrated_on is None


def test_files_that_build_on_each_other_in_a_circle_are_named(tmp_path: Path) -> None:
    for name, base in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"name: {name}\nbase: {base}.yaml\n")
    with pytest.raises(InputError, match=r"in a circle: a\.yaml -> b\.yaml -> c\.yaml -> a\.yaml"):
        load(str(tmp_path / "a.yaml"))


def test_a_difference_is_one_in_value_and_not_in_how_it_is_written() -> None:
    same = changed(memory__hbm__bandwidth="3350 GB/s", matrix__cores="132")
    base = load_raw("h100-sxm-80gb")
    assert differences(base, load_raw(same)) == {}
    other = load_raw(changed(matrix__cores=100, price={}))
    assert differences(base, other) == {"matrix.cores": ("132", "100"), "price.device_hour": ("3.0 USD/h", None)}
    systolic = load_raw("systolic-edge")
    longer = load_raw({"base": "systolic-edge", "set": {"matrix.rows": 7}})
    assert list(differences(systolic, longer)) == ["matrix.rows"]
