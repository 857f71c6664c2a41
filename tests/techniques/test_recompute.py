"""Recomputation as a rewrite of the graph, against PyTorch's own checkpointing and against the papers' counts."""

from collections.abc import Callable

import numpy as np
import pytest
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cosim.graph import Category, OpGraph, Phase
from cosim.techniques.recompute import attention_cores, block_regions, recompute
from cosim.trace import TraceOptions, trace
from cosim.trace.vocabulary import flops
from workloads.build import build_module
from workloads.model import ModelConfig

Traced = Callable[..., OpGraph]
Models = Callable[[str], ModelConfig]
POLICIES = ("none", "selective", "selective_op", "full", 2, 3)


class Checkpointed(nn.Module):
    """A block that PyTorch recomputes: inputs are saved, the rest runs again in backward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *arguments: object) -> Tensor:
        return checkpoint(self.block, *arguments, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]


def by_pytorch(model: ModelConfig, options: TraceOptions, every: int = 1) -> OpGraph:
    """The trace of the same model whose blocks (every n-th) PyTorch checkpoints itself."""

    def build() -> nn.Module:
        attention: object = options.attention
        module = build_module(model, attention=attention, dropout=options.dropout, seq_len=options.sequence)  # type: ignore[arg-type]
        for number in range(0, model.layers, every):
            module.layers[number] = Checkpointed(module.layers[number])  # type: ignore[index, operator]
        return module

    return trace(build, options)


def census(graph: OpGraph, phase: Phase) -> dict[str, int]:
    """How often each operator that costs something runs in a phase."""
    found: dict[str, int] = {}
    for op in np.flatnonzero(graph.op_phase == phase).tolist():
        kind = graph.kinds[graph.op_kind[op]]
        if kind.op_class != "view":
            found[kind.target] = found.get(kind.target, 0) + 1
    return found


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("attention", ["flash", "unfused"])
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_full_recomputation_is_what_pytorch_checkpointing_does(
    name: str, attention: str, every: int, model: Models, traced: Traced, live: Callable[..., np.ndarray]
) -> None:
    """Same operators again (it stops early), same bytes saved by forward, same peak of activations in backward."""
    theirs = by_pytorch(model(name), TraceOptions(attention=attention, batch=2, sequence=64), every)
    ours = recompute(traced(name, attention=attention), "full" if every == 1 else every)
    assert census(ours, Phase.RECOMPUTE) == census(theirs, Phase.RECOMPUTE)
    assert census(ours, Phase.BACKWARD) == census(theirs, Phase.BACKWARD)
    passing = (Category.ACTIVATIONS, Category.TEMPORARY)
    ends = [int(np.flatnonzero(graph.op_phase == Phase.FORWARD)[-1]) for graph in (ours, theirs)]
    mine, real = live(ours, *passing), live(theirs, *passing)
    assert mine[ends[0]] == pytest.approx(real[ends[1]], rel=0.01)
    assert mine.max() == pytest.approx(real.max(), rel=0.01)
    later = (Phase.BACKWARD, Phase.RECOMPUTE)
    inside = [np.isin(graph.op_phase, later) & (graph.op_layer >= 0) for graph in (ours, theirs)]
    assert mine[inside[0]].max() == pytest.approx(real[inside[1]].max(), rel=0.01)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["gpt", "llama", "untied"])
@pytest.mark.parametrize("attention", ["flash", "unfused"])
def test_forward_and_backward_stay_as_they_were(
    name: str, attention: str, policy: str | int, traced: Traced, alive: Callable[[OpGraph], None]
) -> None:
    before = traced(name, attention=attention, dropout=0.1, autocast_format="bf16")
    after = recompute(before, policy)
    alive(after)
    for phase in (Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER):
        assert after.op_kind[after.op_phase == phase].tolist() == before.op_kind[before.op_phase == phase].tolist()
    again = float(np.sum(np.array(flops(after))[after.op_phase == Phase.RECOMPUTE]))
    forward = float(np.sum(np.array(flops(before))[before.op_phase == Phase.FORWARD]))
    assert sum(flops(after)) == pytest.approx(sum(flops(before)) + again)
    assert 0 <= again < forward


def test_selective_recompute_costs_nothing_with_flash_attention(traced: Traced) -> None:
    for name in ("gpt", "llama"):
        graph = traced(name, dropout=0.1)
        assert recompute(graph, "selective") is graph


def test_none_and_models_without_blocks_are_left_alone(traced: Traced) -> None:
    graph = trace(lambda: nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 50)), TraceOptions(batch=2, sequence=8))
    assert graph.blocks == ()
    for policy in POLICIES:
        assert recompute(graph, policy) is graph
    assert recompute(traced("gpt"), "none") is traced("gpt")


def test_selective_recompute_frees_korthikantis_attention_term(
    model: Models, traced: Traced, saved: Callable[[OpGraph], int]
) -> None:
    """Of s b h (34 + 5 a s / h) bytes per layer, 5 a s^2 b are freed: softmax's output, dropout's mask and output.

    arXiv 2205.05198, section 4.2 and equation 4, 16 bit with dropout.
    """
    dimensions, options = model("gpt"), {"attention": "unfused", "dropout": 0.1, "parameter_format": "bf16"}
    graph = traced("gpt", **options).bind(batch=4, sequence=128)
    layers, heads, s, b = dimensions.layers, dimensions.heads, 128, 4
    freed = saved(graph) - saved(recompute(graph, "selective"))
    assert freed == layers * 5 * heads * s * s * b


def test_selective_recompute_runs_the_scores_and_their_softmax_again(traced: Traced, count: Callable[..., int]) -> None:
    """QK^T, scale, mask, softmax, dropout; not the product with V, whose result nothing but the projection saves."""
    graph = traced("gpt", attention="unfused", dropout=0.1)
    after = recompute(graph, "selective")
    assert len(attention_cores(graph)) == 3
    again = census(after, Phase.RECOMPUTE)
    assert again["aten._softmax"] == again["aten.native_dropout"] == again["aten.bmm"] == 3
    assert count(after, "matmul", Phase.RECOMPUTE) == 3


def test_every_nth_block_saves_its_share(traced: Traced, saved: Callable[[OpGraph], int]) -> None:
    """Blocks 0, n, 2n, ... are regions; each frees as much as one block of `full` does."""
    graph = traced("untied")
    every, second = recompute(graph, "full"), recompute(graph, 2)
    assert [region[0] for region in block_regions(graph, 2)] == [block_regions(graph)[0][0]]
    assert saved(graph) - saved(every) == 2 * (saved(graph) - saved(second))
    assert recompute(graph, 1).op_kind.tolist() == every.op_kind.tolist()


def test_full_keeps_only_the_inputs_of_blocks(model: Models, traced: Traced, saved: Callable[[OpGraph], int]) -> None:
    """s b h elements per block; what lies outside blocks is untouched (Chen et al. 2016)."""
    graph = traced("gpt", parameter_format="bf16")
    in_blocks = (graph.op_layer[graph.storage_alloc] >= 0) & (graph.storage_alloc >= 0)
    inside = int(graph.storage_bytes[in_blocks & (graph.storage_category == Category.ACTIVATIONS)].sum())
    dimensions = model("gpt")
    residual = 2 * 64 * dimensions.hidden * 2
    # The first block's input is the embedding's and never counted as inside; the last one's output is the norm's input.
    assert saved(recompute(graph, "full")) == saved(graph) - inside + dimensions.layers * residual


def test_selective_op_runs_every_other_matrix_product_again(traced: Traced, count: Callable[..., int]) -> None:
    """torchtitan's policy on Llama: of q k v o gate up down, the even ones of each block, and never attention."""
    graph = recompute(traced("llama"), "selective_op")
    assert count(graph, "matmul", Phase.RECOMPUTE) == 3 * 3
    assert count(graph, "attention", Phase.RECOMPUTE) == 0
