"""Runs published rows through the simulator, many at a time, and says how far off each group is."""

import math
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cosim.spec import NotModelledError, RunSpec
from cosim.validate.published_runs import PublishedRun, find, runs, to_run
from hwmodels.units import InputError

GIB = 2.0**30


@dataclass(frozen=True, slots=True)
class Case:
    """One published run against its simulation; errors are predicted / measured - 1, None where nothing is scored."""

    id: str
    group: str
    composed: bool
    measured_step_time_s: float | None = None
    predicted_step_time_s: float | None = None
    time_error: float | None = None
    measured_peak_memory_bytes: float | None = None
    predicted_peak_memory_bytes: float | None = None
    memory_error: float | None = None
    feasible: bool | None = None
    not_modelled: str | None = None  # the field and value that is not modelled yet
    problem: str | None = None  # why it could not be run otherwise


@dataclass(frozen=True, slots=True)
class Summary:
    """Errors of several cases as fractions: mean, median and 90th percentile of |error|, and the signed mean (bias)."""

    cases: int
    mean: float
    median: float
    p90: float
    bias: float


@dataclass(frozen=True, slots=True)
class GroupScore:
    """The cases of one reporting group; `composed` ones are sums of profiled parts and count in no mean of groups."""

    group: str
    composed: bool
    time: Summary | None
    memory: Summary | None
    not_modelled: tuple[tuple[str, int], ...]  # reason, rows
    problems: tuple[tuple[str, int], ...]
    infeasible: int
    worst: tuple[Case, ...]


def select(group: str | None = None, source: str | None = None) -> list[PublishedRun]:
    """The rows that are scored: time scored, quality A or B, not printed twice; `group` is part of the group's name.

    Raises InputError if no row is left, with the groups or sources that there are.
    """
    scored = [run for run in runs() if run.score_time and not run.verbatim and run.quality in ("A", "B")]
    chosen = [r for r in scored if (group or "") in r.group and source in (None, r.source)]
    if not chosen:
        if source is not None and all(run.source != source for run in scored):
            known = ", ".join(sorted({run.source for run in scored}))
            raise InputError(f"--source {source[:80]!r}: no published runs; sources are {known}")
        known = ", ".join(sorted({run.group for run in scored}))
        raise InputError(f"--group {(group or '')[:80]!r}: no published runs; groups are {known}")
    return chosen


def score(
    chosen: Sequence[PublishedRun],
    simulate: Callable[[RunSpec], Any] | None = None,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Case]:
    """A case per row, in order. `progress` is called with (done, all) of the rows that can be simulated.

    Without `simulate` the rows run through `cosim.simulate` on `processes` processes (default: one per core).
    """
    answers = {run.id: _refusal(run) for run in chosen}
    accepted = [run for run in chosen if answers[run.id] is None]
    processes = min(processes or os.cpu_count() or 1, len(accepted))
    cases: Iterable[Case]
    if simulate is not None or processes <= 1:
        cases = (run_case(run, simulate) for run in accepted)
    else:
        cases = _in_processes([run.id for run in accepted], processes)
    for done, case in enumerate(cases, 1):
        answers[case.id] = case
        if progress is not None:
            progress(done, len(accepted))
    return [case for case in answers.values() if case is not None]


def run_case(run: PublishedRun, simulate: Callable[[RunSpec], Any] | None = None) -> Case:
    """The case of one row; what is not modelled and what cannot be run is said in it, and not raised."""
    try:
        result = (simulate or _simulate)(RunSpec.from_mapping(to_run(run), run.id))
    except InputError as error:
        return _refused(run, error)
    measured_memory = run.peak_memory_gib * GIB if run.peak_memory_gib is not None and run.score_memory else None
    return Case(
        run.id,
        run.group,
        run.composed,
        run.step_time_s,
        result.step_time_s,
        _error(result.step_time_s, run.step_time_s),
        measured_memory,
        result.peak_memory_bytes,
        _error(result.peak_memory_bytes, measured_memory),
        result.feasible,
    )


def by_group(cases: Sequence[Case], worst: int = 3) -> list[GroupScore]:
    """The scores of each group, composed rows apart and last."""
    keys = sorted({(case.composed, case.group) for case in cases})
    return [_group_score(key, [c for c in cases if (c.composed, c.group) == key], worst) for key in keys]


def mean_of_groups(groups: Iterable[GroupScore]) -> tuple[int, float, float] | None:
    """Groups counted, the mean over groups of the mean error, and of the bias; composed groups are left out."""
    scored = [group.time for group in groups if group.time is not None and not group.composed]
    if not scored:
        return None
    return len(scored), math.fsum(s.mean for s in scored) / len(scored), math.fsum(s.bias for s in scored) / len(scored)


def summarise(errors: Sequence[float]) -> Summary | None:
    """Summary of signed errors; percentiles interpolate linearly between order statistics, as numpy's default does."""
    if not errors:
        return None
    sizes = sorted(abs(error) for error in errors)
    count = len(sizes)
    return Summary(
        count, math.fsum(sizes) / count, _percentile(sizes, 0.5), _percentile(sizes, 0.9), math.fsum(errors) / count
    )


def to_json(cases: Sequence[Case]) -> dict[str, Any]:
    """Everything as plain data: the groups' scores and every case."""
    groups = by_group(cases)
    overall = mean_of_groups(groups)
    return {
        "mean_of_groups": {"groups": overall[0], "mean": overall[1], "bias": overall[2]} if overall else None,
        "groups": [
            {
                "group": g.group,
                "composed": g.composed,
                "time": asdict(g.time) if g.time else None,
                "memory": asdict(g.memory) if g.memory else None,
                "not_modelled": dict(g.not_modelled),
                "problems": dict(g.problems),
                "infeasible": g.infeasible,
            }
            for g in groups
        ],
        "cases": [asdict(case) for case in cases],
    }


def _group_score(key: tuple[bool, str], cases: list[Case], worst: int) -> GroupScore:
    timed = [case for case in cases if case.time_error is not None]
    return GroupScore(
        group=key[1],
        composed=key[0],
        time=summarise([case.time_error for case in timed if case.time_error is not None]),
        memory=summarise([case.memory_error for case in cases if case.memory_error is not None]),
        not_modelled=tuple(Counter(c.not_modelled for c in cases if c.not_modelled).most_common()),
        problems=tuple(Counter(c.problem for c in cases if c.problem).most_common()),
        infeasible=sum(case.feasible is False for case in cases),
        worst=tuple(sorted(timed, key=lambda case: -abs(case.time_error or 0.0))[:worst]),
    )


def _refusal(run: PublishedRun) -> Case | None:
    """The case of a row that has no run file, or one that RunSpec refuses."""
    try:
        RunSpec.from_mapping(to_run(run), run.id)
    except InputError as error:
        return _refused(run, error)
    return None


def _refused(run: PublishedRun, error: InputError) -> Case:
    if isinstance(error, NotModelledError):
        return Case(run.id, run.group, run.composed, not_modelled=f"{error.key}: {error.value}"[:100])
    text = str(error).removeprefix(f"{run.id}: ").replace(f"published run {run.id}: ", "")
    return Case(run.id, run.group, run.composed, problem=text[:200])


def _simulate(spec: RunSpec) -> Any:
    from cosim.simulate import simulate

    return simulate(spec)


def _error(predicted: float, measured: float | None) -> float | None:
    return predicted / measured - 1.0 if measured else None


def _percentile(ordered: Sequence[float], share: float) -> float:
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _in_processes(ids: list[str], processes: int) -> Iterator[Case]:
    """Cases in order, from processes that start afresh, because a fork of a process with threads may hang."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_leave_interrupts_to_parent)
    try:
        yield from pool.map(_case_of, ids)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _leave_interrupts_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _case_of(identifier: str) -> Case:
    return run_case(find(identifier))
