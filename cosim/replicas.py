"""Which data-parallel replicas of a step are played: one for all, or several beside each other where they differ.

Folded, one replica is played, and its collectives start when it is there, as those of all do. A slow device makes the
replica that it belongs to the last in every collective, so that this replica is the one to play: the others wait for it
and finish with it. With jitter, `REPLICAS_WITH_JITTER` replicas are played, which stand for all (see
`cosim.mapping.jitter`). Unfolded, every replica is played.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cosim.engine.program import Program
from cosim.mapping.jitter import Jitter, jittered
from cosim.mapping.replicas import beside
from cosim.played import RankPart, repetitions
from cosim.spec import RunSpec
from cosim.spec.reliability import SlowDevice
from hwmodels.units import InputError

MICRO_STEPS_PLAYED = 4  # without a pipeline; more are repetitions of the one before the last
MICRO_STEPS_WITH_JITTER = 64
REPLICAS_WITH_JITTER = 8
MOST_UNFOLDED = 64
"""Replicas times pipeline ranks that are played one by one."""


def micro_steps_played(spec: RunSpec) -> int:
    """How many micro-steps of the step are played."""
    if spec.parallel.pipeline > 1:
        return spec.micro_steps
    return min(spec.micro_steps, MICRO_STEPS_WITH_JITTER if spec.system.variation.jitter else MICRO_STEPS_PLAYED)


def replicas_played(spec: RunSpec, unfold: bool) -> int:
    """How many replicas are played; raises InputError if those to unfold are too many."""
    replicas, stages = spec.data_parallel, spec.parallel.pipeline
    if unfold and replicas * stages > MOST_UNFOLDED:
        raise InputError(
            f"--unfold: {replicas} replicas of {stages} pipeline ranks are {replicas * stages} to play, and "
            f"{MOST_UNFOLDED} is the most; leave it out, and one replica stands for all"
        )
    if unfold:
        return replicas
    return min(replicas, REPLICAS_WITH_JITTER) if spec.system.variation.jitter else 1


@dataclass(frozen=True, slots=True)
class Beside:
    """Replicas in one program: the ranks of the first, then those of the second; joules of tasks as in `Played`."""

    ranks: tuple[RankPart, ...]
    program: Program
    moved_j: NDArray[np.float64]


def beside_each_other(
    spec: RunSpec,
    replicas: int,
    price: Callable[[SlowDevice | None], tuple[RankPart, ...]],
    together: int | None,
    to_program: Callable[[tuple[RankPart, ...]], tuple[Program, NDArray[np.float64]]],
) -> Beside:
    """The program of `replicas` replicas, the first of which has the slow device, if there is one; `together` of
    them share shards, or all.
    """
    variation = spec.system.variation
    first = price(variation.slow_device)
    others = price(None) if variation.slow_device is not None and replicas > 1 else first
    programs = [to_program(first)]
    programs += [to_program(others) if others is not first else programs[0]] * (replicas - 1)
    program = beside([program for program, _ in programs], together if replicas == spec.data_parallel else None)
    ranks = (*first, *(others * (replicas - 1)))
    moved_j = np.concatenate([moved for _, moved in programs])
    if not variation.jitter:
        return Beside(ranks, program, moved_j)
    shared = spec.parallel.tensor * spec.parallel.context
    varied = jittered(program, Jitter(variation.jitter, variation.seed, shared, spec.data_parallel, replicas))
    return Beside(_at_their_pace(spec, ranks, program, varied), varied, moved_j)


def _at_their_pace(
    spec: RunSpec, ranks: tuple[RankPart, ...], program: Program, varied: Program
) -> tuple[RankPart, ...]:
    """The ranks, whose ops take on average what jitter made of their tasks."""
    kinds = [label.kind == "compute" for label in program.labels]
    ops = np.array(kinds, dtype=np.bool_)[program.label]
    device = np.array([stream.device for stream in program.streams])[program.stream]
    often = repetitions(program, spec.micro_steps, micro_steps_played(spec)) * ops
    before, after = (
        np.bincount(device, weights=one.work_ps * often, minlength=len(ranks)) for one in (program, varied)
    )
    return tuple(
        dataclasses.replace(rank, prices=dataclasses.replace(rank.prices, time_s=rank.prices.time_s * pace))
        for rank, pace in zip(ranks, (after / np.maximum(before, 1)).tolist(), strict=True)
    )
