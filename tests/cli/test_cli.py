"""The command line: bad input is one sentence and status 2, outputs are whole or absent, Ctrl-C leaves nothing."""

import json
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest

from cosim.cli import main

FAKE = Path(__file__).with_name("fake_run.py")
ROOT = Path(__file__).parents[2]
RUN: dict[str, Any] = {
    "workload": {"model": "gpt2", "seq_len": 1024, "global_batch": 64},
    "system": {"accelerator": "h100-sxm-80gb", "devices": 8},
}
_found = spec_from_file_location("fake_run", FAKE)
assert _found is not None
assert _found.loader is not None
fake_run = module_from_spec(_found)
_found.loader.exec_module(fake_run)
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    returncode: int
    stdout: str
    stderr: str


def cosim(*arguments: str | Path, cwd: Path, text: str = "") -> Finished:
    """`cosim` with `arguments` in folder `cwd`, with a stand-in for the simulation and `text` as standard input."""
    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        for name, module in fake_run.modules().items():
            patch.setitem(sys.modules, name, module)
        patch.setattr(sys, "stdin", TextIOWrapper(BytesIO(text.encode())))
        patch.chdir(cwd)
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
    assert isinstance(end.value.code, int)
    return Finished(end.value.code, out.getvalue(), err.getvalue())


def refused(process: Finished, sentence: str) -> None:
    """Status 2, `sentence` on the one line of standard error."""
    assert process.returncode == 2, process.stderr
    assert process.stderr.count("\n") == 1, process.stderr
    assert process.stderr.startswith("cosim: ")
    assert sentence in process.stderr
    assert "Traceback" not in process.stderr


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A good run file, alone in its folder."""
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(RUN))
    return path


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "bad.yaml: is empty"),
        ("a: 1\na: 2\n", "the key 'a' is there twice"),
        ("a: !!python/object/apply:os.system [echo]\n", "the tag"),
        (LAUGHS, "aliases"),
        ("a: '" + "x" * 10_000_000 + "'", "larger than the 1 MB"),
        ("[" * 100_000, "nested deeper"),
        ("workload: [", "is not valid YAML"),
        (json.dumps(RUN).replace("seq_len", "seqlen"), "did you mean 'seq_len'?"),
    ],
    ids=["empty", "twice", "tag", "laughs", "large", "deep", "broken", "unknown key"],
)
def test_bad_file_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    refused(cosim("simulate", "bad.yaml", "--json", "out.json", "--html", "out.html", cwd=tmp_path), sentence)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["simulate"], "give one run file"),
        (["simulate", "missing.yaml"], "missing.yaml: cannot be read: No such file"),
        (["simulate", "run.yaml", "--set", "training.precison=bf16"], "did you mean 'precision'?"),
        (["simulate", "run.yaml", "--set", "system.network.inter_node=400 GHz"], "is not a unit of bandwidth"),
        (["simulate", "run.yaml", "--set", "system.devices=0"], "at least 1"),
        (["simulate", "run.yaml", "--set", "workload.task=sft"], "workload.task: sft is not modelled yet"),
        (["simulate", "run.yaml", "--json", "no/such/folder/x.json"], "cannot be written: No such file"),
        (["simulate", "run.yaml", "--html", "."], "is a directory"),
        (["simulate", "run.yaml", "--json", "run.yaml"], "is the same file as"),
        (["simulate", "run.yaml", "--json", "a", "--html", "a"], "is the same file as"),
        (["simulate", "run.yaml", "--json", "/proc/x.json"], "cannot be written"),
        (["simulate", "run.yaml", "--frobnicate"], "No such option"),
        (["simulate", "--batch", "missing.jsonl"], "missing.jsonl: cannot be read"),
        (["simulate", "--batch", "."], "directory"),
        (["simulate", "--batch", "run.yaml", "--html", "x.html"], "leave it out"),
        (["simulate", "--batch", "run.yaml", "--perfetto", "x.json"], "--perfetto: a batch has no report"),
        (["simulate", "run.yaml", "--perfetto", "a", "--memory-snapshot", "a"], "is the same file as"),
        (["hw", "show", "h100-smx-80gb"], "did you mean h100-sxm-80gb"),
        (["workload", "show", "lama3-8b"], "llama3-8b"),
        (["validate", "show", "mosaicml-27"], "did you mean 'mosaicml-"),
        (["validate", "published", "--group", "nosuch"], "groups are "),
        (["validate", "published", "--source", "nosuch"], "sources are "),
    ],
)
def test_bad_argument_is_one_sentence(run_file: Path, arguments: list[str], sentence: str) -> None:
    refused(cosim(*arguments, cwd=run_file.parent), sentence)
    assert [path.name for path in run_file.parent.iterdir()] == ["run.yaml"]


def test_what_the_simulation_refuses_writes_nothing(run_file: Path) -> None:
    process = cosim("simulate", run_file, "--set", "training.dropout=0.5", "--json", "out.json", cwd=run_file.parent)
    assert process.returncode == 2
    assert process.stderr == f"cosim: {run_file}: training.precision: this chip has no such format\n"
    assert [path.name for path in run_file.parent.iterdir()] == ["run.yaml"]


def test_simulate_writes_its_outputs(run_file: Path) -> None:
    process = cosim("simulate", run_file, "--json", "out.json", "--html", "out.html", cwd=run_file.parent)
    assert (process.returncode, process.stderr) == (0, "")
    assert "a table" in process.stdout
    assert json.loads((run_file.parent / "out.json").read_text()) == {"devices": 8}
    assert sorted(path.name for path in run_file.parent.iterdir()) == ["out.html", "out.json", "run.yaml"]
    assert (run_file.parent / "out.json").stat().st_mode & 0o777 == run_file.stat().st_mode & 0o777


def test_simulate_reads_standard_input_and_changes(tmp_path: Path) -> None:
    changes = ["--set", "system.devices=16", "--set", "workload.micro_batch=2"]
    process = cosim("simulate", "-", *changes, "--json", "out.json", cwd=tmp_path, text=json.dumps(RUN))
    assert process.returncode == 0
    assert json.loads((tmp_path / "out.json").read_text()) == {"devices": 16}


def test_output_may_be_a_device(run_file: Path) -> None:
    process = cosim("simulate", run_file, "--json", "/dev/null", cwd=run_file.parent)
    assert process.returncode == 0
    assert Path("/dev/null").is_char_device()


def test_bad_lines_of_a_batch_are_answered_in_order_and_the_others_still_run(tmp_path: Path) -> None:
    lines = [
        json.dumps(RUN),
        "{not json",
        json.dumps(RUN | {"training": {"dropout": 0.5}}),
        "",
        '{"x": "' + "x" * 3_000_000 + '"}',
        json.dumps(RUN | {"system": {"accelerator": "h100-sxm-80gb", "devices": 16}}),
    ]
    (tmp_path / "runs.jsonl").write_text("\n".join(lines))
    process = cosim("simulate", "--batch", "runs.jsonl", "--json", "out.jsonl", cwd=tmp_path)
    assert process.returncode == 0
    assert process.stderr == "cosim: 4 of 6 runs could not be simulated; their lines say why\n"
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [answer.get("devices") for answer in answers] == [8, None, None, None, None, 16]
    assert "runs.jsonl, line 2: is not valid JSON" in answers[1]["error"]
    assert answers[2] == {"error": "runs.jsonl, line 3: training.precision: this chip has no such format"}
    assert "line 4" in answers[3]["error"]
    assert "larger than the 1 MB" in answers[4]["error"]


@pytest.mark.parametrize(
    ("number", "status", "sentence"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "ended by SIGTERM"),
        (signal.SIGHUP, 129, "ended by SIGHUP"),
    ],
)
def test_a_signal_is_one_line_and_leaves_nothing(run_file: Path, number: int, status: int, sentence: str) -> None:
    command = [sys.executable, str(FAKE), "30", "simulate", "run.yaml", "--json", "out.json", "--html", "out.html"]
    with subprocess.Popen(
        command,
        cwd=run_file.parent,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # a shell's background jobs ignore some of them
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "simulating\n"
        time.sleep(0.1)
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == status
    assert errors == f"cosim: {sentence}\n"
    assert [path.name for path in run_file.parent.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    ("command", "status", "errors"),
    [
        ("schema | true", 141, ""),
        ("--help | true", 141, ""),
        ("simulate run.yaml | true", 141, ""),
        ("schema > /dev/full", 2, "cosim: standard output: No space left on device\n"),
        ("schema >&-", 2, "cosim: standard output is closed; give it a place, for example > /dev/null\n"),
        ("simulate - <&-", 2, "cosim: standard input: is closed; give it a run file, or name one\n"),
        ("simulate --batch - <&-", 2, "cosim: --batch -: standard input is closed\n"),
        (
            "simulate run.yaml --json /dev/full",
            2,
            "cosim: --json /dev/full: cannot be written: No space left on device\n",
        ),
        ("simulate --batch run.yaml > /dev/full", 2, "No space left on device\n"),
        ("simulate run.yaml --json /dev/stdout | grep devices > seen", 0, ""),
        ("simulate run.yaml --json - | grep devices > seen", 0, ""),
        ("simulate run.yaml --json /dev/stdout > seen; grep -q devices seen", 0, ""),
    ],
)
def test_streams_that_are_closed_full_or_gone(run_file: Path, command: str, status: int, errors: str) -> None:
    first, _, rest = command.partition("|")
    line = f"'{sys.executable}' '{FAKE}' 0 {first}" + (
        f"|{rest}; exit $((PIPESTATUS[0] + PIPESTATUS[1]))" if rest else ""
    )
    ran = subprocess.run(
        ["bash", "-c", line], cwd=run_file.parent, capture_output=True, text=True, env=ENVIRONMENT, timeout=60
    )
    assert ran.returncode == status, ran.stderr
    assert ran.stderr.endswith(errors)
    assert ran.stderr.count("\n") == (1 if errors else 0)


def test_no_link_lets_an_output_replace_what_is_read_or_written(run_file: Path) -> None:
    folder, before = run_file.parent, run_file.read_text()
    (folder / "cache").mkdir()
    (folder / "link.json").symlink_to("run.yaml")
    (folder / "hard.json").hardlink_to(run_file)
    (folder / "one").symlink_to("both")
    (folder / "two").symlink_to("both")
    for arguments in (
        ["run.yaml", "--json", "./cache/../run.yaml"],
        ["run.yaml", "--json", "link.json"],
        ["run.yaml", "--json", "hard.json"],
        ["link.json", "--html", "run.yaml"],
        ["run.yaml", "--json", "one", "--html", "two"],
        ["--batch", "link.json", "--json", "run.yaml"],
        ["run.yaml", "--json", "-", "--html", "-"],
    ):
        refused(cosim("simulate", *arguments, cwd=folder), "is the same file as")
        assert run_file.read_text() == before
    assert not (folder / "both").exists()


def test_an_output_does_not_replace_the_accelerators_file(run_file: Path) -> None:
    chip = run_file.parent / "chip.yaml"
    chip.write_text("name: mine")
    change = ["--set", "system.accelerator=chip.yaml", "--json", "./chip.yaml"]
    refused(cosim("simulate", run_file, *change, cwd=run_file.parent), "is the same file as system.accelerator")
    assert chip.read_text() == "name: mine"


def test_what_nobody_foresaw_costs_a_batch_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps(RUN | {"training": {"dropout": dropout}}) for dropout in (0.0, 0.25, 0.0)]
    process = cosim("simulate", "--batch", "-", cwd=tmp_path, text="\n".join(lines))
    assert process.returncode == 0
    answers = [json.loads(line) for line in process.stdout.splitlines()]
    assert [answer.get("devices") for answer in answers] == [8, None, 8]
    assert "-, line 2: internal error: ZeroDivisionError: nobody foresaw this" in answers[1]["error"]
    assert "Traceback" not in process.stderr
    monkeypatch.setenv("COSIM_DEBUG", "1")
    assert "Traceback" in cosim("simulate", "--batch", "-", cwd=tmp_path, text=lines[1]).stderr
    alone = cosim("simulate", "-", cwd=tmp_path, text=lines[1])
    assert alone.returncode == 70
    assert "internal error: ZeroDivisionError" in alone.stderr


def test_what_a_users_module_prints_is_no_result(tmp_path: Path) -> None:
    process = cosim("simulate", "--batch", "-", cwd=tmp_path, text=json.dumps(RUN | {"training": {"dropout": 0.125}}))
    assert json.loads(process.stdout) == {"devices": 8}
    assert process.stderr == "a user's module says hello\n"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--help"], "simulate"),
        (["--version"], "."),
        (["hw", "list"], "h100-sxm-80gb"),
        (["hw", "show", "h100-sxm-80gb"], "name: h100-sxm-80gb"),
        (["workload", "list"], "llama3-70b"),
        (["workload", "show", "llama3-8b"], "kv_heads: 8"),
        (["schema"], '"$defs"'),
        (["validate", "show", "mosaicml-0027"], "framework: composer"),
        (["validate", "published", "--group", "llama-fp8-sft"], "not modelled yet (workload.task: sft)"),
    ],
)
def test_commands_that_only_print(tmp_path: Path, arguments: list[str], shown: str) -> None:
    process = cosim(*arguments, cwd=tmp_path)
    assert (process.returncode, process.stderr) == (0, "")
    assert shown in process.stdout


def test_help_and_lists_load_no_heavy_library(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom cosim.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'numpy', 'scipy', 'plotly', 'transformers') if name in sys.modules])"
    )
    for arguments in (["--help"], ["hw", "list"], ["workload", "list"]):
        out = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=60
        ).stdout
        assert out.splitlines()[-1] == "[]"


def test_validate_show_prints_a_run_file(tmp_path: Path) -> None:
    shown = cosim("validate", "show", "mosaicml-0027", cwd=tmp_path).stdout
    process = cosim("simulate", "-", "--json", "out.json", cwd=tmp_path, text=shown)
    assert process.returncode == 0
    assert json.loads((tmp_path / "out.json").read_text()) == {"devices": 8}


def test_simulate_stays_the_call_when_its_module_is_imported() -> None:
    program = (
        "import sys\nfrom types import ModuleType\nimport cosim\nmodule = ModuleType('cosim.simulate')\n"
        "module.simulate = print\ncosim.simulate = module\nassert cosim.simulate is print\n"
        "assert cosim.RunSpec.__name__ == 'RunSpec'"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=60)


def test_what_is_printed_holds_no_control_characters(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text('"\\e[31m": 1\n"\\e[31m": 2\n')
    refused(cosim("simulate", "bad.yaml", cwd=tmp_path), "'?[31m' is there twice")
