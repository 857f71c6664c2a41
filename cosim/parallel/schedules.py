"""Pipeline schedules as data: for every rank, which chunk of the model it runs forward or backward on which
micro-batch, in order.

    gpipe             all forwards, then all backwards                     Huang et al. 2019, arXiv 1811.06965
    1f1b              backward as soon as it can run (PipeDream-flush)     Narayanan et al. 2021, arXiv 2104.04473
    interleaved-1f1b  several chunks per rank, a bubble smaller by that    the same, section 2.2
    zb-h1, zb-h2      weight gradients later, in the bubble                Qi et al. 2023, arXiv 2401.10241
    zb-v              the same on chunks that go down the ranks and back   the same, section 6
    dualpipe-v        forward of one micro-batch with backward of another  DeepSeek-AI 2024, arXiv 2412.19437

With p ranks, m micro-batches, and times F, I and W of a chunk's forward, input-gradient and weight-gradient passes
(B = I + W), the idle time of a rank is (p - 1)(F + B) for gpipe and 1f1b, that over v for interleaved-1f1b with v
chunks, (p - 1)(F + I - W) for zb-h1, and with F = I = W none for zb-h2 and zb-v but the time that the first
micro-batch takes to reach the rank.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from hwmodels.units import InputError

KEY = "parallel.schedule"


class Pass(StrEnum):
    """What a rank does with a chunk and a micro-batch; a backward pass may be done in two parts."""

    FORWARD = "F"
    BACKWARD = "B"
    INPUT_GRADIENT = "I"
    WEIGHT_GRADIENT = "W"


@dataclass(frozen=True, slots=True)
class Action:
    """One pass of a chunk; `joined`: it runs together with the action after it, communication of one under compute of
    the other.
    """

    what: Pass
    chunk: int
    micro_batch: int
    joined: bool = False

    def __str__(self) -> str:
        return f"{self.chunk}{self.what}{self.micro_batch}"


@dataclass(frozen=True, slots=True)
class Schedule:
    """Actions of every rank in order, and which rank holds each chunk."""

    name: str
    ranks: tuple[tuple[Action, ...], ...]
    chunk_rank: tuple[int, ...]

    @property
    def chunks_per_rank(self) -> int:
        return len(self.chunk_rank) // len(self.ranks)

    @property
    def splits_backward(self) -> bool:
        """Whether weight gradients are made apart from input gradients."""
        return any(action.what == Pass.WEIGHT_GRADIENT for rank in self.ranks for action in rank)


def names() -> tuple[str, ...]:
    """The schedules that can be named."""
    return tuple(_MAKERS)


def build(name: str, ranks: int, micro_batches: int, chunks_per_rank: int = 1) -> Schedule:
    """The schedule `name` for so many ranks, micro-batches and chunks per rank.

    Raises InputError: an unknown name, or counts that the schedule does not allow.
    """
    if name not in _MAKERS:
        raise InputError(f"{KEY}: {name!r} is not a schedule; allowed are {', '.join(_MAKERS)}, or a table of actions")
    return _MAKERS[name](name, ranks, micro_batches, chunks_per_rank)


def round_robin(ranks: int, chunks_per_rank: int) -> tuple[int, ...]:
    """The rank of each chunk where chunks go around the ranks."""
    return tuple(range(ranks)) * chunks_per_rank


def there_and_back(ranks: int) -> tuple[int, ...]:
    """The rank of each of two chunks per rank that go down the ranks and back up: the first rank has the first and the
    last.
    """
    return (*range(ranks), *reversed(range(ranks)))


Steps = list[tuple[int, int]]  # (chunk, micro-batch)


def _in_turns(forwards: Steps, backwards: Steps, warmup: int, weights_after: int | None = None) -> tuple[Action, ...]:
    """`warmup` forwards, then one forward and one backward in turns, then the backwards that are left.

    With `weights_after` backward makes input gradients, and weight gradients follow, in the same order, once that many
    backwards have run without theirs.
    """
    actions = [Action(Pass.FORWARD, *step) for step in forwards[:warmup]]
    waiting: deque[tuple[int, int]] = deque()
    what = Pass.BACKWARD if weights_after is None else Pass.INPUT_GRADIENT
    for number, step in enumerate(backwards):
        if warmup + number < len(forwards):
            actions.append(Action(Pass.FORWARD, *forwards[warmup + number]))
        actions.append(Action(what, *step))
        if weights_after is not None:
            waiting.append(step)
            if number >= weights_after:
                actions.append(Action(Pass.WEIGHT_GRADIENT, *waiting.popleft()))
    actions += [Action(Pass.WEIGHT_GRADIENT, *step) for step in waiting]
    return tuple(actions)


def _gpipe(name: str, ranks: int, micro_batches: int, chunks: int) -> Schedule:
    _one_chunk(name, chunks)
    steps = [[(rank, m) for m in range(micro_batches)] for rank in range(ranks)]
    return Schedule(name, tuple(_in_turns(s, s, micro_batches) for s in steps), round_robin(ranks, 1))


def _one_forward_one_backward(name: str, ranks: int, micro_batches: int, chunks: int) -> Schedule:
    _one_chunk(name, chunks)
    return _around(name, ranks, micro_batches, 1, lambda rank, _: ranks - 1 - rank)


def _interleaved(name: str, ranks: int, micro_batches: int, chunks: int) -> Schedule:
    return _around(
        name, ranks, micro_batches, chunks, lambda rank, group: (chunks - 1) * group + 2 * (ranks - 1 - rank)
    )


def _zero_bubble_1(name: str, ranks: int, micro_batches: int, chunks: int) -> Schedule:
    """As many micro-batches in flight as with 1f1b: a rank's weight gradients are as late as it is far down."""
    return _around(
        name,
        ranks,
        micro_batches,
        chunks,
        lambda rank, group: (chunks - 1) * group + ranks - 1 - rank,
        weights_after=lambda rank: rank,
    )


def _zero_bubble_2(name: str, ranks: int, micro_batches: int, chunks: int) -> Schedule:
    """Twice as many in flight at the first rank, so that it is never idle until its first backward."""
    _one_chunk(name, chunks)
    return _around(
        name, ranks, micro_batches, 1, lambda rank, _: 2 * (ranks - 1 - rank), weights_after=lambda rank: 2 * rank
    )


def _around(
    name: str,
    ranks: int,
    micro_batches: int,
    chunks: int,
    warmup: Callable[[int, int], int],
    weights_after: Callable[[int], int] | None = None,
) -> Schedule:
    """Chunks that go around the ranks. Micro-batches pass a rank's chunks in groups, of as many as there are ranks
    where that divides; `warmup` is given the rank and the group.
    """
    rounds = max(1, micro_batches // ranks)
    if chunks > 1 and micro_batches % rounds:
        raise InputError(
            f"{KEY}: {name} with {chunks} chunks per rank needs micro-batches in equal groups: {micro_batches} of them "
            f"do not divide into {rounds} groups; a multiple of parallel.pipeline ({ranks}) always does"
        )
    group = micro_batches // rounds if chunks > 1 else micro_batches
    found = []
    for rank in range(ranks):
        order = [
            (local, first + m)
            for first in range(0, micro_batches, group)
            for local in range(chunks)
            for m in range(group)
        ]
        forwards = [(local * ranks + rank, m) for local, m in order]
        backwards = [((chunks - 1 - local) * ranks + rank, m) for local, m in order]
        before = min(warmup(rank, group), len(forwards))
        found.append(_in_turns(forwards, backwards, before, weights_after(rank) if weights_after else None))
    return Schedule(name, tuple(found), round_robin(ranks, chunks))


def _one_chunk(name: str, chunks: int) -> None:
    if chunks != 1:
        raise InputError(
            f"parallel.virtual_stages: {name} has one chunk per rank, not {chunks}; "
            "interleaved-1f1b, zb-h1, zb-v and dualpipe-v have several"
        )


def _two_chunks(name: str, chunks: int) -> None:
    if chunks != 2:
        raise InputError(f"parallel.virtual_stages: {name} has two chunks per rank, not {chunks}")


class _There:
    """Actions of a rank whose two chunks are the way there and the way back, counted as they are added."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.chunks = (rank, 2 * ranks - 1 - rank)
        self.actions: list[Action] = []
        self.done = {(what, way): 0 for what in Pass for way in (0, 1)}
        self.owed: deque[tuple[int, int]] = deque()  # (way, micro-batch) whose weight gradients are to be made

    def add(self, what: Pass, way: int, joined: bool = False) -> None:
        counted = Pass.INPUT_GRADIENT if what == Pass.BACKWARD else what
        micro_batch = self.done[counted, way]
        self.done[counted, way] += 1
        if what == Pass.BACKWARD:
            self.done[Pass.WEIGHT_GRADIENT, way] += 1
        if what == Pass.INPUT_GRADIENT:
            self.owed.append((way, micro_batch))
        self.actions.append(Action(what, self.chunks[way], micro_batch, joined))

    def pay(self) -> None:
        """The weight gradients that have waited longest."""
        if self.owed:
            way, micro_batch = self.owed.popleft()
            self.done[Pass.WEIGHT_GRADIENT, way] += 1
            self.actions.append(Action(Pass.WEIGHT_GRADIENT, self.chunks[way], micro_batch))

    def both(self, forward_way: int) -> None:
        """A forward, and a full backward of the other way, at the same time."""
        self.add(Pass.FORWARD, forward_way, joined=True)
        self.add(Pass.BACKWARD, 1 - forward_way)


def _zero_bubble_v(name: str, ranks: int, micro_batches: int, chunks: int) -> Schedule:
    _two_chunks(name, chunks)
    count = max(2 * ranks - 1, micro_batches)  # fewer leave holes in the schedule of as many as it is made for
    found = []
    for rank in range(ranks):
        way = _There(rank, ranks)
        for _ in range(2 * (ranks - rank) - 1):
            way.add(Pass.FORWARD, 0)
        for _ in range(rank):
            way.add(Pass.FORWARD, 1)
            way.add(Pass.FORWARD, 0)
        for _ in range(ranks - rank):
            way.add(Pass.FORWARD, 1)
            _whole(way, 1)
        while way.done[Pass.FORWARD, 1] < count:
            if way.done[Pass.FORWARD, 0] < count:
                way.add(Pass.FORWARD, 0)
            _whole(way, 0)
            way.add(Pass.FORWARD, 1)
            _whole(way, 1)
        for _ in range(rank):
            way.add(Pass.INPUT_GRADIENT, 0)
            way.add(Pass.INPUT_GRADIENT, 1)
        there = deque(micro_batch for side, micro_batch in way.owed if side == 0)
        for _ in range(ranks - rank):
            way.add(Pass.INPUT_GRADIENT, 0)
            there.append(way.owed[-1][1])
            way.actions.append(Action(Pass.WEIGHT_GRADIENT, way.chunks[0], there.popleft()))
        back = [micro_batch for side, micro_batch in way.owed if side == 1]
        way.actions += [Action(Pass.WEIGHT_GRADIENT, way.chunks[1], m) for m in back]
        way.actions += [Action(Pass.WEIGHT_GRADIENT, way.chunks[0], m) for m in there]
        found.append(tuple(action for action in way.actions if action.micro_batch < micro_batches))
    return Schedule(name, tuple(found), there_and_back(ranks))


def _whole(way: _There, side: int) -> None:
    """Input gradients and then the weight gradients of the same micro-batch."""
    way.add(Pass.INPUT_GRADIENT, side)
    way.pay()


def _dualpipe_v(name: str, ranks: int, micro_batches: int, chunks: int) -> Schedule:
    _two_chunks(name, chunks)
    if micro_batches < 2 * ranks:
        raise InputError(
            f"{KEY}: {name} needs at least as many micro-batches as chunks: {micro_batches} are fewer than {2 * ranks}"
        )
    found = []
    for rank in range(ranks):
        way, below = _There(rank, ranks), ranks - 1 - rank
        for _ in range(2 * below):
            way.add(Pass.FORWARD, 0)
        for _ in range(rank + 1):
            way.add(Pass.FORWARD, 0)
            way.add(Pass.FORWARD, 1)
        for _ in range(below):
            way.add(Pass.INPUT_GRADIENT, 1)
            way.pay()
            way.add(Pass.FORWARD, 1)
        for turn in range(micro_batches - 2 * ranks + rank + 1):
            if turn == 0 and below == 0:  # nothing to wait for: apart, the last rank's gradients leave earlier
                way.add(Pass.FORWARD, 0)
                way.add(Pass.BACKWARD, 1)
            else:
                way.both(0)
            way.both(1)
        for _ in range(below):
            way.add(Pass.BACKWARD, 1)
            way.both(1)
        _dualpipe_end(way, rank, below)
        found.append(tuple(way.actions))
    return Schedule(name, tuple(found), there_and_back(ranks))


def _dualpipe_end(way: _There, rank: int, below: int) -> None:
    """The last backwards, in their second half without weight gradients, which fill the holes and the end."""
    middle, what = (rank + 1) // 2, Pass.BACKWARD
    for turn in range(rank + 1):
        if turn == middle and rank % 2:
            what = Pass.INPUT_GRADIENT
        way.add(what, 1)
        if turn == middle and not rank % 2:
            what = Pass.INPUT_GRADIENT
        way.add(what, 0)
    for _ in range(below):
        way.pay()
        way.add(what, 0)
    for _ in range(rank + 1):
        way.pay()


_MAKERS: Mapping[str, Callable[[str, int, int, int], Schedule]] = {
    "gpipe": _gpipe,
    "1f1b": _one_forward_one_backward,
    "interleaved-1f1b": _interleaved,
    "zb-h1": _zero_bubble_1,
    "zb-h2": _zero_bubble_2,
    "zb-v": _zero_bubble_v,
    "dualpipe-v": _dualpipe_v,
}


def table(rows: Sequence[str], chunk_rank: Sequence[int]) -> Schedule:
    """A schedule that the user wrote: per rank, actions such as "0F0 0F1 0B0 0B1" (chunk, pass, micro-batch).

    Raises InputError: an action that is none, a chunk on another rank, passes that are missing, or an order in which
    ranks wait for each other.
    """
    ranks = tuple(tuple(_action(text, rank) for text in row.split()) for rank, row in enumerate(rows))
    schedule = Schedule("table", ranks, tuple(chunk_rank))
    for rank, actions in enumerate(ranks):
        for action in actions:
            if action.chunk >= len(chunk_rank) or chunk_rank[action.chunk] != rank:
                raise InputError(f"{KEY}: rank {rank} runs {action}, and does not hold chunk {action.chunk}")
    check(schedule)
    return schedule


def _action(text: str, rank: int) -> Action:
    for what in Pass:
        chunk, found, micro_batch = text.partition(what)
        if found and chunk.isdecimal() and micro_batch.isdecimal():
            return Action(what, int(chunk), int(micro_batch))
    raise InputError(
        f"{KEY}: rank {rank}: {text!r} is not an action; allowed are a chunk, one of F B I W, and a micro-batch, "
        "for example 0F3"
    )


def check(schedule: Schedule) -> None:
    """Raises InputError unless every chunk passes every micro-batch once in each direction, in an order in which no
    rank waits for ever.
    """
    done: set[tuple[Pass, int, int]] = set()
    waiting = [deque(actions) for actions in schedule.ranks]
    chunks = len(schedule.chunk_rank)
    progress = True
    while progress:
        progress = False
        for queue in waiting:
            while queue and all(need in done for need in needs(queue[0], chunks)):
                action = queue.popleft()
                for what in _parts(action.what):
                    if (what, action.chunk, action.micro_batch) in done:
                        raise InputError(f"{KEY}: {action} is there twice")
                    done.add((what, action.chunk, action.micro_batch))
                progress = True
    stuck = next(((rank, queue[0]) for rank, queue in enumerate(waiting) if queue), None)
    if stuck:
        rank, action = stuck
        lacks = next(need for need in needs(action, chunks) if need not in done)
        raise InputError(
            f"{KEY}: rank {rank} waits for ever at {action}: {lacks[1]}{lacks[0]}{lacks[2]} does not run before it"
        )
    _complete(schedule, done)


def _complete(schedule: Schedule, done: Iterable[tuple[Pass, int, int]]) -> None:
    seen = set(done)
    count = 1 + max(micro_batch for _, _, micro_batch in seen)
    for chunk in range(len(schedule.chunk_rank)):
        for micro_batch in range(count):
            for what in (Pass.FORWARD, Pass.INPUT_GRADIENT, Pass.WEIGHT_GRADIENT):
                if (what, chunk, micro_batch) not in seen:
                    raise InputError(f"{KEY}: {chunk}{what}{micro_batch} is missing")


def _parts(what: Pass) -> tuple[Pass, ...]:
    return (Pass.INPUT_GRADIENT, Pass.WEIGHT_GRADIENT) if what == Pass.BACKWARD else (what,)


def needs(action: Action, chunks: int) -> tuple[tuple[Pass, int, int], ...]:
    """What must have run before `action`, a full backward counting as its two parts."""
    chunk, m = action.chunk, action.micro_batch
    if action.what == Pass.FORWARD:
        return ((Pass.FORWARD, chunk - 1, m),) if chunk else ()
    if action.what == Pass.WEIGHT_GRADIENT:
        return ((Pass.INPUT_GRADIENT, chunk, m),)
    own = (Pass.FORWARD, chunk, m)
    return (own, (Pass.INPUT_GRADIENT, chunk + 1, m)) if chunk + 1 < chunks else (own,)
