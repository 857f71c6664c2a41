"""The report on published kernels: every row is counted once, halves apart, and errors are those of the prices."""

import json

import pytest

from cosim.calibrate.rows import read_collectives, read_kernels
from cosim.cli import main
from cosim.validate.kernels import PUBLISHED, Line, Report, check, kind_of, to_json
from hwmodels.accelerator import load
from hwmodels.units import InputError


@pytest.fixture(scope="module")
def report() -> Report:
    return check()


def of(report: Report, accelerator: str, op: str, source: str, implementation: str = "") -> Line:
    wanted = (accelerator, op, source, implementation)
    (found,) = (one for one in report.lines if (one.accelerator, one.op, one.source, one.implementation) == wanted)
    return found


def test_every_timed_row_is_in_one_half_of_one_line_or_left_out_for_a_reason(report: Report) -> None:
    rows = len(read_kernels(PUBLISHED / "kernels.csv")) + len(read_collectives(PUBLISHED / "collectives.csv"))
    assert rows > 11_000
    assert sum(line.fitted.rows + line.held_out.rows for line in report.lines) + sum(report.left_out.values()) == rows
    assert sum(report.left_out.values()) < 0.01 * rows


def test_an_error_is_prediction_over_measurement_less_one(report: Report) -> None:
    rows = [r for r in read_kernels(PUBLISHED / "kernels.csv") if r.accelerator == "b200-sxm" and r.op == "gemm"]
    rows = [r for r in rows if r.source == "simumax" and r.time_s >= 20e-6 and not r.fitted]
    chip = load("b200-sxm")
    found = [abs(chip.cost(row.works[0]).time_s / row.time_s - 1) for row in rows]  # type: ignore[arg-type]
    line = of(report, "b200-sxm", "gemm 16-bit >= 20 us", "simumax")
    assert line.held_out.rows == len(rows) > 100
    assert line.held_out.mean == pytest.approx(sum(found) / len(found))


def test_each_bar_is_where_it_is_promised(report: Report) -> None:
    bars = {(line.op, line.accelerator.split("-")[0], line.bar) for line in report.lines if line.bar}
    for chip in ("a100", "h100", "b200"):
        assert ("gemm 16-bit >= 20 us", chip, 0.10) in bars
    assert {chip for op, chip, _ in bars if op == "gemm fp32 >= 20 us"} == {"a100", "v100"}
    assert {chip for op, chip, _ in bars if op == "attention_fwd_bwd"} == {"a100", "h100"}
    assert ("all_reduce >= 1 MiB", "a100", 0.12) in bars
    barred = {op for op, _, _ in bars}
    assert not any(name in op for op in barred for name in ("norm", "rope", "silu", "embedding", "< 1 MiB"))


def test_without_calibration_the_report_says_so_and_is_worse(report: Report) -> None:
    plain = check("a100", "gemm 16-bit >=", uncalibrated=True)
    assert to_json(plain)["calibration"] == "uncalibrated"
    assert to_json(report)["calibration"] == "calibrated"
    with_constants = of(report, "a100-sxm-80gb", "gemm 16-bit >= 20 us", "vidur")
    without = of(plain, "a100-sxm-80gb", "gemm 16-bit >= 20 us", "vidur")
    assert without.held_out.rows == with_constants.held_out.rows
    assert without.held_out != with_constants.held_out


def test_a_search_s_best_shape_is_no_typical_product() -> None:
    rows = [r for r in read_kernels(PUBLISHED / "kernels.csv") if r.source == "ml_engineering_mamf"]
    assert rows
    assert {kind_of(row).bar for row in rows} == {None}


def test_a_name_that_no_row_has_is_one_sentence() -> None:
    with pytest.raises(InputError, match="--accelerator: no published row has 'z80' in its name; there are a100"):
        check("z80")
    with pytest.raises(InputError, match="--op: no published row has 'fft' in its name; there are all_reduce"):
        check("a100", "fft")


def test_the_command_prints_a_table_or_json_and_refuses_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["validate", "kernels", "--accelerator", "b200", "--op", "gemm 16-bit >="]
    for extra, status in ((), 0), (("--json", "-"), 0), (("--op", "fft"), 2):
        with pytest.raises(SystemExit) as end:
            main([*arguments, *extra])
        assert end.value.code == status
        said = capsys.readouterr()
        if status:
            assert (said.out, said.err.count("\n")) == ("", 1)
        elif extra:
            (line,) = json.loads(said.out)["lines"]
            assert (line["accelerator"], line["bar"], line["source"]) == ("b200-sxm", 0.10, "simumax")
        else:
            assert "bars on the other half" in said.out
