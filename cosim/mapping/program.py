"""A divided and priced step becomes a program: through a pipeline, or micro-step by micro-step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cosim.engine.program import Program
from cosim.mapping import data_parallel, pipeline
from cosim.mapping.pricing import Prices
from cosim.mapping.rank import interference
from cosim.mapping.segments import segments
from cosim.parallel.divide import DividedStep
from cosim.stacks.stack import Stack
from hwmodels.cluster import Cluster


def program_of(
    step: DividedStep, prices: Sequence[Prices], micro_steps: int, cluster: Cluster, stack: Stack, compiled: bool
) -> tuple[Program, NDArray[np.float64]]:
    """The program of one step of all distinct ranks, and joules per task of what no rank's graph has.

    `prices` are those of each stage's graph; `compiled`: the host launches what a compiler made of it.
    """
    if step.schedule is not None:
        return pipeline.build_program(step, prices, cluster, stack, micro_steps, compiled)
    (stage,), (price,) = step.stages, prices
    held = interference(stage.plan, cluster)
    parts = segments(stage.part.graph, price, stack, held, stage.plan.optimizer_shards, compiled)
    return data_parallel.build_program(stage.plan, parts, cluster, stack, micro_steps)
