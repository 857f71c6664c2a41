"""Programs of data-parallel steps: what they send, what they hold, and that they end."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosim.graph import Category
from cosim.memory import check_periodic, memory_over_time

Step = Callable[..., Any]
N = 8
SHARE = (N - 1) / N
RING = {"all_gather": SHARE, "reduce_scatter": SHARE, "all_reduce": 2 * SHARE}


def sent(step: Any, kind: str) -> float:
    """Bytes of buffers over which collectives of a kind ran, the clipping norm's four bytes left out."""
    return step.sent(kind) / RING[kind]  # type: ignore[no-any-return]


@pytest.mark.parametrize("micro_steps", [1, 3])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_replicas_reduce_their_gradients_once(step: Step, name: str, micro_steps: int, overlap: bool) -> None:
    """ZeRO 0: one all-reduce of 2P bytes in 16 bit, however many micro-steps there are."""
    played = step(name, zero=0, micro_steps=micro_steps, overlap=overlap)
    P = played.graph.parameter_count()
    assert sent(played, "all_reduce") == pytest.approx(2 * P, rel=0.01)
    assert sent(played, "all_gather") == sent(played, "reduce_scatter") == 0


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("zero", [1, 2])
def test_sharded_updates_reduce_scatter_and_gather(step: Step, zero: int, overlap: bool) -> None:
    """ZeRO 1 once per step; ZeRO 2 cannot keep whole gradients, so it reduces in each micro-step."""
    played = step("gpt", zero=zero, micro_steps=3, overlap=overlap)
    P = played.graph.parameter_count()
    assert sent(played, "reduce_scatter") == pytest.approx(2 * P * (3 if zero == 2 else 1), rel=0.01)
    assert sent(played, "all_gather") == pytest.approx(2 * P, rel=0.01)
    assert sent(played, "all_reduce") == pytest.approx(4, rel=0.5)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("reshard_root", [True, False])
@pytest.mark.parametrize("reshard_last", [True, False])
def test_sharded_parameters_move_three_times_per_micro_step(
    step: Step, reshard_root: bool, reshard_last: bool, overlap: bool
) -> None:
    """ZeRO 3: gathered for forward and for backward (once where a unit stays), gradients scattered: at most 3P."""
    played = step(
        "llama", zero=3, micro_steps=2, overlap=overlap, reshard_root=reshard_root, reshard_last_block=reshard_last
    )
    root, *blocks = (unit.elements for unit in played.plan.units)
    gathers = sum(blocks) * 2 - (0 if reshard_last else blocks[-1]) + root * (2 if reshard_root else 1)
    assert sent(played, "all_gather") == pytest.approx(2 * 2 * gathers, rel=0.01)
    assert sent(played, "reduce_scatter") == pytest.approx(2 * 2 * played.plan.elements, rel=0.01)


def test_whole_gradients_that_stay_are_scattered_once(step: Step) -> None:
    played = step("llama", zero=3, micro_steps=4, sharded_reduce_each_micro_step=False)
    assert sent(played, "reduce_scatter") == pytest.approx(2 * played.plan.elements, rel=0.01)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_one_device_sends_nothing(step: Step, zero: int) -> None:
    played = step("gpt", zero=zero, degree=1)
    assert set(played.kinds()) <= {"compute", "copy", "host"}


@pytest.mark.parametrize(("limit", "copies"), [(2, 0), (3, 0), (2, 1)])
@pytest.mark.parametrize("prefetch", ["pre", "post", "none"])
@pytest.mark.parametrize("forward", [True, False])
def test_no_more_units_are_gathered_than_the_stack_allows(
    step: Step, limit: int, copies: int, prefetch: str, forward: bool
) -> None:
    """The memory curve replayed: sharded weights, the root, and `gathers_in_flight` blocks.

    FSDP 2 has a block's gathered buffer beside its parameters, or beside those of the block before.
    """
    played = step(
        "llama",
        zero=3,
        gathers_in_flight=limit,
        gather_copies=copies,
        backward_prefetch=prefetch,
        forward_prefetch=forward,
        host_unit_s=0.0,
    )
    curve, _ = memory_over_time(played.program, played.timeline, 0, played.resident)
    weights = curve.bytes[curve.categories.index("weights")]
    root, block = (played.plan.units[i].elements * 2 for i in (0, 1))
    rounding = 512 * (limit + 2)
    assert weights.max() <= played.resident[Category.WEIGHTS] + root + max(limit * block, copies * root) + rounding
    assert weights.min() >= played.resident[Category.WEIGHTS]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_gradients_take_what_zero_says(step: Step, zero: int) -> None:
    """When the update begins: 2P bytes whole with stage 0 and 1, 2P/N with stage 2 and 3."""
    played = step("gpt", zero=zero, micro_steps=2)
    P = played.graph.parameter_count()
    program, timeline = played.program, played.timeline
    rows = [i for i, label in enumerate(program.label.tolist()) if program.labels[label].phase == "optimizer"]
    begin = min(int(timeline.start_ps[row]) for row in rows if program.work_ps[row])
    held = 0
    for row in np.flatnonzero(program.profile >= 0).tolist():
        profile = program.profiles[program.profile[row]]
        gradients = profile.category == Category.GRADIENTS
        when = timeline.start_ps[row] + profile.fraction * (timeline.end_ps[row] - timeline.start_ps[row])
        held += int(profile.delta_bytes[gradients & (when < begin)].sum())
    rounding = 512 * sum(unit.tensors for unit in played.plan.units)
    assert 0 <= held - 2 * P / (N if zero >= 2 else 1) <= (8 if zero >= 2 else rounding)


OPTIONS = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["gpt", "llama"]),
        "zero": st.integers(0, 3),
        "degree": st.integers(1, 16),
        "micro_steps": st.integers(1, 6),
        "recomputed": st.sampled_from(["none", "full", "selective_op", 2]),
        "compiled": st.booleans(),
        "bucket_bytes": st.sampled_from([1, 2**14, 2**17, 2**30]),
        "formats": st.sampled_from([(2, 4, 2, 2, 2, 8), (4, 4, 4, 2, 4, 8), (2, 4, 4, 2, 4, 8), (4, 4, 4, 4, 4, 4)]),
    }
)
FACTS = st.fixed_dictionaries(
    {
        "forward_prefetch": st.booleans(),
        "backward_prefetch": st.sampled_from(["pre", "post", "none"]),
        "gathers_in_flight": st.integers(0, 4),
        "reshard_root": st.booleans(),
        "reshard_last_block": st.booleans(),
        "collectives_serialised": st.booleans(),
        "gather_copies": st.integers(0, 2),
        "gradient_copies": st.integers(0, 2),
        "sharded_reduce_each_micro_step": st.booleans(),
        "replicated_reduce_each_micro_step": st.booleans(),
        "bucket_views": st.booleans(),
        "optimizer_syncs": st.booleans(),
        "gradient_clipping": st.booleans(),
        "syncs_each_step": st.booleans(),
        "syncs_each_micro_step": st.booleans(),
    }
)


@settings(max_examples=60)
@given(options=OPTIONS, facts=FACTS, overlap=st.booleans())
def test_every_program_ends_with_the_memory_that_it_began_with(
    step: Step, options: dict[str, Any], facts: dict[str, Any], overlap: bool
) -> None:
    from cosim.techniques.precision import StepFormats

    options = {**options, "formats": StepFormats(*options["formats"])}
    played = step(**options, **facts, overlap=overlap)  # a deadlock would raise
    check_periodic(played.program, played.timeline, 0, played.resident)
    total = sum(segment.work_ps for segment in played.segments)
    assert played.timeline.makespan_ps >= total


@settings(max_examples=60)
@given(options=OPTIONS, facts=FACTS)
def test_overlap_never_costs_time(step: Step, options: dict[str, Any], facts: dict[str, Any]) -> None:
    from cosim.techniques.precision import StepFormats

    options = {**options, "formats": StepFormats(*options["formats"])}
    with_overlap, without = (step(**options, **facts, overlap=overlap) for overlap in (True, False))
    assert with_overlap.time_s <= without.time_s * (1 + 1e-3)


def test_a_regathered_root_is_waited_for(step: Step) -> None:
    """The head's backward cannot begin before the parameters that forward gave back are here again."""
    played = step("llama", zero=3, micro_steps=1, reshard_root=True)
    program, timeline = played.program, played.timeline
    labels = [program.labels[label] for label in program.label.tolist()]
    gathers = [i for i, label in enumerate(labels) if label.kind == "all_gather" and label.layer == -1]
    backward = [i for i, label in enumerate(labels) if label.kind == "compute" and label.phase == "backward"]
    assert len(gathers) == 2
    assert timeline.start_ps[backward[0]] >= timeline.end_ps[gathers[1]]


def test_gradients_in_another_format_are_cast_before_the_update(step: Step) -> None:
    """2P bytes become 4P for an optimizer that reads fp32, and the update's own part of it where it is sharded."""
    from cosim.techniques.precision import StepFormats

    formats = StepFormats(parameter=2, master=4, gradient=4, gather=2, reduce=2, optimizer_state=8)
    for zero, expected in ((0, 4.0), (1, 2.0)):
        played = step("gpt", zero=zero, formats=formats, micro_steps=1)
        curve, _ = memory_over_time(played.program, played.timeline, 0, played.resident)
        peak = curve.bytes[curve.categories.index("gradients")].max()
        largest = max(math.prod(played.graph.shapes[p.spec]) for p in played.graph.parameters)
        rounding = 512 * sum(unit.tensors for unit in played.plan.units)
        # cast one by one: at most one tensor is there in both formats
        over = peak - expected * played.graph.parameter_count()
        assert 0 <= over <= 4 * largest + rounding


def test_fields_of_a_unit_are_all_used(step: Step) -> None:
    """Gradient copies are kernels per unit: two copies take as many more tasks as there are units and micro-steps."""
    few, many = (step("gpt", zero=3, micro_steps=2, gradient_copies=n) for n in (1, 2))
    assert many.kinds().count("copy") - few.kinds().count("copy") == 2 * len(few.plan.units)
    assert dataclasses.is_dataclass(few.plan)
