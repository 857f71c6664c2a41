"""Every output of the commands, from a run file on standard input, with the simulation that they really run."""

import json
import pickle
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest

from cosim.cli import main

RUN = """
workload:
  model: {family: gpt, layers: 2, hidden: 64, heads: 2, vocab: 128}
  seq_len: 64
  global_batch: 16
system: {accelerator: h100-sxm-80gb, devices: 8}
"""
OUTPUTS = ["--json", "r.json", "--html", "r.html", "--perfetto", "r.json.gz", "--memory-snapshot", "r.pickle"]


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str, text: str = RUN) -> int:
    """The exit status of `cosim` with `text` as standard input."""
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(text.encode())))
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_on_standard_input_gives_all_outputs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "simulate", "-", "--set", "parallel.zero=3", *OUTPUTS) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["r.html", "r.json", "r.json.gz", "r.pickle"]
    assert "Step time" in capsys.readouterr().out
    result = json.loads((folder / "r.json").read_text())
    assert result["spec"]["parallel"]["zero"] == 3
    assert (folder / "r.html").read_text().startswith("<!doctype html>")
    assert (folder / "r.json.gz").read_bytes()[:2] == b"\x1f\x8b"
    assert pickle.loads((folder / "r.pickle").read_bytes())["segments"]


def test_a_bad_run_on_standard_input_gives_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "simulate", "-", *OUTPUTS, text=RUN.replace("heads: 2", "heads: 3")) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["step.json", "step.graphml"])
def test_a_graph_says_the_same_as_its_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert command(monkeypatch, "trace", "-", "-o", name) == 0
    assert capsys.readouterr().out.startswith(f"{name}: ")
    assert command(monkeypatch, "graph", "summary", name) == 0
    from_file = capsys.readouterr().out
    assert command(monkeypatch, "graph", "summary", "-") == 0
    assert capsys.readouterr().out == from_file
    assert "2 x layers.*" in from_file
    assert "unknown ops        none" in from_file


def test_techniques_are_in_the_graph(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "graph", "summary", "-") == 0
    assert "recompute" not in capsys.readouterr().out
    assert command(monkeypatch, "graph", "summary", "-", "--set", "training.recompute=full") == 0
    assert "recompute  matmul" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trace", "-"], "Missing option"),
        (["trace", "-", "-o", "step.dot"], "allowed: .graphml, .json"),
        (["trace", "run.yaml", "-o", "run.yaml"], "is the same file as"),
        (["trace", "missing.yaml", "-o", "step.json"], "missing.yaml: cannot be read"),
        (["trace", "-", "-o", "no/such/folder/step.json"], "cannot be written: No such file"),
        (["graph", "summary", "missing.graphml"], "cannot be read"),
        (["graph", "summary", "missing.json"], "cannot be read"),
        (["graph"], ""),
    ],
)
def test_bad_arguments_are_one_sentence(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    assert command(monkeypatch, *arguments) == 2
    assert sentence in capsys.readouterr().err
    assert list(folder.iterdir()) == []


def test_nothing_can_be_set_in_a_graph(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "step.graphml").touch()
    assert command(monkeypatch, "graph", "summary", "step.graphml", "--set", "training.recompute=full") == 2
    assert "is a graph, in which nothing can be set" in capsys.readouterr().err


def test_a_users_module_is_found_beside_the_batch_and_what_it_prints_is_no_result(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "runs").mkdir()
    (folder / "runs" / "chatty.py").write_text(
        "from workloads.encoder import Encoder\nprint('importing')\n"
        "class Chatty(Encoder):\n    def forward(self, tokens):\n        print('forward')\n"
        "        return super().forward(tokens)\n"
        "def build():\n    print('building')\n    return Chatty(2, 64, 4, 300)\n"
    )
    run = {
        "workload": {"model": {"python": "chatty:build"}, "seq_len": 64, "global_batch": 8},
        "system": {"accelerator": "h100-sxm-80gb", "devices": 8},
    }
    (folder / "runs" / "runs.jsonl").write_text(json.dumps(run) + "\n")
    assert command(monkeypatch, "simulate", "--batch", "runs/runs.jsonl") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["step_time_s"] > 0
    assert {"importing", "building", "forward"} <= set(shown.err.splitlines())
