"""`cosim calibrate`: tables in, an accelerator file out, and nothing of the library overwritten."""

import csv
from pathlib import Path

import pytest
import yaml

from cosim.calibrate.accelerator import calibrate
from cosim.calibrate.rows import in_fitted_half
from cosim.cli import main
from hwmodels.accelerator import load
from hwmodels.catalog import LIBRARY, load_raw
from hwmodels.cluster import Cluster
from hwmodels.units import InputError
from hwmodels.work import Attention, Gemm

COLUMNS = ("id", "op", "accelerator", "dtype", "m", "n", "k", "time_us", "source", "note")


def cosim(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert isinstance(end.value.code, int)
    return end.value.code


def table(path: Path, efficiency: float = 0.61) -> Path:
    """Products timed on an imagined part: an A100 with other constants."""
    truth = load({"base": "a100-sxm-80gb", "set": {"calibration.gemm.efficiency": efficiency}})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for index in range(160):
            work = Gemm(1024 * (1 + index % 9), 1536 * (1 + index // 9), 1024 * (1 + index % 5), format="fp16")
            seconds = truth.cost(work).time_s
            row = {"id": f"mine-{index}", "op": "gemm", "accelerator": "a100-sxm-80gb", "dtype": "fp16"}
            size = {"m": work.m, "n": work.n, "k": work.k, "time_us": seconds * 1e6, "source": "mine"}
            writer.writerow({**row, **size})
    return path


def test_a_file_is_written_that_predicts_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mine.yaml"
    assert cosim("calibrate", table(tmp_path / "k.csv"), "--hw", "a100-sxm-80gb", "-o", out) == 0
    printed = capsys.readouterr().out
    assert "gemm.efficiency" in printed
    assert "not identifiable: " in printed  # 160 products cannot tell six constants apart
    found = load(str(out))
    truth = load({"base": "a100-sxm-80gb", "set": {"calibration.gemm.efficiency": 0.61}})
    for work in (Gemm(4096, 4096, 4096, format="fp16"), Gemm(2048, 12288, 3072, format="fp16")):
        assert found.cost(work).time_s == pytest.approx(truth.cost(work).time_s, rel=0.02)


def test_what_was_not_measured_is_kept_and_what_was_says_where_from(tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    cosim("calibrate", table(tmp_path / "k.csv"), "--hw", "a100-sxm-80gb", "-o", out)
    section = yaml.safe_load(out.read_text())["set"]["calibration"]
    entry = section["gemm"]["efficiency"]
    assert entry["fitted_on"].startswith("mine GEMM")
    assert entry["rows"] == sum(in_fitted_half(f"mine-{index}") for index in range(160))
    assert 0 < entry["uncertainty"] < 0.2
    assert entry["error_held_out"] < 0.02
    work = Attention("flash-2", "forward", 1, 16, 16, 2048, 2048, 128, True)
    assert load(str(out)).cost(work).time_s == pytest.approx(load("a100-sxm-80gb").cost(work).time_s, rel=0.05)
    assert (
        section["attention"] == yaml.safe_load((LIBRARY / "a100-sxm-80gb.yaml").read_text())["calibration"]["attention"]
    )


def test_a_half_is_chosen_by_the_id_alone(tmp_path: Path) -> None:
    """The same rows under other times: the same half is fitted on."""
    counts = {
        calibrate([table(tmp_path / f"{e}.csv", e)], "a100-sxm-80gb").section["gemm"]["efficiency"]["rows"]
        for e in (0.5, 0.7)
    }
    assert len(counts) == 1


def test_the_library_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (LIBRARY / "a100-sxm-80gb.yaml").read_bytes()
    arguments = ("calibrate", table(tmp_path / "k.csv"), "--hw", "a100-sxm-80gb", "-o")
    assert cosim(*arguments, LIBRARY / "a100-sxm-80gb.yaml") == 2
    assert "is a file of the library, which is not overwritten" in capsys.readouterr().err
    assert (LIBRARY / "a100-sxm-80gb.yaml").read_bytes() == before
    assert cosim(*arguments, tmp_path / "k.csv") == 2
    assert cosim(*arguments, tmp_path / "mine.txt") == 2
    assert not list(tmp_path.glob("*.yaml"))


HEADER = ",".join(COLUMNS)
GOOD = "k-1,gemm,a100-sxm-80gb,fp16,8,8,8,50,mine,"
MALFORMED = [
    ("", "is empty"),
    ("a,b\n1,2\n", "has neither a column 'op' nor 'collective'; its columns are a, b"),
    ("op,m\ngemm,8\n", "has no column 'accelerator'"),
    (f"{HEADER}\n{GOOD},extra\n", "line 2: has 11 values for 10 columns"),
    (f"{HEADER}\nk-1,gemm,a100-sxm-80gb,fp16,8,8,x,50,mine,\n", "line 2: k: 'x' must be a whole number"),
    (f"{HEADER}\n{GOOD}\nk-2,gemm,a100-sxm-80gb,fp16,8,8,8,-5,mine,\n", "line 3: time_us: '-5' must be a positive"),
    (f"{HEADER}\nk-1,sort,a100-sxm-80gb,fp16,8,8,8,50,mine,\n", "line 2: op: 'sort' is not one of gemm"),
    (f"{HEADER}\nk-1,gemm,z80,fp16,8,8,8,50,mine,\n", "no row is of a100-sxm-80gb; there are rows of z80"),
    (f"{HEADER}\n{GOOD}\n", "too few rows of a100-sxm-80gb to fit a constant"),
]


@pytest.mark.parametrize(("text", "sentence"), MALFORMED)
def test_a_malformed_table_is_one_sentence(
    text: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "k.csv").write_text(text)
    assert cosim("calibrate", tmp_path / "k.csv", "--hw", "a100-sxm-80gb", "-o", tmp_path / "out.yaml") == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert sentence in said.err
    assert not (tmp_path / "out.yaml").exists()


def test_a_table_that_is_no_text_or_no_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "k.csv").write_bytes(b"\xff\xfe\x00")
    for path, sentence in ((tmp_path / "k.csv", "is not a csv file"), (tmp_path / "none.csv", "cannot be read")):
        with pytest.raises(InputError, match=sentence):
            calibrate([path], "a100-sxm-80gb")


@pytest.mark.parametrize("name", ["b200-sxm", "v100-sxm2-16gb"])
def test_the_library_holds_what_the_command_finds(name: str) -> None:
    """The `calibration:` section of a library file is the command's, constant by constant."""
    published = Path(__file__).parents[2] / "cosim" / "validate" / "published"
    found = calibrate([published / "kernels.csv", published / "collectives.csv"], name)
    kept = load_raw(name)["calibration"]
    for constant in found.constants:
        entry = kept
        for key in constant.path.split("."):
            entry = entry[key]
        assert constant.kind in entry or constant.kind == "derived", constant.path
        value = float(str(entry["value"]).split()[0])
        assert value == pytest.approx(constant.value, rel=0.02, abs=1e-3), constant.path


@pytest.mark.parametrize(
    ("name", "devices", "tier"), [("gb200", 72, "fabric"), ("p4", 2, "host"), ("tpu-v5p", 64, "fabric")]
)
def test_all_reduces_over_any_fabric_are_fitted_and_the_file_can_be_loaded(
    name: str, devices: int, tier: str, tmp_path: Path
) -> None:
    """A rack, a torus, and a part that has only its host interface; the launch that made the rows is found again."""
    key = f"calibration.links.{tier}.launch"
    truth = Cluster.build(load({"base": name, "set": {key: "37 us"}}), devices, devices)
    lines = ["system,accelerator,collective,devices,devices_per_node,bytes,time_us,source"]
    for power in range(20, 32):
        seconds = truth.collective("all_reduce", 2.0**power, devices, devices).time_s
        lines.append(f"mine,{name},all_reduce,{devices},{devices},{2**power},{seconds * 1e6},me")
    (tmp_path / "c.csv").write_text("\n".join(lines))
    assert cosim("calibrate", tmp_path / "c.csv", "--hw", name, "-o", tmp_path / "mine.yaml") == 0
    links = load(str(tmp_path / "mine.yaml")).links
    found = links.host if tier == "host" else links.fabric
    assert found is not None
    assert found.launch_s == pytest.approx(37e-6, rel=0.1)


def test_an_error_is_given_only_where_rows_were_held_out(tmp_path: Path) -> None:
    held = [f"mine-{index}" for index in range(40) if in_fitted_half(f"mine-{index}")]
    path = table(tmp_path / "k.csv")
    with path.open() as file:
        rows = [line for line in file if line.startswith("id") or line.split(",")[0] in held]
    path.write_text("".join(rows))
    constants = calibrate([path], "a100-sxm-80gb").constants
    assert constants
    assert {constant.held_out for constant in constants} == {None}
    out = tmp_path / "mine.yaml"
    assert cosim("calibrate", path, "--hw", "a100-sxm-80gb", "-o", out) == 0
    assert "error_held_out" not in yaml.safe_load(out.read_text())["set"]["calibration"]["gemm"]["efficiency"]
