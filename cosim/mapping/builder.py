"""Collects tasks into the columns of a Program."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from cosim.engine.program import PICOSECONDS_PER_S, Demands, Label, MemoryProfile, Program, Resource, Stream
from cosim.graph import Csr
from hwmodels.units import InputError

LONGEST_S = 1e6
"""Of a step as it is played: eleven days, and a quarter of what an engine's picoseconds can count."""


def picoseconds(time_s: float, what: str = "a task") -> int:
    """Seconds as a whole number of picoseconds; raises InputError that names `what` if no engine can count them."""
    if not time_s <= LONGEST_S:
        raise too_long(what, time_s)
    return round(time_s * PICOSECONDS_PER_S)


def too_long(what: str, time_s: float) -> InputError:
    """The error of a step that no engine can count."""
    return InputError(
        f"the step is too long to simulate: {what}: {time_s:.3g} s, and a step may take {LONGEST_S:g} s; "
        "one of the numbers behind it is extreme"
    )


@dataclass(slots=True)
class ProgramBuilder:
    """Rows are added in the order in which the host issues them; `add` answers the row's number, for later
    `depends`.
    """

    streams: list[Stream] = field(default_factory=list)
    resources: list[Resource] = field(default_factory=list)
    _labels: dict[Label, int] = field(default_factory=dict)
    _profiles: list[MemoryProfile] = field(default_factory=list)
    _profile_number: dict[int, int] = field(default_factory=dict)
    _rows: list[tuple[int, int, int, int, int, bool, int, int, int, int]] = field(default_factory=list)
    _depends: list[list[int]] = field(default_factory=list)
    _demands: list[list[tuple[int, float]]] = field(default_factory=list)

    def stream(self, stream: Stream) -> int:
        """Add a stream; answers its number."""
        self.streams.append(stream)
        return len(self.streams) - 1

    def resource(self, resource: Resource) -> int:
        """Add something that tasks share; answers its number."""
        self.resources.append(resource)
        return len(self.resources) - 1

    def add(
        self,
        stream: int,
        work_ps: int,
        label: Label,
        *,
        depends: Iterable[int | None] = (),
        demands: Mapping[int, float] | None = None,
        host: int = -1,
        launch_ps: int = 0,
        span_ps: int | None = None,
        synchronises: bool = False,
        priority: int = 0,
        profile: MemoryProfile | None = None,
        micro_step: int = 0,
    ) -> int:
        """Append a task; `span_ps` defaults to launch + work. `None` among `depends` is left out."""
        span = launch_ps + work_ps if span_ps is None else span_ps
        name = self._labels.setdefault(label, len(self._labels))
        number = self._profile(profile)
        row = (
            stream,
            work_ps,
            host,
            launch_ps,
            span if host >= 0 else 0,
            synchronises,
            priority,
            name,
            number,
            micro_step,
        )
        self._rows.append(row)
        self._depends.append(sorted({task for task in depends if task is not None}))
        self._demands.append(sorted((demands or {}).items()))
        return len(self._rows) - 1

    def _profile(self, profile: MemoryProfile | None) -> int:
        if profile is None:
            return -1
        if id(profile) not in self._profile_number:
            self._profile_number[id(profile)] = len(self._profiles)
            self._profiles.append(profile)  # kept, so that its id stays its own
        return self._profile_number[id(profile)]

    def build(self) -> Program:
        """The program of all tasks added so far; raises InputError if they take longer than an engine can count."""
        total_s = sum(row[1] for row in self._rows) / PICOSECONDS_PER_S
        picoseconds(total_s, "all kernels and collectives together")
        columns = np.array(self._rows, dtype=np.int64).reshape(len(self._rows), 10)
        small = columns.astype(np.int32)
        flat = [pair for pairs in self._demands for pair in pairs]
        lengths = [len(pairs) for pairs in self._demands]
        return Program(
            streams=tuple(self.streams),
            resources=tuple(self.resources),
            labels=tuple(self._labels),
            profiles=tuple(self._profiles),
            stream=small[:, 0],
            work_ps=columns[:, 1].copy(),
            host=small[:, 2],
            launch_ps=columns[:, 3].copy(),
            span_ps=columns[:, 4].copy(),
            synchronises=columns[:, 5].astype(np.bool_),
            priority=columns[:, 6].astype(np.int8),
            rendezvous=np.full(len(self._rows), -1, dtype=np.int32),
            depends=Csr.of(self._depends),
            demands=Demands(
                np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
                np.array([resource for resource, _ in flat], dtype=np.int32),
                np.array([amount for _, amount in flat], dtype=np.float64),
            ),
            label=small[:, 7],
            profile=small[:, 8],
            micro_step=small[:, 9],
        )
