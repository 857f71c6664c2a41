"""The peak of a traced step is that of a real one: operator for operator, category by category."""

from pathlib import Path

import pytest

from cosim.cli import main
from cosim.graph import Category, Phase
from cosim.trace import TraceOptions
from cosim.validate import cpu_memory
from hwmodels.units import InputError
from workloads.model import from_dimensions

MODELS = {name: (model, options) for name, model, options in cpu_memory.models()}


@pytest.mark.parametrize("name", ["gpt", "llama, bf16", "moe", "torch.nn.TransformerEncoder"])
def test_the_peak_is_that_of_a_real_step(name: str) -> None:
    case = cpu_memory.case(name, *MODELS[name])
    assert case.good
    for phase in cpu_memory.PHASES:
        assert abs(case.phase_error(phase)) <= cpu_memory.BOUND
    for category, measured in case.measured.categories.items():
        assert case.predicted.categories[category] == pytest.approx(measured, rel=0.01, abs=1024)


def test_what_is_measured_is_what_a_closed_form_says() -> None:
    """In fp32 with AdamW 4 + 8 bytes per parameter stay, 4 more are gradients, and foreach takes 4 for its roots."""
    dimensions = {"family": "gpt", "layers": 1, "hidden": 256, "heads": 4, "vocab": 64, "max_positions": 16}
    options = TraceOptions(attention="unfused", optimizer_implementation="foreach", batch=1, sequence=16)
    case = cpu_memory.case("gpt", from_dimensions(dimensions), options)
    assert case.measured.phase == Phase.OPTIMIZER
    assert case.measured.categories[Category.WEIGHTS] == 4 * case.parameters
    assert case.measured.total == pytest.approx((4 + 8 + 4 + 4) * case.parameters, rel=1e-3)


def test_the_eight_models_are_there() -> None:
    families = {"gpt", "llama", "bert", "t5", "vit", "moe"}
    assert families | {"llama, bf16", "LlamaForCausalLM", "torch.nn.TransformerEncoder"} == set(MODELS)
    with pytest.raises(InputError, match="no model has 'rnn' in its name; there are gpt, llama"):
        cpu_memory.check("rnn")


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "memory.md"
    with pytest.raises(SystemExit) as end:
        main(["validate", "memory", "t5", "--markdown", str(page)])
    assert end.value.code == 0
    assert "Peak of a training step" in capsys.readouterr().out
    text = page.read_text()
    assert f"`cosim validate memory t5 --markdown {page}`" in text
    assert "| t5 " in text
    assert list(tmp_path.iterdir()) == [page]
