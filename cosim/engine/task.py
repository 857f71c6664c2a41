"""A program written task by task, as people think of it: for small programs, examples and tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cosim.engine.program import Demands, Label, MemoryProfile, Program, Resource, Stream
from cosim.graph import Csr

UNNAMED = Label("task", "task", "forward")


@dataclass(frozen=True, slots=True)
class Task:
    """One row of a program; `cosim.engine.program` says what the fields do. A span of None is a single kernel's."""

    stream: int
    work_ps: int
    host: int = -1
    launch_ps: int = 0
    span_ps: int | None = None
    synchronises: bool = False
    priority: int = 0
    rendezvous: int = -1
    depends: tuple[int, ...] = ()
    demands: tuple[tuple[int, float], ...] = ()  # resource, amount at speed 1
    label: Label = UNNAMED
    profile: MemoryProfile | None = None
    micro_step: int = 0

    @property
    def whole_span_ps(self) -> int:
        return self.launch_ps + self.work_ps if self.span_ps is None else self.span_ps


def program_of(
    tasks: Sequence[Task], streams: Sequence[Stream | str], resources: Sequence[Resource | float] = ()
) -> Program:
    """The columns of `tasks`, in issue order; a stream given by its name is on device 0."""
    labels = list(dict.fromkeys(task.label for task in tasks))
    profiles = list({id(task.profile): task.profile for task in tasks if task.profile is not None}.values())
    place = {id(profile): index for index, profile in enumerate(profiles)}
    number = {label: index for index, label in enumerate(labels)}
    entries = [entry for task in tasks for entry in task.demands]
    ends = np.cumsum([0, *(len(task.demands) for task in tasks)])

    def ints(values: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        return np.array(values, dtype=np.int32)

    return Program(
        streams=tuple(Stream(s, 0, s) if isinstance(s, str) else s for s in streams),
        resources=tuple(r if isinstance(r, Resource) else Resource("", float(r)) for r in resources),
        labels=tuple(labels),
        profiles=tuple(profiles),
        stream=ints([task.stream for task in tasks]),
        work_ps=np.array([task.work_ps for task in tasks], dtype=np.int64),
        host=ints([task.host for task in tasks]),
        launch_ps=np.array([task.launch_ps for task in tasks], dtype=np.int64),
        span_ps=np.array([task.whole_span_ps for task in tasks], dtype=np.int64),
        synchronises=np.array([task.synchronises for task in tasks], dtype=np.bool_),
        priority=np.array([task.priority for task in tasks], dtype=np.int8),
        rendezvous=ints([task.rendezvous for task in tasks]),
        depends=Csr.of([task.depends for task in tasks]),
        demands=Demands(
            ends.astype(np.int32), ints([r for r, _ in entries]), np.array([a for _, a in entries], dtype=np.float64)
        ),
        label=ints([number[task.label] for task in tasks]),
        profile=ints([-1 if task.profile is None else place[id(task.profile)] for task in tasks]),
        micro_step=ints([task.micro_step for task in tasks]),
    )
