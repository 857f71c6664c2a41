"""What a user should know of a result beside its numbers: what was assumed, and what had no effect."""

from __future__ import annotations

from cosim.graph import OpGraph, Phase
from cosim.played import Played
from hwmodels.units import format_quantity

_LINES_NAMED = 5  # of the model's code


def notices(played: Played) -> tuple[str, ...]:
    return (
        *_unsettled_clock(played),
        *_assumed_branches(played.whole),
        *_idle_recomputation(played),
        *_idle_precision(played),
    )


def _assumed_branches(graph: OpGraph) -> tuple[str, ...]:
    """That the model's control flow is one of several: see `cosim.trace.values`."""
    found = graph.provenance.get("assumed_values", ())
    if not found:
        return ()
    lines = ", ".join(found[:_LINES_NAMED]) + (f" and {len(found) - _LINES_NAMED} more" if found[_LINES_NAMED:] else "")
    return (
        f"workload.model: its control flow depends on the values of its tensors; assumed is what it reads of small "
        f"random ones: {lines}",
    )


def _idle_recomputation(played: Played) -> tuple[str, ...]:
    training, graph = played.spec.training, played.whole
    if training.recompute == "none" or (graph.op_phase == Phase.RECOMPUTE).any():
        return ()
    why = "the attention kernel keeps no scores" if training.recompute == "selective" else "the model has no blocks"
    name = training.recompute if isinstance(training.recompute, str) else "every"
    return (f"training.recompute: {name} recomputes nothing: {why}",)


def _idle_precision(played: Played) -> tuple[str, ...]:
    recipe = played.formats.recipe
    if recipe is None or any(kind.op_class == "quantize" for kind in played.whole.kinds):
        return ()
    return (
        f"training.precision: {recipe.precision} quantizes nothing: the model has no repeated blocks with weights of "
        f"sizes that are multiples of {recipe.multiple}",
    )


def _unsettled_clock(played: Played) -> tuple[str, ...]:
    """A clock that the power limit did not let settle in the rounds that were played."""
    if played.clock_is_sustained:
        return ()
    used, left = (format_quantity(hz, "frequency") for hz in (played.accelerator.clock_hz, played.sustained_clock_hz))
    return (
        f"clock: it has not settled after {played.clock_rounds} rounds: the step was played at {used}, whose power "
        f"leaves {left}",
    )
