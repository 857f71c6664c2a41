"""A played program as the tasks of the whole step: micro-steps that were folded happen as often as they do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cosim.engine.program import Program, Timeline


@dataclass(slots=True)
class Unfolding:
    """Tasks in order, those of a micro-step that stands for several as often as it happens.

    Times are of each occurrence; `depends` are occurrences.
    """

    task: list[int]
    issue_ps: list[int]
    start_ps: list[int]
    end_ps: list[int]
    depends: list[list[int]]


def unfolded(program: Program, timeline: Timeline, repeats: int, step_ps: int) -> Unfolding:
    """The tasks of the whole step: the micro-step before the last happens `repeats` times more than it was played.

    A repeated task waits, of its own micro-step's tasks, for those of the same repetition, and of the tasks of the
    micro-step before, for the same ones of the repetition before.
    """
    count = len(program)
    first = stop = count
    if repeats:
        rows = np.flatnonzero(program.micro_step == int(program.micro_step.max(initial=0)) - 1)
        first, stop = int(rows[0]), int(rows[-1]) + 1
    length = stop - first
    order = [(task, 0) for task in range(stop)]
    order += [(task, turn) for turn in range(1, repeats + 1) for task in range(first, stop)]
    order += [(task, repeats) for task in range(stop, count)]
    place = {key: number for number, key in enumerate(order)}
    period = (step_ps - timeline.makespan_ps) // repeats if repeats else 0

    def occurrence(before: int, task: int, turn: int) -> int:
        if first <= before < stop:
            return place[before, turn]
        if first <= task < stop and turn and first - length <= before < first:
            return place[before + length, turn - 1]
        return place[before, 0 if before < first else repeats]

    depends = [
        [occurrence(before, task, turn) for before in program.depends.row(task).tolist()] for task, turn in order
    ]
    tasks = [task for task, _ in order]
    shift = np.array([turn * period for _, turn in order], dtype=np.int64)
    columns = (timeline.issue_ps, timeline.start_ps, timeline.end_ps)
    issue, start, end = ((column[tasks] + shift).tolist() for column in columns)
    return Unfolding(tasks, issue, start, end, depends)
