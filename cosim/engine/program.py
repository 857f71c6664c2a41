"""What an engine plays and what it gives back: the interface that the simpy engine and a native one share.

A `Program` is columns, one row per task, in the order in which the host threads issue them. Time is an int64 count of
picoseconds.

What happens over time:
- A stream runs its tasks in row order, one at a time.
- A host thread issues its tasks in row order. Issuing takes `launch_ps`; it does not wait for the device, except
  that after a task with `synchronises` it goes on only when that task has ended. `host` and `stream` index the same
  table but are two queues: a host thread that also works has tasks whose `stream` it is, and waits only where they
  synchronise.
- A task starts as soon as the task before it on its stream and all that it `depends` on have ended, its host thread
  has begun to issue it, and, if it has a `rendezvous`, all of this holds for every task with the same number. It
  occupies its stream from its start to its end.
- A task does `work_ps` of work, at speed 1 when it gets all that it demands. It ends when the work is done, and not
  before `span_ps` after its host thread began to issue it (a task that stands for many kernels: the last one cannot
  end before it was launched; for tasks of one kernel span = launch + work; `cosim.engine.kernels` has the span of
  many).
- Without a host thread (-1) a task counts as issued at 0, and launch, span and synchronises mean nothing.
- Running tasks share resources. Each demands `amount` of a resource's capacity per unit of speed, from its start
  until its work is done (waiting for the span holds nothing). Speeds are max-min fair: tasks of the highest
  priority rise together from 0 to at most 1 until a resource that they demand is used up, then the next priority
  gets what is left (`cosim.engine.sharing` fixes the arithmetic). A task without demands, or whose amounts are all
  0, has speed 1.

To the picosecond, for tasks with demands:
- All starts and finishes of work at one instant count as one change; speeds are set once, after it. Time passes
  between two changes, never within one. A task with `work_ps` 0 is done as it starts, and changes no speed.
- A task keeps three numbers: `remaining` (float64, first work_ps), `since` (first its start) and `speed` (first 0).
  When a change at `now` gives it another speed s (one that is equal leaves everything as it is, so nothing is
  rounded twice): remaining = max(0, remaining - speed * (now - since)); since = now; speed = s; and its work will
  be done at now + max(1, ceil(remaining / s)); never, if s is 0, the quotient 2**62 or more, or that time 2**63 - 1
  or more.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cosim.graph import Csr, Ints

PICOSECONDS_PER_S = 1_000_000_000_000


@dataclass(frozen=True, slots=True)
class Stream:
    """A queue of tasks on a device: compute, communication, copy-in, copy-out; or a host thread."""

    name: str
    device: int
    kind: str


@dataclass(frozen=True, slots=True)
class Resource:
    """Something that running tasks share: a device's cores (capacity 1), its memory bandwidth (1), a link (bytes/s)."""

    name: str
    capacity: float


@dataclass(frozen=True, slots=True)
class MemoryProfile:
    """How a task changes its device's memory: at `fraction` (0..1) of start..end, `delta_bytes` of `category`.

    Rows are in the order in which they happen: those of one fraction take effect one after another.
    """

    fraction: NDArray[np.float64]
    category: NDArray[np.int8]
    delta_bytes: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Demands:
    """Row i demands `amount[j]` of `resource[j]` for j in `indptr[i]:indptr[i + 1]`."""

    indptr: Ints
    resource: Ints
    amount: NDArray[np.float64]

    def rows(self) -> list[tuple[tuple[int, float], ...]]:
        """(resource, amount) of every task, as Python numbers."""
        entries = list(zip(self.resource.tolist(), self.amount.tolist(), strict=True))
        ends = self.indptr.tolist()
        return [tuple(entries[a:b]) for a, b in itertools.pairwise(ends)]


@dataclass(frozen=True, slots=True)
class Sent:
    """What a task communicates: `kind` and `bytes` as in hwmodels.work.Collective (the full buffer, or the message).

    `group` names the ranks that take part: "tensor", "context", "expert", "data", "pipeline" (for a message: its sender
    and receiver), or "tied" (the first and the last pipeline rank).
    """

    kind: str
    group: str
    bytes: float


@dataclass(frozen=True, slots=True)
class Label:
    """What a task is, for people: `kind` is the key under which its time is reported (an op class, a collective);
    `ops` the range of the traced step's ops that it stands for, empty where it stands for none; `sent` what it
    communicates, one after another, beside those ops.
    """

    name: str
    kind: str
    phase: str
    layer: int = -1
    ops: tuple[int, int] = (0, 0)
    sent: tuple[Sent, ...] = ()


@dataclass(frozen=True)
class Program:
    """Tasks in issue order; see the module's text for what they mean."""

    streams: tuple[Stream, ...]
    resources: tuple[Resource, ...]
    labels: tuple[Label, ...]
    profiles: tuple[MemoryProfile, ...]
    stream: Ints
    work_ps: NDArray[np.int64]
    host: Ints  # index of the host thread in `streams`; -1: nobody issues it, it may start at once
    launch_ps: NDArray[np.int64]
    span_ps: NDArray[np.int64]
    synchronises: NDArray[np.bool_]
    priority: NDArray[np.int8]
    rendezvous: Ints  # -1: none
    depends: Csr  # tasks
    demands: Demands
    label: Ints
    profile: Ints  # -1: none
    micro_step: Ints

    def __len__(self) -> int:
        return len(self.stream)


@dataclass(frozen=True, slots=True)
class Timeline:
    """When each task of a program was issued, started and ended, in picoseconds from the beginning of the step."""

    issue_ps: NDArray[np.int64]  # when its host thread began to issue it; 0 without one
    start_ps: NDArray[np.int64]
    end_ps: NDArray[np.int64]

    @property
    def makespan_ps(self) -> int:
        return int(self.end_ps.max(initial=0))


class Engine(Protocol):
    """Plays a program; deterministic. Raises DeadlockError when tasks wait for each other."""

    def play(self, program: Program) -> Timeline: ...


class DeadlockError(RuntimeError):
    """Tasks of the program wait for each other; the message names the first ones."""
