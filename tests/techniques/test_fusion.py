"""Fusion as a rewrite of the graph: what it may change, and what must stay."""

from collections.abc import Callable

import numpy as np
import pytest

from cosim.graph import Category, OpGraph, Phase
from cosim.techniques.fusion import FUSIBLE, HandFused, fuse, fuse_by_hand
from cosim.techniques.recompute import recompute
from cosim.trace.vocabulary import flops, kind_bytes

Traced = Callable[..., OpGraph]
OPTIONS = [
    {"attention": "flash", "autocast_format": "bf16", "dropout": 0.1},
    {"attention": "unfused", "parameter_format": "bf16", "master_format": "fp32", "gradient_format": "fp32"},
]


def kernels(graph: OpGraph) -> int:
    """Ops that launch a kernel, the optimizer's left out."""
    views = np.array([kind.op_class == "view" for kind in graph.kinds])
    return int((~views[graph.op_kind] & (graph.op_phase != Phase.OPTIMIZER)).sum())


def moved(graph: OpGraph) -> float:
    """Bytes over memory, each operand of each kernel once."""
    per_kind = [sum(kind_bytes(graph, kind)) for kind in graph.kinds]
    return float(sum(per_kind[kind] for kind in graph.op_kind.tolist()))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_matrix_products_stay_and_memory_traffic_and_kernels_fall(
    name: str, options: dict[str, object], traced: Traced, alive: Callable[[OpGraph], None]
) -> None:
    graph = traced(name, **options)
    block, model = fuse(graph, "block"), fuse(graph, "model")
    for fused in (block, model):
        for kept in fused.blocks:  # what is said of a block is what it has
            for layer in kept.layers:
                phases = fused.op_phase[fused.op_layer == layer]
                assert [kept.forward_ops, kept.backward_ops] == np.bincount(phases, minlength=2)[:2].tolist()
        assert sum(flops(fused)) == sum(flops(graph))
        alive(fused)
    assert kernels(model) < kernels(block) < kernels(graph)
    assert moved(model) < moved(block) < moved(graph)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_a_fused_kernel_reads_and_writes_what_it_must_once(
    name: str, options: dict[str, object], traced: Traced
) -> None:
    """By brute force on storages: what a group reads that it did not make, and makes that anyone reads later."""
    graph = traced(name, **options)
    fused = fuse(graph, "model")
    classes = [kind.op_class for kind in graph.kinds]
    origin = _members(graph, fused)
    last_read: dict[int, int] = {}
    for op in range(len(graph)):
        for tensor in graph.op_inputs.row(op).tolist():
            last_read[int(graph.tensor_storage[tensor])] = op
    found = 0
    for op, group in origin.items():
        if len(group) == 1:
            continue
        found += 1
        assert all(classes[graph.op_kind[member]] in FUSIBLE for member in group)
        reads: set[int] = set()
        made: set[int] = set()
        for member in group:
            reads |= {int(graph.tensor_storage[t]) for t in graph.op_inputs.row(member).tolist()} - made
            made |= {int(graph.tensor_storage[t]) for t in graph.op_outputs.row(member).tolist()}
            made |= {int(graph.tensor_storage[t]) for t in _written(graph, member)}
        needed = {s for s in made if last_read.get(s, -1) > group[-1] or graph.storage_free[s] > group[-1]}
        assert {int(fused.tensor_storage[t]) for t in fused.op_inputs.row(op).tolist()} == reads
        written = {int(fused.tensor_storage[t]) for t in fused.op_outputs.row(op).tolist()}
        assert {s for s in needed if last_read.get(s, -1) > group[-1]} <= written <= made
    assert found > 10


def _written(graph: OpGraph, op: int) -> list[int]:
    inputs = graph.op_inputs.row(op).tolist()
    return [inputs[i] for i in graph.kinds[graph.op_kind[op]].mutated]


def _members(graph: OpGraph, fused: OpGraph) -> dict[int, list[int]]:
    """Op of the fused graph that costs something -> the ops that it stands for, found by walking both in order."""
    real = [op for op, kind in enumerate(graph.op_kind.tolist()) if graph.kinds[kind].op_class != "view"]
    members: dict[int, list[int]] = {}
    for number, row in enumerate(fused.op_kind.tolist()):
        kind = fused.kinds[row]
        if kind.op_class != "view":
            wanted = list(kind.attribute("members", (row,)))
            members[number], real = real[: len(wanted)], real[len(wanted) :]
            assert graph.op_kind[members[number]].tolist() == wanted
    assert not real
    return members


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_what_backward_needs_survives(name: str, traced: Traced, saved: Callable[[OpGraph], int]) -> None:
    graph = traced(name, **OPTIONS[0])
    fused = fuse(graph, "model", loss=True)
    backward = np.flatnonzero(graph.op_phase == Phase.BACKWARD)
    read = np.unique(np.concatenate([graph.tensor_storage[graph.op_inputs.row(op)] for op in backward.tolist()]))
    kept = read[graph.storage_category[read] == Category.ACTIVATIONS]
    assert (fused.storage_alloc[kept] >= 0).all()
    assert saved(fused) == pytest.approx(saved(graph), abs=64)  # scalars that autograd keeps and nobody reads


def test_intermediates_are_never_allocated(traced: Traced, live: Callable[..., np.ndarray]) -> None:
    graph = traced("llama", **OPTIONS[0])
    fused = fuse(graph, "model", loss=True)
    gone = (graph.storage_alloc >= 0) & (fused.storage_alloc < 0)
    assert gone.sum() > 30
    small = graph.storage_bytes <= 64  # scalars that autograd keeps and nobody reads
    assert (graph.storage_category[gone & ~small] == Category.TEMPORARY).all()
    touched = fused.tensor_storage[np.concatenate([fused.op_inputs.indices, fused.op_outputs.indices])]
    assert not np.isin(np.flatnonzero(gone), touched).any()
    assert live(fused, Category.TEMPORARY).max() <= live(graph, Category.TEMPORARY).max()


def test_block_scope_leaves_the_rest_eager_and_the_loss_is_its_own_choice(traced: Traced) -> None:
    """torchtitan compiles each block and not the loss; Composer the whole model."""
    graph = traced("llama", **OPTIONS[0])
    outside = lambda g: int((g.op_layer[[k == "fused" for k in _targets(g)]] < 0).sum())  # noqa: E731
    assert outside(fuse(graph, "block")) == 0
    assert outside(fuse(graph, "model")) > 0
    for scope in ("block", "model"):
        without, with_loss = fuse(graph, scope), fuse(graph, scope, loss=True)
        assert sum(target.startswith("aten.nll_loss") for target in _targets(without)) == 2
        assert sum(target.startswith("aten.nll_loss") for target in _targets(with_loss)) == 0
        assert kernels(with_loss) < kernels(without)


def _targets(graph: OpGraph) -> list[str]:
    return [graph.kinds[kind].target for kind in graph.op_kind.tolist()]


@pytest.mark.parametrize("policy", ["selective", "selective_op", "full", 2])
@pytest.mark.parametrize("options", OPTIONS)
def test_what_is_recomputed_is_fused_too(
    policy: str | int, options: dict[str, object], traced: Traced, alive: Callable[[OpGraph], None]
) -> None:
    plain = recompute(traced("gpt", **options), policy)
    fused = fuse(plain, "block")
    alive(fused)
    assert sum(flops(fused)) == sum(flops(plain))
    for phase in (Phase.FORWARD, Phase.BACKWARD):
        assert _moved_in(fused, phase) < _moved_in(plain, phase)
    if policy == "full":  # forward does not write what backward makes again
        assert _moved_in(fused, Phase.FORWARD) < _moved_in(fuse(traced("gpt", **options), "block"), Phase.FORWARD)


def _moved_in(graph: OpGraph, phase: Phase) -> float:
    per_kind = [sum(kind_bytes(graph, kind)) for kind in graph.kinds]
    return float(sum(per_kind[kind] for kind in graph.op_kind[graph.op_phase == phase].tolist()))


UNFUSED = {"attention": "unfused", "dropout": 0.1, "parameter_format": "bf16", "master_format": "fp32"}


def of_scores(graph: OpGraph) -> float:
    """Bytes that pointwise and row-wise kernels of a block move for each element of the scores."""
    layer = graph.blocks[0].layers[1]
    scores = 2 * 4 * 64 * 64
    total = 0.0
    for op in np.flatnonzero((graph.op_layer == layer) & (graph.op_phase != Phase.OPTIMIZER)).tolist():
        kind = graph.kinds[graph.op_kind[op]]
        shapes = {graph.shapes[spec] for spec in (*kind.inputs, *kind.outputs)}
        if (2, 4, 64, 64) in shapes and kind.op_class not in ("matmul", "view", "copy"):
            total += sum(kind_bytes(graph, kind))
    return total / scores


def test_a_fused_softmax_reads_the_scores_once_and_writes_them_once(traced: Traced) -> None:
    """Forward: scale, mask, softmax 2 + 2 each, the fused kernel 2 + 2; backward 4 + 2 and twice 2 + 2, fused 4 + 2;
    dropout of the weights stays (2 + 2 + 1, and as much backward).
    """
    graph = traced("gpt", **UNFUSED)
    mask = 64 * 64 / (2 * 4 * 64 * 64)  # read once by each kernel that masks
    assert of_scores(graph) == pytest.approx(3 * 4 + (6 + 2 * 4) + 2 * 5 + 2 * mask)
    assert of_scores(fuse_by_hand(graph, HandFused(softmax_longest=2048))) == pytest.approx(4 + 6 + 2 * 5 + 2 * mask)


@pytest.mark.parametrize(
    "fused", [HandFused(softmax_longest=63), HandFused(softmax_longest=2048, tensor=4), HandFused()]
)
def test_a_softmax_too_long_or_of_too_few_heads_is_left_alone(fused: HandFused, traced: Traced) -> None:
    """Two sequences of four heads over four ranks: two softmaxes each, and the kernel takes fours."""
    graph = traced("gpt", **UNFUSED)
    assert kernels(fuse_by_hand(graph, fused)) == kernels(graph)


def test_dropout_and_the_residual_sum_are_one_kernel_of_one_tensor_less(
    traced: Traced, alive: Callable[[OpGraph], None]
) -> None:
    graph = traced("gpt", **UNFUSED)
    fused = fuse_by_hand(graph, HandFused(dropout_add=True))
    alive(fused)
    assert kernels(graph) - kernels(fused) == 2 * 3  # two branches of three blocks
    assert moved(graph) - moved(fused) == 2 * 3 * 2 * (2 * 2 * 64 * 96)  # what was written and read again


def test_a_rotary_embedding_is_one_kernel_there_and_back(traced: Traced, alive: Callable[[OpGraph], None]) -> None:
    """Two tensors, forward and backward, five kernels each; a fused one reads x and the table and writes the result."""
    graph = traced("llama", parameter_format="bf16", master_format="fp32")
    fused = fuse_by_hand(graph, HandFused(rotary=True))
    alive(fused)
    assert kernels(graph) - kernels(fused) == 3 * 2 * 2 * (5 - 1)
    found = [kind for kind in fused.kinds if kind.target == "fused"]
    for kind in found:
        query = max(2 * np.prod(fused.shapes[spec]) for spec in kind.inputs)
        assert sum(kind_bytes(fused, kind)) == 2 * query + 2 * (2 * 64 * 16)


def test_nothing_is_fused_by_hand_unless_asked(traced: Traced) -> None:
    graph = traced("gpt", **UNFUSED)
    assert fuse_by_hand(graph, HandFused()) is graph
