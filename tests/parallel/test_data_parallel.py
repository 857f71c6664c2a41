"""Plans of data parallelism, against ZeRO's closed forms, the model's own parameter list and PyTorch's DDP."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch

from cosim.graph import Category, OpGraph, Phase
from cosim.parallel.data_parallel import ROOT, DataParallelPlan, plan
from cosim.parallel.groups import groups
from cosim.parallel.layout import Sharding
from cosim.parallel.sharding import shard
from cosim.techniques.optimizers import state_bytes
from cosim.techniques.precision import StepFormats
from cosim.trace import TraceOptions, trace
from workloads.build import build_module
from workloads.model import from_dimensions

MASTERS = StepFormats(parameter=2, master=4, gradient=2, gather=2, reduce=2, optimizer_state=8)
Planned = Callable[..., DataParallelPlan]
Traced = Callable[[str], OpGraph]


def held_bytes(plan: DataParallelPlan) -> int:
    """Resident bytes, and gradients as the plan cuts them."""
    gradients = math.ceil(plan.trainable * plan.formats.gradient / plan.shards(Category.GRADIENTS))
    return sum(plan.resident_bytes().values()) + gradients - plan.buffer_bytes


@pytest.mark.parametrize("degree", [1, 2, 7, 8, 64])
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_bytes_per_rank_are_zeros_closed_forms(name: str, degree: int, planned: Planned, traced: Traced) -> None:
    """16P, 4P + 12P/N, 2P + 14P/N, 16P/N (arXiv 1910.02054, figure 1), uneven N included.

    ZeRO 3 keeps one fp32 copy, from which 16 bits are gathered: 4 + 2 + 8 bytes where the paper has 2 + 2 + 12. One
    device shards nothing.
    """
    P, N = traced(name).parameter_count(), degree
    expected = {0: 16 * P, 1: 4 * P + 12 * P / N, 2: 2 * P + 14 * P / N, 3: 14 * P / N if N > 1 else 16 * P}
    for zero, size in expected.items():
        assert held_bytes(planned(name, zero=zero, degree=degree)) == pytest.approx(size, abs=3)


@pytest.mark.parametrize(
    ("formats", "per_parameter"),
    [
        (StepFormats(4, 4, 4, 2, 4, 8), 16),  # autocast: fp32 parameters, gradients and moments
        (StepFormats(2, 4, 4, 2, 4, 8), 18),  # masters, and fp32 gradients
        (StepFormats(4, 4, 4, 4, 4, 8), 16),  # fp32
        (StepFormats(4, 4, 4, 4, 4, 4), 12),  # fp32, SGD with momentum
    ],
)
def test_every_way_of_mixing_formats_adds_up(
    formats: StepFormats, per_parameter: int, planned: Planned, traced: Traced
) -> None:
    P = traced("tied").parameter_count()
    assert held_bytes(planned("tied", formats=formats)) == per_parameter * P
    sharded = planned("tied", formats=formats, zero=3, degree=4)
    one_copy = per_parameter - (formats.parameter if formats.master != formats.parameter else 0)
    assert held_bytes(sharded) == pytest.approx(one_copy * P / 4, abs=3)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("master", [None, "fp32"])
def test_optimizer_states_are_those_that_pytorch_allocates(optimizer: str, master: str | None) -> None:
    """Adam has two moments and SGD one; with the masters they are all that the trace holds for the optimizer."""
    model = from_dimensions({"family": "gpt", "layers": 2, "hidden": 64, "heads": 2, "vocab": 128, "max_positions": 32})
    parameter = "bf16" if master else "fp32"
    graph = trace(model, TraceOptions(optimizer=optimizer, master_format=master, parameter_format=parameter))
    held = int(graph.storage_bytes[graph.storage_category == Category.OPTIMIZER].sum())
    expected = graph.parameter_count() * ((4 if optimizer == "sgd" else 8) + (4 if master else 0))
    assert held == pytest.approx(expected, rel=2e-3)  # and the step counts
    assert state_bytes(graph) == (4 if optimizer == "sgd" else 8)


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_units_partition_the_parameters(name: str, planned: Planned, traced: Traced) -> None:
    """A tied embedding counts once, with the root; every block's unit is as large as PyTorch's block."""
    graph, plan = traced(name), planned(name, zero=3)
    assert plan.elements == plan.trainable == graph.parameter_count()
    assert [unit.layer for unit in plan.units] == [ROOT, 0, 1, 2]
    assert len({(unit.elements, unit.tensors) for unit in plan.units[1:]}) == 1
    block = build_module(from_dimensions(_DIMENSIONS[name])).layers[0]  # type: ignore[index]
    parameters = list(block.parameters())  # type: ignore[union-attr]
    assert (plan.units[1].elements, plan.units[1].tensors) == (sum(p.numel() for p in parameters), len(parameters))


def test_frozen_parameters_are_gathered_and_not_reduced(planned: Planned, traced: Traced) -> None:
    """A model whose embedding does not learn: its gradient has no bucket, its bytes no optimizer state."""
    graph = traced("untied")
    frozen = tuple(dataclasses.replace(p, trainable="embedding" not in p.name) for p in graph.parameters)
    from cosim.parallel.data_parallel import plan as make
    from cosim.parallel.groups import group

    still = {"group": group(8, 1, 8, 8), "overlap_gradients": True, "overlap_parameters": True}
    size = {"bucket_bytes": 2**16, "first_bucket_bytes": 2**14, "formats": StepFormats(2, 4, 4, 2, 4, 8)}
    plan = make(dataclasses.replace(graph, parameters=frozen), zero=0, **still, **size)  # type: ignore[arg-type]
    learning = graph.parameter_count() - 300 * 64
    assert (plan.elements, plan.trainable) == (graph.parameter_count(), learning)
    assert sum(bucket.elements for bucket in plan.buckets) == learning
    assert plan.resident_bytes()[Category.OPTIMIZER] == 12 * learning


@pytest.mark.parametrize("name", ["tied", "untied"])
@pytest.mark.parametrize(("bucket", "first"), [(2**16, 2**14), (2**18, 2**18), (2**40, 2**40), (1, 1)])
def test_buckets_partition_the_gradients_and_are_full_except_the_last(
    name: str, bucket: int, first: int, planned: Planned, traced: Traced
) -> None:
    graph = traced(name)
    plan = planned(name, bucket_bytes=bucket, first_bucket_bytes=first)
    sizes = [b.elements * plan.formats.gradient for b in plan.buckets]
    assert sum(b.elements for b in plan.buckets) == graph.parameter_count()
    assert all(size >= (bucket if i else first) for i, size in enumerate(sizes[:-1]))
    largest = max(math.prod(graph.shapes[p.spec]) for p in graph.parameters) * plan.formats.gradient
    assert all(size < (bucket if i else first) + largest for i, size in enumerate(sizes))
    assert planned(name, zero=3).buckets == ()


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_a_bucket_is_ready_when_autograd_has_made_its_gradients(name: str, planned: Planned, traced: Traced) -> None:
    """Blocks in reverse, the embedding (and a tied head) last: the order of PyTorch's own accumulation hooks."""
    graph = traced(name)
    plan = planned(name, bucket_bytes=1, first_bucket_bytes=1)  # one parameter each
    assert [b.ready for b in plan.buckets] == sorted(b.ready for b in plan.buckets)
    assert (graph.op_phase[[b.ready for b in plan.buckets]] == Phase.BACKWARD).all()
    order = _accumulation_order(name)
    layers = [int(n.split(".")[1]) if n.startswith("layers.") else ROOT for n in order]
    ours = [int(graph.op_layer[b.ready]) for b in plan.buckets]
    blocks = lambda found: list(dict.fromkeys(layer for layer in found if layer != ROOT))  # noqa: E731
    assert blocks(ours) == blocks(layers) == [2, 1, 0]
    last = int(graph.op_phase.searchsorted(Phase.OPTIMIZER)) - 1
    assert order[-1].startswith(("embedding", "position_embedding"))
    assert plan.buckets[-1].ready == last
    if name == "untied":  # the head's is first
        assert plan.buckets[0].ready < min(b.ready for b in plan.buckets if graph.op_layer[b.ready] == 2)
        assert order[0].startswith(("head", "norm"))


def _accumulation_order(name: str) -> list[str]:
    """Parameters in the order in which a real backward completes their gradients."""
    module = build_module(from_dimensions(_DIMENSIONS[name]), seq_len=16)
    found: list[str] = []
    for parameter_name, parameter in module.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, n=parameter_name: found.append(n))  # type: ignore[misc]
    module(torch.zeros((1, 16), dtype=torch.int64)).float().sum().backward()
    return found


_DIMENSIONS = {
    "tied": {"family": "gpt", "layers": 3, "hidden": 64, "heads": 2, "vocab": 301, "max_positions": 128},
    "untied": {"family": "llama", "layers": 3, "hidden": 64, "heads": 4, "kv_heads": 2, "ffn": 160, "vocab": 300},
}


def test_experts_are_reduced_and_cut_over_the_ranks_that_hold_them() -> None:
    """64 ranks, 8 of which share the experts: their states are cut into 8 parts, everything else's into 64."""
    model = {"family": "moe", "layers": 3, "hidden": 64, "heads": 4, "vocab": 300, "num_experts": 8,
             "experts_per_token": 2, "moe_ffn": 32, "ffn": 128}  # fmt: skip
    step = trace(from_dimensions(model), TraceOptions(batch=1, sequence=64))
    how = Sharding(expert=8)
    ranks, graph = groups(how, data=64, pipeline=1, domain=8), shard(step, how)
    made = plan(graph, group=ranks.data, expert_group=ranks.expert_data, zero=1, formats=MASTERS, bucket_bytes=2**14,
                overlap_gradients=True, overlap_parameters=True, first_bucket_bytes=2**14)  # fmt: skip
    of_experts = sum(math.prod(graph.shapes[p.spec]) for p in graph.parameters if ".experts." in p.name)
    others = graph.parameter_count() - of_experts
    assert of_experts == 3 * 3 * 64 * 32  # one of the 8 of each layer
    assert made.resident_bytes()[Category.OPTIMIZER] == pytest.approx(12 * (others / 64 + of_experts / 8), abs=2)
    held = {experts: sum(b.elements for b in made.buckets if b.experts == experts) for experts in (False, True)}
    assert held == {False: others, True: of_experts}
    assert [made.group_of(experts).size for experts in (False, True)] == [64, 8]
    assert [bucket.ready for bucket in made.buckets] == sorted(bucket.ready for bucket in made.buckets)
