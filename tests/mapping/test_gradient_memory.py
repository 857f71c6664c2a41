"""When gradients come to memory and when they go, against the trace's own lifetimes and against torch on this CPU."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cosim.graph import Category, Phase
from cosim.memory import memory_over_time

Step = Callable[..., Any]


def gradients_over_time(step: Any) -> tuple[np.ndarray, np.ndarray]:
    """(seconds, bytes of gradients) of a played step."""
    curve, _ = memory_over_time(step.program, step.timeline, 0, step.resident)
    return curve.time_s, curve.bytes[curve.categories.index("gradients")]


def test_gradients_come_with_the_ops_that_make_them(step: Step) -> None:
    """On one device: at each op of backward as many bytes as the graph's storages that are alive then."""
    played = step("gpt", degree=1, micro_steps=1, one_copy=True)
    graph = played.graph
    made = (graph.storage_category == Category.GRADIENTS) & (graph.op_phase[graph.storage_alloc] == Phase.BACKWARD)
    sizes = -(-graph.storage_bytes[made] // 512) * 512
    order = np.argsort(graph.storage_alloc[made], kind="stable")
    expected = np.cumsum(sizes[order])
    _, held = gradients_over_time(played)
    levels = np.unique(held[: int(held.argmax()) + 1])
    assert held.max() == expected[-1]
    assert set(levels.tolist()) <= {0, *expected.tolist()}
    assert len(levels) > len(graph.blocks[0].layers)  # not a lump per block


def test_a_later_micro_steps_gradient_stands_beside_the_sum(step: Step) -> None:
    """Once per parameter and no longer than its op: the most is all gradients and the largest one again."""
    one, two = (step("gpt", degree=1, micro_steps=n, one_copy=True) for n in (1, 2))
    graph = one.graph
    largest = max(int(graph.storage_bytes[p.storage]) for p in graph.parameters)
    (_, single), (_, summed) = gradients_over_time(one), gradients_over_time(two)
    assert summed.max() - single.max() == pytest.approx(largest, abs=512)


def test_torch_adds_gradients_one_by_one() -> None:
    """What the model rests on: in a second backward, never more than one new gradient is beside the sums."""
    import torch

    layers = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(8)))
    for parameter in layers.parameters():
        parameter.grad = torch.zeros_like(parameter)
    alive: list[int] = []
    beside: list[int] = []

    def made(gradient: torch.Tensor) -> torch.Tensor:
        alive.append(1)
        beside.append(len(alive))
        return gradient

    def added(_: torch.Tensor) -> None:
        alive.pop()

    for parameter in layers.parameters():
        parameter.register_hook(made)
        parameter.register_post_accumulate_grad_hook(added)
    before = [parameter.grad.data_ptr() for parameter in layers.parameters() if parameter.grad is not None]
    layers(torch.randn(4, 64)).sum().backward()
    assert beside == [1] * 8
    assert [p.grad.data_ptr() for p in layers.parameters() if p.grad is not None] == before  # added in place


def test_fsdp_frees_whole_gradients_with_the_copy_into_the_reduction(step: Step) -> None:
    """ZeRO 3: no more than the root's and two blocks' whole gradients, and one buffer, whatever the reduction takes."""
    played = step("llama", zero=3, micro_steps=2, collectives_serialised=False)
    curve, _ = memory_over_time(played.program, played.timeline, 0, played.resident)
    root, block = (2 * played.plan.units[i].trainable for i in (0, 1))
    shards = 2 * played.plan.trainable / played.plan.degree
    rounding = 512 * sum(unit.tensors for unit in played.plan.units)
    held = curve.bytes[curve.categories.index("gradients")]
    assert held.max() <= root + block + shards + rounding


def test_a_copy_waits_for_the_reduction_before_it(step: Step) -> None:
    """FSDP 2 keeps one buffer of reductions: a slow network stops compute, where a stack without limit runs on."""
    times = {}
    for limit in (0, 1, 2):
        played = step("llama", zero=3, per_node=1, micro_steps=1, reductions_in_flight=limit)
        program, timeline = played.program, played.timeline
        labels = [program.labels[label] for label in program.label.tolist()]
        copies = [i for i, label in enumerate(labels) if label.name == "copy gradients for reduction"]
        reductions = [i for i, label in enumerate(labels) if label.kind == "reduce_scatter"]
        times[limit] = played.time_s
        if limit:
            for copy, reduction in zip(copies[limit:], reductions, strict=False):
                assert timeline.start_ps[copy] >= timeline.end_ps[reduction]
    assert times[0] <= times[2] <= times[1]


@pytest.mark.parametrize("zero", [2, 3])
def test_later_reductions_are_added_behind_them(step: Step, zero: int) -> None:
    """A micro-step's reduced gradients are added once they are reduced, not before, and not on the compute stream."""
    played = step("gpt", zero=zero, micro_steps=2)
    program, timeline = played.program, played.timeline
    names = [program.labels[label].name for label in program.label.tolist()]
    added = [i for i, name in enumerate(names) if name == "accumulate gradients"]
    assert added
    for row in added:
        waits_for = program.depends.row(row).tolist()
        assert [names[task].startswith("reduce-scatter") for task in waits_for] == [True]
        assert timeline.start_ps[row] >= max(timeline.end_ps[task] for task in waits_for)
        assert program.streams[program.stream[row]].kind == "communication"


def test_without_reductions_in_between_sums_are_kept_in_the_reductions_format(step: Step) -> None:
    """FSDP 2 after set_requires_gradient_sync(False): whole gradients of 16 bit become sums of 32."""
    from cosim.techniques.precision import StepFormats

    formats = StepFormats(parameter=2, master=4, gradient=4, gather=2, reduce=4, optimizer_state=8)
    played = step("gpt", zero=3, micro_steps=3, formats=formats, sharded_reduce_each_micro_step=False)
    _, held = gradients_over_time(played)
    P, unit = played.plan.trainable, max(unit.trainable for unit in played.plan.units)
    assert 4 * P <= held.max() <= 4 * P + 2 * unit + 512 * len(played.graph.parameters)
    assert played.kinds().count("reduce_scatter") == len(played.plan.units)
