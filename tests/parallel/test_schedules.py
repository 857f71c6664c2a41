"""Schedules equal PyTorch's where it has them, have the idle time of their papers, and never deadlock."""

from collections import deque
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosim.parallel.schedules import Action, Pass, Schedule, build, check, names, needs, table
from hwmodels.units import InputError

_LETTERS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
TIMES = {Pass.FORWARD: 1, Pass.BACKWARD: 2, Pass.INPUT_GRADIENT: 1, Pass.WEIGHT_GRADIENT: 1}


def _chunks(name: str, chunks: int = 2) -> int:
    return {"zb-v": 2, "dualpipe-v": 2, "interleaved-1f1b": chunks, "zb-h1": chunks}.get(name, 1)


def _torch_actions(name: str, ranks: int, micro_batches: int, chunks: int) -> list[list[str]]:
    """PyTorch's own lists of the same schedule; its classes want stages that exist, of which only numbers matter."""
    import torch.distributed.pipelining.schedules as torch_schedules

    cls = {
        "interleaved-1f1b": torch_schedules.ScheduleInterleaved1F1B,
        "zb-h1": torch_schedules.ScheduleInterleavedZeroBubble,
        "zb-v": torch_schedules.ScheduleZBVZeroBubble,
        "dualpipe-v": torch_schedules.ScheduleDualPipeV,
    }[name]
    schedule: Any = cls.__new__(cls)
    schedule.pp_group_size, schedule._n_microbatches = ranks, micro_batches
    schedule.n_local_stages, schedule._num_stages, schedule.num_stages = chunks, ranks * chunks, ranks * chunks
    schedule.number_of_rounds = max(1, micro_batches // ranks)
    schedule.microbatches_per_round = micro_batches // schedule.number_of_rounds
    rows = []
    for rank in range(ranks):
        flat: list[Any] = []
        for action in schedule._calculate_single_rank_operations(rank):
            if action is not None:
                flat += action.sub_actions or [action]
        rows.append([f"{a.stage_index}{_LETTERS[a.computation_type.name]}{a.microbatch_index}" for a in flat])
    return rows


@pytest.mark.parametrize("name", ["interleaved-1f1b", "zb-h1", "zb-v", "dualpipe-v"])
@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 4), (4, 8), (4, 16), (3, 9), (8, 16)])
def test_action_lists_equal_pytorch(name: str, ranks: int, micro_batches: int) -> None:
    chunks = _chunks(name)
    ours = [[str(action) for action in rank] for rank in build(name, ranks, micro_batches, chunks).ranks]
    assert ours == _torch_actions(name, ranks, micro_batches, chunks)


def _torch_single(name: str, ranks: int, micro_batches: int) -> list[list[str]]:
    """The order that PyTorch gives for its schedules of one stage per rank."""
    import torch.distributed.pipelining.schedules as torch_schedules

    cls = {"gpipe": torch_schedules.ScheduleGPipe, "1f1b": torch_schedules.Schedule1F1B}[name]
    schedule: Any = cls.__new__(cls)
    schedule._num_stages, schedule._n_microbatches = ranks, micro_batches
    order = schedule._get_pipeline_order()
    return [
        [
            f"{a.stage_index}{_LETTERS[a.computation_type.name]}{a.microbatch_index}"
            for a in order[rank]
            if a is not None and a.computation_type.name in _LETTERS
        ]
        for rank in range(ranks)
    ]


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_one_chunk_per_rank_equals_pytorch(name: str) -> None:
    """Of 1F1B all but the last rank, whose first forward PyTorch 2.13's order numbers 1."""
    for ranks, micro_batches in ((4, 8), (4, 4), (3, 6)):
        ours = [[str(action) for action in rank] for rank in build(name, ranks, micro_batches).ranks]
        theirs = _torch_single(name, ranks, micro_batches)
        assert ours[:-1] == theirs[:-1]
        assert ours == theirs or name == "1f1b"


def test_1f1b_holds_as_many_micro_batches_as_there_are_ranks_below() -> None:
    for ranks, micro_batches in ((4, 8), (4, 4), (3, 6)):
        schedule = build("1f1b", ranks, micro_batches)
        last = [str(action) for action in schedule.ranks[-1]]
        assert last == [f"{ranks - 1}{what}{m}" for m in range(micro_batches) for what in "FB"]
        in_flight = [_most_in_flight(rank) for rank in schedule.ranks]
        assert in_flight == [min(micro_batches, ranks - rank) for rank in range(ranks)]


def _most_in_flight(actions: tuple[Action, ...]) -> int:
    held = most = 0
    for action in actions:
        held += {Pass.FORWARD: 1, Pass.BACKWARD: -1, Pass.WEIGHT_GRADIENT: -1}.get(action.what, 0)
        most = max(most, held)
    return most


def _play(schedule: Schedule, times: dict[Pass, int]) -> tuple[int, list[int]]:
    """Makespan and busy time of each rank, messages taking no time."""
    done: dict[tuple[Pass, int, int], int] = {}
    queues = [deque(rank) for rank in schedule.ranks]
    clock, busy = [0] * len(queues), [0] * len(queues)
    while any(queues):
        moved = False
        for rank, queue in enumerate(queues):
            if queue and all(need in done for need in needs(queue[0], len(schedule.chunk_rank))):
                action = queue.popleft()
                start = max([clock[rank], *(done[need] for need in needs(action, len(schedule.chunk_rank)))])
                clock[rank] = start + times[action.what]
                busy[rank] += times[action.what]
                parts = (Pass.INPUT_GRADIENT, Pass.WEIGHT_GRADIENT) if action.what == Pass.BACKWARD else (action.what,)
                for what in parts:
                    done[what, action.chunk, action.micro_batch] = clock[rank]
                moved = True
        assert moved, "deadlock"
    return max(clock), busy


@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 4), (4, 8), (4, 16), (8, 32)])
def test_idle_time_is_the_closed_form(ranks: int, micro_batches: int) -> None:
    forward, inputs, weights = 3, 4, 2
    times = {
        Pass.FORWARD: forward,
        Pass.BACKWARD: inputs + weights,
        Pass.INPUT_GRADIENT: inputs,
        Pass.WEIGHT_GRADIENT: weights,
    }
    whole = forward + inputs + weights
    for name in ("gpipe", "1f1b"):
        makespan, _ = _play(build(name, ranks, micro_batches), times)
        assert makespan == micro_batches * whole + (ranks - 1) * whole
    for chunks in (2, 4):
        makespan, _ = _play(build("interleaved-1f1b", ranks, micro_batches, chunks), times)
        assert makespan == chunks * micro_batches * whole + (ranks - 1) * whole
    makespan, _ = _play(build("zb-h1", ranks, micro_batches), times)
    assert makespan == micro_batches * whole + (ranks - 1) * (forward + inputs - weights)


@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 8), (4, 16), (8, 32)])
def test_without_bubble_only_the_way_to_a_rank_is_idle(ranks: int, micro_batches: int) -> None:
    makespan, _ = _play(build("zb-h2", ranks, micro_batches), TIMES)
    assert makespan == 3 * micro_batches + ranks - 1
    makespan, _ = _play(build("zb-v", ranks, micro_batches, 2), TIMES)
    assert makespan == 6 * micro_batches + ranks - 1


@given(
    name=st.sampled_from(names()),
    ranks=st.integers(1, 8),
    rounds=st.integers(1, 4),
    times=st.tuples(*[st.integers(1, 50)] * 3),
)
def test_no_deadlock_whatever_passes_take(name: str, ranks: int, rounds: int, times: tuple[int, int, int]) -> None:
    schedule = build(name, ranks, 2 * ranks * rounds, _chunks(name, 3))
    check(schedule)
    forward, inputs, weights = times
    taken = {
        Pass.FORWARD: forward,
        Pass.BACKWARD: inputs + weights,
        Pass.INPUT_GRADIENT: inputs,
        Pass.WEIGHT_GRADIENT: weights,
    }
    _, busy = _play(schedule, taken)
    assert busy == [2 * ranks * rounds * schedule.chunks_per_rank * sum(times)] * ranks


def test_a_table_of_actions_is_a_schedule() -> None:
    written = table(["0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"], (0, 1))
    assert [str(action) for action in written.ranks[1]] == ["1F0", "1B0", "1F1", "1B1"]
    for rows, said in (
        (["0F0 0B0", "1B0 1F0"], "waits for ever"),
        (["0F0 0B0", "1F0 1F1"], "waits for ever"),
        (["0F0 0B0 0F0", "1F0 1B0"], "twice"),
        (["0F0 1B0", "1F0"], "does not hold chunk"),
        (["0F0 0X0", "1F0 1B0"], "is not an action"),
        (["0F0 0B0 0F1", "1F0 1B0 1F1"], "is missing"),
    ):
        with pytest.raises(InputError, match=said):
            table(rows, (0, 1))


def test_counts_that_a_schedule_does_not_allow_are_refused() -> None:
    with pytest.raises(InputError, match="equal groups"):
        build("interleaved-1f1b", 4, 9, 2)
    with pytest.raises(InputError, match="two chunks per rank"):
        build("zb-v", 4, 8, 3)
    with pytest.raises(InputError, match="at least as many micro-batches"):
        build("dualpipe-v", 4, 7, 2)
    with pytest.raises(InputError, match="is not a schedule"):
        build("chimera", 4, 8)
