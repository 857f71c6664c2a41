"""Library files say what datasheets say; files that cannot be used are refused in one sentence."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from hwmodels.accelerator import load, load_raw, names
from hwmodels.listing import summary
from hwmodels.units import InputError


@pytest.mark.parametrize("name", names())
def test_every_number_of_the_library_says_where_it_comes_from(name: str) -> None:
    chip = load(name)
    plain = {"name", "title", "architecture", "matrix.unit", "process"}
    silent = [entry.path for entry in chip.provenance if entry.kind == "none" and entry.path not in plain]
    assert silent == []
    for entry in chip.provenance:
        if entry.kind == "source":
            assert entry.text in chip.sources, f"{entry.path} names a source that the file does not list"


def test_a_variation_is_its_base_with_the_changes_and_says_who_made_them() -> None:
    base = load("h100-sxm-80gb")
    slow = load({"base": "h100-sxm-80gb", "set": {"memory.hbm.bandwidth": "2.4 TB/s", "power.limit": "500 W"}})
    assert slow.memory.hbm.bandwidth_bytes_per_s == 2.4e12
    assert slow.power_limit_w == 500
    assert slow.peak_flops("bf16") == base.peak_flops("bf16")
    assert slow.name != base.name
    changed = {entry.path: entry.kind for entry in slow.provenance if entry.kind == "user"}
    assert changed == {"memory.hbm.bandwidth": "user", "power.limit": "user"}


def test_a_file_of_ones_own_is_loaded_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    data = load_raw("a100-sxm-80gb")
    data["name"], data["calibration"] = "mine", {}
    path.write_text(yaml.safe_dump(data))
    chip = load(str(path))
    assert (chip.name, chip.calibration_status) == ("mine", "defaults")


def test_a_variation_finds_its_base_beside_itself(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**load_raw("a100-sxm-80gb"), "name": "mine"}))
    (tmp_path / "half.yaml").write_text("name: half\nbase: base.yaml\nset: {matrix.cores: 54}\n")
    half = load(str(tmp_path / "half.yaml"))
    assert half.peak_flops("bf16") == load("a100-sxm-80gb").peak_flops("bf16") / 2


BAD = [
    ({"matrix.corse": 10}, r"matrix\.corse is not a known key; did you mean 'cores'"),
    ({"matrix.cores": 0}, r"matrix\.cores: 0 must be at least 1"),
    ({"matrix.cores": -3}, r"matrix\.cores: -3 must be at least 1"),
    ({"matrix.cores": 1.5}, r"matrix\.cores: 1\.5 must be a whole number"),
    ({"matrix.cores": float("nan")}, r"matrix\.cores: nan must be a finite number"),
    ({"clock": "1.4 GB"}, r"clock: 'GB' in '1\.4 GB' is not a unit of frequency"),
    ({"clock": 1.4}, r"clock: 1\.4 has no unit"),
    ({"memory.hbm.bandwidth": "0 GB/s"}, r"memory\.hbm\.bandwidth: '0 GB/s' must be finite and positive"),
    ({"memory.hbm.technology": "hbm9"}, r"memory\.hbm\.technology: 'hbm9' is not one of"),
    ({"memory.hbm": 3}, r"memory\.hbm is a section; name one of its keys"),
    ({"matrix.formats.fp9": 1}, r"matrix\.formats\.fp9: 'fp9' is not one of"),
    ({"power.idle": "500 W"}, r"power\.idle: 500 W must be less than the limit"),
    ({"calibration.gemm.efficiency": 1.2}, r"calibration\.gemm\.efficiency: 1\.2 must be between"),
    ({"matrix.unit": "abacus"}, r"matrix\.unit: 'abacus' is not one of tensor-core, systolic-array"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_a_bad_value_is_one_sentence_that_names_file_key_and_value(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load({"base": "a100-sxm-80gb", "set": change})
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("accelerator")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("h100", "no accelerator is called 'h100'; did you mean .*h100-sxm-80gb"),
        ("nothing.yaml", "nothing.yaml: cannot be read: No such file"),
        ({"set": {}}, "no `base`"),
        ({"base": "a100-sxm-80gb", "sett": {}}, "unknown key 'sett'"),
        (7, "7 must be a name"),
    ],
)
def test_a_reference_to_nothing_is_one_sentence(reference: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(reference)  # type: ignore[arg-type]


def test_a_format_that_the_chip_lacks_names_those_it_has() -> None:
    with pytest.raises(InputError, match="a100-sxm-80gb does not compute in fp8; it has tf32, bf16"):
        load("a100-sxm-80gb").peak_flops("fp8")
    with pytest.raises(InputError, match="number format 'fp17' is not known"):
        load("a100-sxm-80gb").peak_flops("fp17")


def test_listing_the_library_needs_neither_numpy_nor_much_time() -> None:
    code = (
        "import sys, time; from hwmodels.catalog import names; from hwmodels.listing import summary; "
        "start = time.process_time(); "
        "[summary(name) for name in names()[:3]]; took = time.process_time() - start; "
        "print(took, any(m in sys.modules for m in ('numpy', 'torch', 'scipy')))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert float(answer[0]) < 0.1  # 0.01 s when nothing else runs
    assert answer[1] == "False"
    assert summary("h100-sxm-80gb")["16-bit"] == "989 TFLOP/s"


def test_an_answer_is_kept() -> None:
    from hwmodels.work import Gemm

    chip, work = load("a100-sxm-80gb"), Gemm(4096, 4096, 4096)
    first = chip.cost(work)
    start = time.perf_counter()
    for _ in range(1000):
        assert chip.cost(work) is first
    assert time.perf_counter() - start < 0.05  # 1000 times
