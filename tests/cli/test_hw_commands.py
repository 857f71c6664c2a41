"""`cosim hw check`, `hw diff` and `hw show`, as a person and as a program reads them."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cosim.cli import app, main


def printed(*arguments: str) -> tuple[int, str]:
    answer = CliRunner().invoke(app, ["hw", *arguments])
    return answer.exit_code, answer.output


def test_a_file_without_problems_is_said_to_have_none() -> None:
    assert printed("check", "h100-sxm-80gb") == (0, "no problems\n")


def test_a_file_with_problems_ends_with_2_and_names_all(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: a100-sxm-80gb\nset: {matrix.cores: 0, clock: 3 GB, memory.hbm.bandwith: 2 TB/s}\n")
    status, text = printed("check", str(path))
    assert status == 2
    assert [line.split(" ")[:3] for line in text.splitlines()] == [
        ["problem:", "mine.yaml:", "clock:"],
        ["problem:", "mine.yaml:", "matrix.cores:"],
        ["problem:", "mine.yaml:", "memory.hbm.bandwith"],
    ]
    assert "did you mean 'bandwidth'?" in text
    status, text = printed("check", str(path), "--json")
    assert (status, len(json.loads(text)["problems"])) == (2, 3)


def test_a_warning_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: h100-sxm-80gb\nset: {memory.hbm.bandwidth: 3.35 GB/s}\n")
    status, text = printed("check", str(path))
    assert status == 0
    assert "was 3.35 TB/s meant?" in text.splitlines()[0]
    assert text.endswith("no problems\n")


def test_a_difference_shows_values_and_what_follows_side_by_side() -> None:
    status, text = printed("diff", "h100-sxm-80gb", "h100-sxm-96gb-hbm2e-500w")
    assert status == 0
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert rows["memory.hbm.bandwidth"][1:] == ["3.35", "TB/s", "2.4", "TB/s"]
    assert rows["power.limit"][1:] == ["700", "W", "500", "W"]
    assert rows["bf16 peak"][2:] == ["989.4", "TFLOP/s", "989.4", "TFLOP/s"]
    assert rows["bf16 balance"][2::6] == ["295", "412"]  # 989.4 over 3.35 and over 2.4
    assert "clock" not in rows
    data = json.loads(printed("diff", "h100-sxm-80gb", "h100-sxm-96gb-hbm2e-500w", "--json")[1])
    assert data["values"]["power.limit"] == ["700 W", "500 W"]
    assert data["peaks"]["b"]["bf16"]["flop_per_byte"] == pytest.approx(989.4e12 / 2.4e12, rel=1e-3)


def test_a_chip_shows_whose_calibration_it_has_and_how_many_numbers_have_no_source() -> None:
    _, text = printed("show", "h100-sxm-96gb-hbm2e-500w")
    assert "# calibration: inherited from h100-sxm-80gb, changed: memory.hbm.technology" in text
    assert "# assumed: " in text
    data = json.loads(printed("show", "h100-sxm-96gb-hbm2e-500w", "--json")[1])
    assert data["calibration"]["base"] == "h100-sxm-80gb"
    assert {"path", "value", "kind", "text"} == set(data["values"][0])
    assert {value["text"] for value in data["values"] if value["kind"] == "source"} <= set(data["sources"])


def test_a_file_that_is_not_there_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["hw", "diff", "nothing.yaml", "h100-sxm-80gb"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "cosim: nothing.yaml: cannot be read: No such file or directory\n"
    assert printed("check", "nothing.yaml") == (2, "problem: nothing.yaml: cannot be read: No such file or directory\n")
