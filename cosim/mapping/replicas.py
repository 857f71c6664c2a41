"""Data-parallel replicas beside one another in one program, whose collectives start when the last of them is there."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cosim.engine.program import Demands, Label, MemoryProfile, Program, Timeline
from cosim.graph import Csr

_JOINED = ("work_ps", "launch_ps", "span_ps", "synchronises", "priority", "micro_step")


def beside(programs: Sequence[Program], together: int | None = None) -> Program:
    """The programs of replicas, each with its own streams and resources, as one; they have the same tasks in the same
    order, and may differ in how long these take.

    Replica r's device d is device r * (devices of one replica) + d. A collective over the data-parallel group is a
    rendezvous of the same task in all replicas, or in each `together` of them that share their shards; one that
    replicates shards, of those with the same place among these.
    """
    if len(programs) == 1:
        return programs[0]
    first = programs[0]
    if any(len(program) != len(first) for program in programs):
        raise ValueError("replicas of one step have the same tasks")
    tasks, replicas = len(first), range(len(programs))
    streams, resources = len(first.streams), len(first.resources)
    devices = 1 + max((stream.device for stream in first.streams), default=0)
    labels: dict[Label, int] = {}
    named = [np.array([labels.setdefault(label, len(labels)) for label in p.labels], dtype=np.int32) for p in programs]
    profiles: list[MemoryProfile] = []
    starts = []
    for program in programs:
        starts.append(len(profiles))
        profiles += program.profiles
    columns = {name: np.concatenate([getattr(program, name) for program in programs]) for name in _JOINED}
    return dataclasses.replace(
        first,
        streams=tuple(
            dataclasses.replace(stream, device=r * devices + stream.device)
            for r in replicas
            for stream in first.streams
        ),
        resources=first.resources * len(programs),
        labels=tuple(labels),
        profiles=tuple(profiles),
        stream=_shifted([program.stream for program in programs], [r * streams for r in replicas]),
        host=_shifted([program.host for program in programs], [r * streams for r in replicas]),
        profile=_shifted([program.profile for program in programs], starts),
        label=np.concatenate([names[program.label] for names, program in zip(named, programs, strict=True)]),
        rendezvous=np.concatenate([_meetings(first, r, len(programs), together) for r in replicas]),
        depends=Csr(
            _ends([program.depends.indptr for program in programs]),
            _shifted([program.depends.indices for program in programs], [r * tasks for r in replicas]),
        ),
        demands=Demands(
            _ends([program.demands.indptr for program in programs]),
            _shifted([program.demands.resource for program in programs], [r * resources for r in replicas]),
            np.concatenate([program.demands.amount for program in programs]),
        ),
        **columns,
    )


def first_replica(program: Program, timeline: Timeline, replicas: int) -> tuple[Program, Timeline]:
    """The first of the replicas that `beside` put together, with its part of the timeline: no rendezvous, and each
    collective as long as it took once all were there.
    """
    if replicas == 1:
        return program, timeline
    tasks, streams = len(program) // replicas, len(program.streams) // replicas
    columns = ("stream", "host", "label", "profile", *_JOINED)
    last = int(program.demands.indptr[tasks])
    alone = dataclasses.replace(
        program,
        streams=program.streams[:streams],
        resources=program.resources[: len(program.resources) // replicas],
        rendezvous=np.full(tasks, -1, dtype=np.int32),
        depends=Csr(program.depends.indptr[: tasks + 1], program.depends.indices[: int(program.depends.indptr[tasks])]),
        demands=Demands(
            program.demands.indptr[: tasks + 1], program.demands.resource[:last], program.demands.amount[:last]
        ),
        **{name: getattr(program, name)[:tasks] for name in columns},
    )
    times = (timeline.issue_ps[:tasks], timeline.start_ps[:tasks], timeline.end_ps[:tasks])
    return alone, Timeline(*times)


def _meetings(program: Program, replica: int, replicas: int, together: int | None) -> NDArray[np.int32]:
    """The rendezvous of each task of a replica: a number of its own for each set of replicas that meets in it."""
    size = together or replicas
    where = {"data": replica // size, "replicate": replica % size, "expert_data": 0}
    kinds = [next((where[sent.group] for sent in label.sent if sent.group in where), -1) for label in program.labels]
    met = np.array(kinds, dtype=np.int64)[program.label]
    number = np.arange(len(program)) * replicas + met
    return np.where(met >= 0, number, -1).astype(np.int32)


def _shifted(columns: Sequence[NDArray[np.int32]], by: Sequence[int]) -> NDArray[np.int32]:
    """The columns one after another, each with its number added where it names something (is not -1)."""
    moved = [np.where(column >= 0, column + step, column) for column, step in zip(columns, by, strict=True)]
    return np.concatenate(moved).astype(np.int32)


def _ends(indptrs: Sequence[NDArray[np.int32]]) -> NDArray[np.int32]:
    """Row ends of tables put below one another."""
    starts = [0, *itertools.accumulate(int(indptr[-1]) for indptr in indptrs)]
    parts = [indptr[:-1] + start for indptr, start in zip(indptrs, starts[:-1], strict=True)]
    return np.concatenate([*parts, [starts[-1]]]).astype(np.int32)
