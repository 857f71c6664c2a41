"""A module whose Python code reads values of its tensors is traced along the path that small random tensors take."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cosim
from cosim.graph import OpGraph, Phase
from cosim.trace import TraceOptions, trace
from cosim.trace import values as of_values
from cosim.trace.step import DataDependentError

Body = Callable[[Tensor], Tensor]


class Tiny(nn.Module):
    """Embedding, whatever the test gives, and a head."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.embed, self.inner, self.head, self.body = (
            nn.Embedding(100, 32),
            nn.Linear(32, 32),
            nn.Linear(32, 100),
            body,
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.inner(self.embed(tokens))))  # type: ignore[no-any-return]


def traced(body: Body) -> OpGraph:
    return trace(lambda: Tiny(body), TraceOptions(batch=2, sequence=64))


def targets(graph: OpGraph, phase: Phase = Phase.FORWARD) -> list[str]:
    return [graph.kinds[kind].target for kind in graph.op_kind[graph.op_phase == phase].tolist()]


def assumed(graph: OpGraph) -> str:
    (line,) = graph.provenance["assumed_values"]
    return str(line)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_branch_is_taken_as_real_tensors_take_it_in_forward_and_backward(sign: int) -> None:
    def body(x: Tensor) -> Tensor:
        if sign * x.square().sum() > 0:
            return torch.tanh(x)
        return torch.sigmoid(x)

    graph = traced(body)
    taken, other = ("tanh", "sigmoid") if sign > 0 else ("sigmoid", "tanh")
    assert f"aten.{taken}" in targets(graph)
    assert f"aten.{taken}_backward" in targets(graph, Phase.BACKWARD)
    assert f"aten.{other}" not in targets(graph)
    assert assumed(graph).endswith(f"({sign > 0})")
    assert graph.provenance["fixed"] == {}
    assert graph.axes["batch"] == 2
    assert graph.axes["sequence"] == 64


def test_the_rest_of_the_graph_is_that_of_the_same_module_without_the_branch() -> None:
    plain = traced(lambda x: torch.tanh(x))
    branching = traced(lambda x: torch.tanh(x) if x.isfinite().all() else x)
    reading = ("aten._local_scalar_dense", "aten.all", "aten.eq", "aten.abs", "aten.ne", "aten.mul", "aten.isfinite")
    assert [t for t in targets(branching) if t not in reading] == [t for t in targets(plain) if t not in reading]
    assert targets(branching, Phase.BACKWARD) == targets(plain, Phase.BACKWARD)


def test_a_number_read_as_a_scale_is_a_number_and_a_wait_of_the_host() -> None:
    graph = traced(lambda x: x * x.abs().mean().item())
    assert targets(graph).count("aten._local_scalar_dense") == 1
    assert re.search(r"test_values\.py:\d+ \(0\.\d+\)$", assumed(graph))


def test_a_loop_that_ends_early_has_the_rounds_that_real_tensors_need() -> None:
    def body(x: Tensor) -> Tensor:
        for _ in range(20):
            x = torch.tanh(x)
            if x.abs().max().item() < 0.5:
                break
        return x

    graph = traced(body)
    torch.manual_seed(0)  # the rehearsal's own draws: weights, then 3 x 13 tokens
    module = Tiny(body)
    x, rounds = module.inner(module.embed(torch.randint(0, 100, (3, 13)))), 0
    while rounds == 0 or x.abs().max().item() >= 0.5:
        x, rounds = torch.tanh(x), rounds + 1
    assert rounds > 1
    assert targets(graph).count("aten.tanh") == rounds
    assert targets(graph, Phase.BACKWARD).count("aten.tanh_backward") == rounds


def test_a_length_that_follows_the_sizes_follows_them_in_the_trace() -> None:
    def body(x: Tensor) -> Tensor:
        longest = int((x[..., 0] > -1e9).sum(1).max())
        return x + x[:, : longest - 1].mean(1, keepdim=True)

    graph = traced(body)
    assert assumed(graph).endswith("(as its sizes)")
    assert graph.bind(sequence=128).axes["sequence"] == 128
    sliced = [k for k in graph.kinds if k.target == "aten.mean" and graph.shapes[k.outputs[0]] == (2, 1, 32)]
    assert [graph.specs[k.inputs[0]].dims[1] for k in sliced] == [("sequence",)]


def test_a_count_that_only_decides_a_branch_is_allowed_and_one_that_decides_a_shape_is_not() -> None:
    def branch(x: Tensor) -> Tensor:
        return x * 2 if int((x > 0).sum()) > 3 else x

    def shape(x: Tensor) -> Tensor:
        return x[:, : int((x[0, :, 0] > 0).sum())].mean(1, keepdim=True) + x

    assert assumed(traced(branch))
    with pytest.raises(DataDependentError, match=r"test_values\.py:\d+ reads a whole number .* follow that number"):
        traced(shape)


@pytest.mark.parametrize("select", [lambda x: x[x > 0], lambda x: x[(x[..., 0] > 0).nonzero()[:, 0]]])
def test_a_shape_that_depends_on_values_is_one_sentence_with_file_and_line(select: Body) -> None:
    with pytest.raises(
        DataDependentError, match=r"^model: \S*test_values\.py:\d+ makes a tensor whose shape dep"
    ) as told:
        traced(lambda x: x + select(x).mean())
    assert "\n" not in str(told.value)


def test_tolist_is_read_number_by_number() -> None:
    assert len(traced(lambda x: x * sum(x[0, 0].tolist()))) > len(traced(lambda x: x * 2.0))


def test_a_branch_inside_a_checkpoint_is_read_again_in_backward() -> None:
    def inside(x: Tensor) -> Tensor:
        return torch.tanh(x) * x if x.isfinite().all() else x

    graph = traced(lambda x: checkpoint(inside, x, use_reentrant=False))
    assert targets(graph, Phase.RECOMPUTE).count("aten.tanh") == 1


def test_numbers_read_while_the_module_is_built_are_no_assumption_about_its_branches() -> None:
    class Deep(Tiny):
        def __init__(self) -> None:
            rates = [rate.item() for rate in torch.linspace(0, 0.2, 4)]
            super().__init__(lambda x: x * rates[-1])

    graph = trace(Deep, TraceOptions(batch=2, sequence=64))
    assert "assumed_values" not in graph.provenance
    assert "aten.mul" in targets(graph)


class Encoder(nn.Module):
    """PyTorch's encoder with a causal mask, which it compares with one of its own: a branch on values."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(32, 100)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.head(self.encoder(self.embed(tokens), mask=mask))  # type: ignore[no-any-return]


def test_pytorchs_encoder_finds_its_mask_to_be_causal_and_uses_one_attention_per_layer() -> None:
    graph = trace(Encoder, TraceOptions(batch=2, sequence=64))
    assert graph.provenance["fixed"] == {}
    assert sum("attention" in t for t in targets(graph)) == 2
    assert assumed(graph).endswith("(True)")


def test_many_weights_are_not_made_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_values, "MOST_BYTES", 4 * 100)
    with pytest.raises(DataDependentError, match=r"weights are too large .* to run it"):
        traced(lambda x: x if x.sum() > 0 else -x)


def test_what_the_rehearsal_raises_is_in_the_sentence() -> None:
    def body(x: Tensor) -> Tensor:
        if x.sum() > -1e9:
            raise ValueError("not with real numbers")
        return x

    with pytest.raises(DataDependentError, match=r"on small real ones .*ValueError: not with real numbers"):
        traced(body)


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    traced(lambda x: x if x.sum() > 0 else -x)
    assert torch.equal(torch.rand(1), expected)


def test_the_result_of_a_run_warns_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "branching.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Gate(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.embed, self.head = nn.Embedding(64, 16), nn.Linear(16, 64)\n"
        "    def forward(self, tokens):\n"
        "        x = self.embed(tokens)\n"
        "        if x.square().sum() > 0:\n"
        "            x = torch.tanh(x)\n"
        "        return self.head(x)\n"
    )
    (tmp_path / "run.yaml").write_text(
        "workload: {model: {python: 'branching:Gate'}, seq_len: 64, global_batch: 4, micro_batch: 2}\n"
        "system: {accelerator: h100-sxm-80gb, devices: 2}\n"
    )
    result = cosim.simulate(cosim.RunSpec.load(tmp_path / "run.yaml"))
    (warning,) = result.warnings
    assert "branching.py:9 (True)" in warning
    assert "workload.model" in warning
