"""Every family and Hugging Face class traces, and the trace counts what PyTorch counts."""

from pathlib import Path

import pytest
from rich.console import Console

from cosim.trace import TraceOptions, trace
from cosim.validate import coverage
from hwmodels.units import InputError
from workloads.model import PythonModel

MODELS = dict(coverage.models("tiny"))


@pytest.mark.parametrize("name", MODELS)
def test_flops_and_parameters_are_pytorchs_and_no_operator_is_unknown(name: str) -> None:
    if name[0].isupper():
        pytest.importorskip("transformers")
    row = coverage.cover(name, MODELS[name], "tiny")
    assert row.problem == ""
    assert row.unknown == {}
    assert row.parameters == row.counted_parameters
    assert abs(row.flops_error) <= coverage.FLOPS_BOUND
    assert row.good


def test_the_families_and_classes_are_all_there() -> None:
    assert {"gpt", "llama", "bert", "t5", "vit", "moe", "T5ForConditionalGeneration", "GemmaForCausalLM"} <= set(MODELS)
    assert [name for name, _ in coverage.models("real", "deepseek")] == ["deepseek-v2"]
    with pytest.raises(InputError, match="no family or class has 'rnn' in its name; there are gpt, llama"):
        coverage.check("tiny", "rnn")


def test_a_model_that_cannot_be_traced_is_a_row_with_its_sentence(tmp_path: Path) -> None:
    (tmp_path / "branching.py").write_text(
        "import torch\n"
        "from workloads.encoder import Encoder\n"
        "class Branching(Encoder):\n"
        "    def forward(self, tokens):\n"
        "        x = super().forward(tokens)\n"
        "        return x + x[x > 0].mean()\n"
        "def build():\n"
        "    return Branching(1, 16, 2, 30)\n"
    )
    model = PythonModel("branching:build", {}, tmp_path)
    row = coverage.cover("branching", model, "tiny")
    assert not row.good
    assert "branching.py:6 makes a tensor whose shape depends on the values" in row.problem
    console = Console(width=150, record=True, quiet=False, file=(tmp_path / "out").open("w"))
    coverage.print_coverage([row], console)
    assert "cannot be traced" in console.export_text()


def test_an_encoder_layer_of_pytorch_has_one_attention_op() -> None:
    graph = trace(MODELS["torch.nn.TransformerEncoder"], TraceOptions(batch=2, sequence=64))
    classes = [graph.kinds[kind].op_class for kind in graph.op_kind.tolist()]
    assert classes.count("attention") == classes.count("attention_backward") == 2
    assert [block.path for block in graph.blocks] == ["encoder.layers.*"]
