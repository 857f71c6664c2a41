"""Malformed run files, accelerator files and batches: each is one sentence with status 2, and nothing is written.

The files are real, and so is everything that reads them; every output is asked for, so that each could be left behind.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from cosim.cli import main
from hwmodels import accelerator

ROOT = Path(__file__).parents[2]
MODEL = "{family: llama, layers: 2, hidden: 64, heads: 4, kv_heads: 2, vocab: 128}"
RUN = f"""\
workload:
  model: {MODEL}
  seq_len: 64
  global_batch: 16
system: {{accelerator: h100-sxm-80gb, devices: 8}}
"""
OF_CHIP = RUN.replace("h100-sxm-80gb", "chip.yaml")
CHIP = (Path(accelerator.__file__).parent / "library" / "systolic-edge.yaml").read_text()
OUTPUTS = ["--json", "r.json", "--html", "r.html", "--perfetto", "r.trace", "--memory-snapshot", "r.pickle"]


def replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, old
    return text.replace(old, new)


def run(old: str, new: str) -> str:
    return replaced(RUN, old, new)


def chip(old: str, new: str) -> str:
    return replaced(CHIP, old, new)


RUN_FILES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "run.yaml: is empty"),
    "only a comment": ("# nothing\n", "run.yaml: is empty"),
    "a list": ("- workload\n- system\n", "must be a mapping with workload and system, not a list"),
    "a word": ("llama3-8b\n", "must be a mapping with workload and system, not 'llama3-8b'"),
    "an open bracket": (RUN + "training: {precision: bf16\n", "run.yaml, line 7: is not valid YAML: did not find"),
    "a tab": ("workload:\n\tmodel: gpt2\n", "run.yaml, line 2: is not valid YAML: found character that cannot"),
    "not text": (b"workload: \xff\xfe\n", "run.yaml: is not UTF-8 text (byte 10)"),
    "a null character": (b"work\0load: 1\n", "run.yaml: is not valid YAML: holds the control character U+0000"),
    "two documents": (RUN + "---\n" + RUN, "run.yaml, line 6: is not valid YAML: but found another document"),
    "a key twice": (RUN + "system: {devices: 1}\n", "run.yaml, line 6: the key 'system' is there twice"),
    "a tag": (RUN + "training: !!python/name:os.system {}\n", "line 6: the tag '!!python/name:os.system' is not"),
    "an alias to nothing": (RUN + "training: *recipe\n", "line 6: is not valid YAML: found undefined alias"),
    "no system": (RUN.partition("system")[0], "run.yaml: system is missing"),
    "no batch": (run("  global_batch: 16\n", ""), "run.yaml: workload.global_batch is missing"),
    "no sequence": (run("  seq_len: 64\n", ""), "workload.seq_len: missing; it is the number of tokens per sequence"),
    "a section without keys": (RUN.partition("system")[0] + "system:\n", "system: null must be a mapping"),
    "a section of text": (RUN + "training: bf16\n", "training: 'bf16' must be a mapping"),
    "an unknown section": (RUN + "trainng: {}\n", "trainng is not a key of the run file; did you mean 'training'?"),
    "an unknown key": (RUN + "training: {precison: bf16}\n", "training.precison is not a key of the run file; did"),
    "an unknown dimension": (run("hidden: 64", "hiden: 64"), "workload.model.hiden is not a key of the run file; did"),
    "an unknown family": (run("llama,", "lstm,"), "model.family: 'lstm' is not allowed; allowed: gpt, llama, bert, t5"),
    "an unknown model": (run(MODEL, "llama3-8"), "there is no model 'llama3-8'; did you mean llama3-8b"),
    "a model that is a list": (run(MODEL, "[gpt2]"), "workload.model: a list must be a name or a mapping"),
    "a module without a function": (
        run(MODEL, "{python: mine}"),
        "'mine' must be written like package.module:function",
    ),
    "a module that is not there": (
        run(MODEL, "{python: 'nosuch:build'}"),
        "python: 'nosuch:build': no module 'nosuch'",
    ),
    "text for a number": (run("seq_len: 64", "seq_len: long"), "workload.seq_len: 'long' must be a whole number"),
    "a number in quotes": (run("seq_len: 64", "seq_len: '64'"), "workload.seq_len: '64' must be a whole number"),
    "a number of 5000 digits": (
        run("seq_len: 64", "seq_len: " + "9" * 5000),
        "line 3: is not valid YAML: a number has",
    ),
    "half a sequence": (run("batch: 16", "batch: 16.5"), "workload.global_batch: 16.5 must be a whole number"),
    "a negative batch": (run("batch: 16", "batch: -16"), "workload.global_batch: -16 must be at least 1"),
    "a truth for a number": (run("devices: 8", "devices: true"), "system.devices: true must be a whole number"),
    "not a number": (RUN + "training: {dropout: .nan}\n", "training.dropout: nan must be a finite number"),
    "all dropped": (RUN + "training: {dropout: 1.0}\n", "training.dropout: 1.0 must be less than 1.0"),
    "an unknown format": (
        RUN + "training: {precision: bf17}\n",
        "'bf17' is not allowed; did you mean 'bf16'? allowed:",
    ),
    "not modelled yet": (
        run("  seq_len: 64", "  seq_len: 64\n  task: sft"),
        "workload.task: sft is not modelled yet; modelled today: pretrain",
    ),
    "a stage too many": (RUN + "parallel: {zero: 4}\n", "parallel.zero: 4 must be at most 3"),
    "recompute of no block": (RUN + "training: {recompute: {every: 0}}\n", "recompute.every: 0 must be at least 1"),
    "techniques that are no list": (RUN + "training: {techniques: {lora: {}}}\n", "a mapping must be a list"),
    "no unit": (run("devices: 8", "network: {inter_node: 400}"), "system.network.inter_node: 400 has no unit"),
    "a wrong unit": (run("devices: 8", "network: {inter_node: 4 GHz}"), "'GHz' in '4 GHz' is not a unit of bandwidth"),
    "a negative rate": (run("devices: 8", "network: {inter_node: -4 Gb/s}"), "'-4 Gb/s' must be finite and positive"),
    "a batch that does not divide": (run("batch: 16", "batch: 12"), "12 must be a multiple of micro_batch 1 x 8"),
    "heads that do not divide": (run("heads: 4, kv", "heads: 5, kv"), "model.heads: 5 does not divide hidden 64"),
    "half a node": (
        run("devices: 8", "devices: 12"),
        "system.devices: 12 must be a multiple of system.devices_per_node",
    ),
    "a key of another family": (
        run("  seq_len", "  masked_fraction: 0.1\n  seq_len"),
        "belongs to family bert, not to",
    ),
    "an unknown accelerator": (
        run("h100-sxm-80gb", "h100"),
        "system.accelerator: no accelerator is called 'h100'; did",
    ),
    "a change of nothing": (
        run("h100-sxm-80gb", "{base: h100-sxm-80gb, set: {matrix.corse: 3}}"),
        "system.accelerator: matrix.corse is not a known key; did you mean 'cores'?",
    ),
    "an accelerator that is no file": (OF_CHIP, "chip.yaml: cannot be read: No such file or directory"),
}

ACCELERATOR_FILES: dict[str, tuple[str, str]] = {
    "empty": ("", "chip.yaml: is empty"),
    "a list": ("[1, 2]\n", "chip.yaml: must be a mapping of keys to values"),
    "an open bracket": (CHIP + "cost: {\n", "is not valid YAML"),
    "no clock": (chip("clock: 1.0 GHz\n", ""), "chip.yaml: clock is missing"),
    "no memory": (chip("  sram: {size: 16 MiB, bandwidth: 4 TB/s}\n", ""), "memory.sram is missing"),
    "memory by another name": (
        chip("  hbm: {technology: hbm2e", "  dram: {technology: ddr5"),
        "memory.dram: main memory is called memory.hbm, whatever its technology",
    ),
    "an unknown section": (chip("process: 7 nm", "proces: 7 nm"), "proces is not a known key; did you mean 'process'?"),
    "a misspelt key": (
        chip("columns: 128", "colums: 128"),
        "matrix.columns is missing; there is 'colums', which is not",
    ),
    "a wrong unit": (chip("1.0 GHz", "1.0 GB"), "clock: 'GB' in '1.0 GB' is not a unit of frequency; write it like"),
    "no unit": (chip("1.0 GHz", "1.0"), "chip.yaml: clock: 1.0 has no unit; write it like '1.98 GHz'"),
    "a negative array": (chip("rows: 128", "rows: -128"), "matrix.rows: -128 must be between 1 and 65536"),
    "text for a number": (chip("rows: 128", "rows: many"), "matrix.rows: 'many' must be a number without a unit"),
    "an unknown dataflow": (chip("weight-stationary", "row-stationary"), "'row-stationary' is not one of output-stat"),
    "an unknown format": (chip("bf16: 1.0}", "bf17: 1.0}"), "matrix.formats.bf17: 'bf17' is not one of fp64, fp32"),
    "an unknown memory": (chip("technology: hbm2e", "technology: hbm9"), "'hbm9' is not one of hbm2, hbm2e, hbm3"),
    "an unknown topology": (chip("torus-2d", "klein-bottle"), "links.fabric.topology: 'klein-bottle' is not one of"),
    "a part that is text": (
        chip("{size: 16 MiB, bandwidth: 4 TB/s}", "16 MiB"),
        "memory.sram must be a mapping of keys",
    ),
    "no power": (chip("limit: 250 W", "limit: 0 W"), "power.limit: '0 W' must be finite and positive"),
    "more than all": (chip("calibration: {}", "calibration: {gemm: {efficiency: 1.5}}"), "1.5 must be between 0 and 1"),
    "its own base": (
        "name: loop\nbase: chip.yaml\n",
        "base: files build on each other in a circle: chip.yaml -> chip.yaml",
    ),
    "an unknown base": ("name: mine\nbase: h100\nset: {}\n", "base: no accelerator is called 'h100'; did you mean"),
}

_RUN = json.dumps(yaml.safe_load(RUN))
RUN_LINES: dict[str, tuple[str | bytes, str]] = {
    "not JSON": ("{oops", "is not valid JSON: Expecting property name enclosed in double quotes (column 2)"),
    "an empty line": ("", "is empty"),
    "cut off": (_RUN[:-3], "is not valid JSON: Expecting"),
    "two objects": (_RUN + " {}", "is not valid JSON: Extra data (column"),
    "a list": ("[1]", "must be a mapping with workload and system, not a list"),
    "not text": (b'{"workload": "\xff"}', "is not UTF-8 text (byte 14)"),
    "nested": ("[" * 100_000, "is nested too deeply"),
    "a key twice": ('{"system": {}, "system": {}}', "the key 'system' is there twice"),
    "half of a pair": (_RUN.replace("h100-sxm-80gb", "\\ud800"), "system.accelerator: '\\ud800' must be Unicode text"),
    "not a number": (_RUN[:-1] + ', "training": {"dropout": NaN}}', "training.dropout: nan must be a finite number"),
    "long": (_RUN.replace("64", "6" * 5000, 1), "a number has 5000 digits; allowed: 400"),
    "a wrong value": (_RUN.replace('"devices": 8', '"devices": "8"'), "system.devices: '8' must be a whole number"),
    "no such file": (_RUN.replace("h100-sxm-80gb", "chip.yaml"), "chip.yaml: cannot be read: No such file"),
}
OP_LINES: dict[str, tuple[str, str]] = {
    "not JSON": ("{oops", "is not valid JSON: Expecting property name enclosed in double quotes (column 2)"),
    "a number": ("7", "must be an object of columns, not 7"),
    "no op": ('{"accelerator": "x7"}', "no accelerator is called 'x7'"),
    "an unknown op": ('{"accelerator": "h200-sxm", "op": "gem"}', "op: 'gem' is not one of gemm, bmm"),
    "no size": ('{"accelerator": "h200-sxm", "op": "gemm", "m": 1, "n": 1}', "k is missing"),
    "a wrong size": ('{"accelerator": "h200-sxm", "op": "softmax", "m": -1}', "m: -1 must be a whole number of at"),
    "an unknown column": (
        '{"accelerator": "h200-sxm", "op": "gemm", "mm": 1}',
        "'mm' is not a known column; known are",
    ),
}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")}


def status_of(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check_refused(
    capsys: pytest.CaptureFixture[str], files: Mapping[str, str | bytes], begins: str, sentence: str, *arguments: str
) -> None:
    """Status 2 with one line on standard error, nothing on standard output, and the folder is what it was."""
    for name, text in files.items():
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    before = content(Path())
    assert status_of(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"cosim: {begins}")
    assert sentence in err
    assert len([line for line in err.splitlines() if line.strip()]) == 1
    assert len(err) < 500
    assert not any(
        word in err for word in ("Traceback", "internal error", "pydantic", "<unicode string>", "int_max_str")
    )
    assert content(Path()) == before


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("text", "sentence"), RUN_FILES.values(), ids=RUN_FILES)
def test_malformed_run_file(capsys: pytest.CaptureFixture[str], text: str | bytes, sentence: str) -> None:
    check_refused(capsys, {"run.yaml": text}, "run.yaml", sentence, "simulate", "run.yaml", *OUTPUTS)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("text", "sentence"), ACCELERATOR_FILES.values(), ids=ACCELERATOR_FILES)
def test_malformed_accelerator_file(capsys: pytest.CaptureFixture[str], text: str, sentence: str) -> None:
    files = {"run.yaml": OF_CHIP, "chip.yaml": text}
    check_refused(capsys, files, "run.yaml: chip.yaml", sentence, "simulate", "run.yaml", *OUTPUTS)
    gemm = ["gemm", "--m", "8", "--n", "8", "--k", "8"]
    check_refused(capsys, files, "chip.yaml", sentence, "cost", "--hw", "chip.yaml", *gemm)


@pytest.mark.parametrize(
    ("command", "lines", "counted"),
    [
        ("simulate", RUN_LINES, "runs could not be simulated; their lines say why"),
        ("cost", OP_LINES, "ops have no cost; their lines say why"),
    ],
    ids=["runs", "ops"],
)
def test_malformed_lines_of_a_batch_are_answered_one_by_one(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    lines: Mapping[str, tuple[str | bytes, str]],
    counted: str,
) -> None:
    given = [text if isinstance(text, bytes) else text.encode() for text, _ in lines.values()]
    (folder / "in.jsonl").write_bytes(b"\n".join(given))
    assert status_of(command, "--batch", "in.jsonl", "--json", "out.jsonl") == 0
    count = f"{len(lines)} of {len(lines)}"
    assert capsys.readouterr() == ("", f"cosim: {count} {counted}\n")
    assert sorted(content(folder)) == ["in.jsonl", "out.jsonl"]
    answers = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    for number, (answer, (name, (_, sentence))) in enumerate(zip(answers, lines.items(), strict=True), 1):
        assert list(answer) == ["error"], name
        assert answer["error"].startswith(f"in.jsonl, line {number}: ")
        assert sentence in answer["error"]
        assert "internal error" not in answer["error"]
        assert len(answer["error"]) < 500


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("name", "sentence"), [("missing.jsonl", "No such file"), (".", "Is a directory")])
@pytest.mark.parametrize("command", ["simulate", "cost"])
def test_a_batch_that_cannot_be_read(
    capsys: pytest.CaptureFixture[str], command: str, name: str, sentence: str
) -> None:
    check_refused(capsys, {}, f"--batch {name}: ", sentence, command, "--batch", name, "--json", "out.jsonl")


def test_a_process_of_its_own_says_the_same(tmp_path: Path) -> None:
    """One of each kind, as a shell starts it."""
    (tmp_path / "run.yaml").write_text(RUN_FILES["a negative batch"][0])  # type: ignore[arg-type]
    (tmp_path / "of_chip.yaml").write_text(OF_CHIP)
    (tmp_path / "chip.yaml").write_text(ACCELERATOR_FILES["a wrong unit"][0])
    before = content(tmp_path)
    for arguments, sentence in (
        (["simulate", "run.yaml", *OUTPUTS], RUN_FILES["a negative batch"][1]),
        (["simulate", "of_chip.yaml", *OUTPUTS], ACCELERATOR_FILES["a wrong unit"][1]),
        (["simulate", "--batch", "missing.jsonl", "--json", "out.jsonl"], "cannot be read"),
    ):
        ended = subprocess.run(
            [sys.executable, "-m", "cosim.cli", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr.startswith("cosim: ")
        assert ended.stderr.count("\n") == 1
        assert sentence in ended.stderr
    assert content(tmp_path) == before
