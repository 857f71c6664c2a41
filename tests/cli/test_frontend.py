"""`--frontend compile`: what torch.compile captures, from the command line."""

import pytest

from cosim.cli import main

RUN = """
workload: {model: {family: gpt, layers: 1, hidden: 64, heads: 2, vocab: 128}, seq_len: 64, global_batch: 2}
system: {accelerator: h100-sxm-80gb, devices: 1}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN)


def status(*arguments: str) -> object:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return end.value.code


def test_the_captured_graph_is_written_and_summed_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("trace", "run.yaml", "--frontend", "compile", "-o", "step.json") == 0
    assert status("graph", "summary", "step.json") == 0
    of_file = capsys.readouterr().out
    assert status("graph", "summary", "run.yaml", "--frontend", "compile") == 0
    assert capsys.readouterr().out in of_file
    assert "recompute" in of_file


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--frontend", "jit"], "'eager', 'compile'"),
        (
            ["--frontend", "compile", "--set", "training.recompute=full"],
            "allowed with training.compile captured, or that frontend: none",
        ),
    ],
)
def test_what_it_cannot_be_asked_is_one_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status("graph", "summary", "run.yaml", *arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
