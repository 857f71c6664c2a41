"""FLOP of a traced step, against PyTorch's own counter and against closed forms."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from cosim.graph import Phase
from cosim.trace import TraceOptions, trace
from cosim.trace.vocabulary import flops, kind_bytes, kind_flops
from workloads import operators  # noqa: F401  registers cosim::attention
from workloads.build import build_module
from workloads.model import ModelConfig
from workloads.training import loss


def counted(model: ModelConfig, attention: str, batch: int, sequence: int) -> float:
    """torch.utils.flop_counter's count of forward and backward; it is told what cosim::attention is."""

    def forward(q, k, v, *_args, out_shape=None, **_kwargs):  # type: ignore[no-untyped-def]
        return sdpa_flop_count(q, q[:2] + k[2:], q[:2] + v[2:])

    def backward(grad, q, k, v, *_args, out_shape=None, **_kwargs):  # type: ignore[no-untyped-def]
        return sdpa_backward_flop_count(grad, q, q[:2] + k[2:], q[:2] + v[2:])

    known = {torch.ops.cosim.attention: forward, torch.ops.cosim.attention_backward: backward}
    with FakeTensorMode(), FlopCounterMode(display=False, custom_mapping=known) as counter:
        module = build_module(model, attention=attention, seq_len=sequence)  # type: ignore[arg-type]
        tokens = torch.zeros((batch, sequence), dtype=torch.int64)
        loss(module(tokens), tokens).backward()  # type: ignore[no-untyped-call]
    return float(counter.get_total_flops())


@pytest.mark.parametrize("attention", ["flash", "unfused"])
@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_flops_are_those_of_pytorchs_counter(family: str, attention: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(family)
    graph = trace(model, TraceOptions(attention=attention, batch=3, sequence=256))
    assert sum(flops(graph, halve_causal=False)) == pytest.approx(counted(model, attention, 3, 256), rel=5e-3)


def test_a_dense_step_is_six_flop_per_weight_and_token_plus_attention(llama: ModelConfig) -> None:
    batch, sequence = 2, 512
    graph = trace(llama, TraceOptions(batch=batch, sequence=sequence))
    weights = llama.layers * llama.layer_matmul_parameters() + llama.vocab * llama.hidden
    scores = 2 * batch * llama.heads * sequence**2 * llama.head_dim  # one product of full attention
    expected = 6.0 * weights * batch * sequence + llama.layers * (2 + 5) * scores
    assert sum(flops(graph, halve_causal=False)) == pytest.approx(expected, rel=1e-9)
    halved = sum(flops(graph)) - expected
    assert halved == pytest.approx(-llama.layers * 3.5 * scores, rel=1e-9)


def test_a_linear_layer_is_tn_forward_nn_for_its_input_and_nt_for_its_weight(llama: ModelConfig) -> None:
    graph = trace(llama, TraceOptions())
    layouts: dict[int, set[str]] = {Phase.FORWARD: set(), Phase.BACKWARD: set()}
    for op, kind in enumerate(graph.kinds[k] for k in graph.op_kind.tolist()):
        if kind.op_class == "matmul":
            layouts[int(graph.op_phase[op])].add(kind.attribute("layout"))
    assert layouts == {Phase.FORWARD: {"TN"}, Phase.BACKWARD: {"NN", "NT"}}


def test_attention_costs_two_products_forward_and_five_backward(gpt: ModelConfig) -> None:
    graph = trace(gpt, TraceOptions(batch=2, sequence=128))
    product = 2 * 2 * gpt.heads * 128 * 128 * gpt.head_dim
    found = {k.op_class: kind_flops(graph, k, halve_causal=False) for k in graph.kinds if "attention" in k.op_class}
    assert found == {"attention": 2 * product, "attention_backward": 5 * product}
    assert all(k.attribute("causal") is True for k in graph.kinds if "attention" in k.op_class)


def test_experts_in_one_grouped_product_cost_what_their_tokens_cost() -> None:
    """Forward and both gradients of a (tokens, k) by (experts, k, n) product are 2 tokens k n each."""
    tokens, inner, columns, experts = 64, 32, 48, 4

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, inner)
            self.weight = nn.Parameter(torch.empty(experts, inner, columns))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            ends = torch.empty(experts, dtype=torch.int32)
            return torch._grouped_mm(self.embed(ids).flatten(0, 1), self.weight, offs=ends).float().sum()

    options = TraceOptions(parameter_format="bf16", batch=4, sequence=tokens // 4)
    graph = trace(Experts, options)
    assert sum(flops(graph)) == pytest.approx(3 * 2 * tokens * inner * columns, rel=0.05)


class Convolving(nn.Module):
    """Tokens through one convolution: whole, or as one for each group of channels, which computes the same."""

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 32)
        self.convolution = convolution

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.convolution(self.embedding(tokens).transpose(1, 2))
        return x.square().mean()  # type: ignore[no-any-return]


class Apart(nn.Module):
    """The groups of a convolution as convolutions."""

    def __init__(self, whole: nn.Conv1d) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups, (padding,) = self.whole.groups, self.whole.padding
        pairs = zip(x.chunk(groups, 1), self.whole.weight.chunk(groups), strict=True)
        return torch.cat([nn.functional.conv1d(part, weight, padding=padding) for part, weight in pairs], 1)


def of_pytorch(module: nn.Module) -> tuple[float, torch.Tensor, torch.Tensor]:
    """The counter's FLOP of forward and backward, the result and the weight's gradient."""
    tokens = torch.arange(6 * 40).reshape(6, 40) % 100
    with FlopCounterMode(display=False) as counter:
        result = module(tokens)
        result.backward()
    return float(counter.get_total_flops()), result, next(module.convolution.parameters()).grad  # type: ignore[union-attr, return-value]


@pytest.mark.parametrize("groups", [2, 8, 32])
def test_groups_of_a_convolution_are_as_many_convolutions(groups: int) -> None:
    """Each multiplication of forward is one of each gradient. PyTorch's counter agrees where the groups are taken
    apart; of a grouped one it counts the weight's gradient between all channels (flop_counter.conv_backward_flop).
    """

    def convolution() -> nn.Conv1d:
        return nn.Conv1d(32, 64, 3, padding=1, groups=groups, bias=False)

    whole = convolution()
    together = Convolving(whole)
    counted_whole, result, gradient = of_pytorch(together)
    apart = Convolving(Apart(whole))
    apart.embedding = together.embedding
    whole.weight.grad = None
    counted_apart, again, gradient_again = of_pytorch(apart)
    torch.testing.assert_close(result, again)
    torch.testing.assert_close(gradient, gradient_again)
    forward = 2 * 6 * 40 * 64 * 3 * 32 // groups
    graph = trace(lambda: Convolving(convolution()), TraceOptions(batch=6, sequence=40))
    assert sum(flops(graph)) == counted_apart == 3 * forward
    assert counted_whole == (2 + groups) * forward


@pytest.mark.parametrize("stride", [1, 2, 5])
def test_a_transposed_convolution_multiplies_each_input_with_each_weight(stride: int) -> None:
    def module() -> nn.Module:
        return Convolving(nn.ConvTranspose1d(32, 48, 5, stride=stride))

    graph = trace(module, TraceOptions(batch=6, sequence=40))
    assert sum(flops(graph)) == of_pytorch(module())[0] == 3 * 2 * 6 * 40 * 32 * 48 * 5


def test_the_loss_does_not_read_the_log_probabilities_of_other_words(gpt: ModelConfig) -> None:
    graph = trace(gpt, TraceOptions(batch=2, sequence=64))
    tokens, row = 2 * 64, gpt.vocab * 4
    moved = {kind.target: kind_bytes(graph, kind) for kind in graph.kinds}
    assert sum(moved["aten.nll_loss_forward"]) < 16 * tokens
    read, write = moved["aten.nll_loss_backward"]
    assert read < 16 * tokens
    assert write == tokens * row
    read, write = moved["aten._log_softmax"]
    assert (read, write) == (tokens * row, tokens * row)


def test_an_embedding_reads_the_rows_that_it_returns(gpt: ModelConfig) -> None:
    graph = trace(gpt, TraceOptions(batch=2, sequence=64))
    tokens, row = 2 * 64, gpt.hidden * 4
    found = [kind_bytes(graph, kind) for kind in graph.kinds if kind.target == "aten.embedding"]
    assert (tokens * (row + 8), tokens * row) in found  # int64 indices


def test_views_and_fills_read_nothing_and_casts_read_what_they_are_given(gpt: ModelConfig) -> None:
    graph = trace(gpt, TraceOptions(parameter_format="bf16", master_format="fp32"))
    for kind in graph.kinds:
        read, write = kind_bytes(graph, kind)
        if kind.op_class == "view":
            assert (read, write) == (0, 0)
        if kind.op_class == "fill":
            assert read == 0
        if kind.target == "aten._to_copy":
            assert {read / write} <= {0.5, 2.0}
