"""Errors of published rows are what their definitions say, and no row disappears from the count."""

from dataclasses import dataclass
from io import StringIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cosim.spec import NotModelledError, RunSpec
from cosim.validate import report, score
from cosim.validate.published_runs import find, runs
from hwmodels.units import InputError


@dataclass(frozen=True)
class Answer:
    """What scoring reads of a result."""

    step_time_s: float
    peak_memory_bytes: float = 1e9
    feasible: bool = True


def tenth_more(spec: RunSpec) -> Answer:
    """A simulator that says 10 s for everything."""
    return Answer(10.0)


@given(st.lists(st.floats(-0.9, 5.0), min_size=1, max_size=50))
def test_summary_agrees_with_numpy(errors: list[float]) -> None:
    summary = score.summarise(errors)
    assert summary is not None
    sizes = np.abs(errors)
    expected = (sizes.mean(), np.median(sizes), np.percentile(sizes, 90), np.mean(errors))
    assert (summary.mean, summary.median, summary.p90, summary.bias) == pytest.approx(expected, abs=1e-12)
    assert summary.cases == len(errors)


def test_error_is_predicted_over_measured() -> None:
    run = find("mosaicml-0027")
    case = score.run_case(run, tenth_more)
    assert case.time_error == pytest.approx(10.0 / 49.7364 - 1)


def test_every_selected_row_is_scored_or_counted_apart() -> None:
    chosen = score.select()
    cases = score.score(chosen, tenth_more)
    assert [case.id for case in cases] == [run.id for run in chosen]
    for case in cases:
        assert sum([case.time_error is not None, case.not_modelled is not None, case.problem is not None]) == 1
    counted = sum(
        (group.time.cases if group.time else 0) + sum(n for _, n in (*group.not_modelled, *group.problems))
        for group in score.by_group(cases)
    )
    assert counted == len(chosen)


def test_only_scored_rows_of_known_quality_are_selected() -> None:
    chosen = {run.id for run in score.select()}
    for run in runs():
        expected = run.score_time and not run.verbatim and run.quality in ("A", "B")
        assert (run.id in chosen) == expected


def test_composed_rows_are_apart_and_in_no_mean() -> None:
    composed = score.Case("a", "g", True, 1.0, 3.0, 2.0)
    measured = score.Case("b", "g", False, 1.0, 1.1, 0.1)
    groups = score.by_group([composed, measured])
    assert [(group.composed, group.time.cases if group.time else 0) for group in groups] == [(False, 1), (True, 1)]
    assert score.mean_of_groups(groups) == (1, pytest.approx(0.1), pytest.approx(0.1))


def test_vtrains_single_node_rows_are_composed() -> None:
    assert {run.group for run in score.select(source="vtrain") if run.composed} == {"vtrain|a100|single-node"}


def test_mean_is_of_groups_and_not_of_rows() -> None:
    cases = [score.Case(f"a{i}", "a", False, 1.0, 1.1, 0.1) for i in range(9)]
    cases.append(score.Case("b", "b", False, 1.0, 0.5, -0.5))
    assert score.mean_of_groups(score.by_group(cases)) == (2, pytest.approx(0.3), pytest.approx(-0.2))


def test_what_the_simulator_refuses_is_counted() -> None:
    def refuses(spec: RunSpec) -> Answer:
        raise NotModelledError("no", "parallel.zero", 3)

    def fails(spec: RunSpec) -> Answer:
        raise InputError("this chip has no such format")

    run = find("mosaicml-0027")
    assert score.run_case(run, refuses).not_modelled == "parallel.zero: 3"
    assert score.run_case(run, fails).problem == "this chip has no such format"


def test_report_names_every_group_and_reason() -> None:
    cases = score.score(score.select(), tenth_more)
    text = StringIO()
    report.print_report(cases, Console(file=text, width=200))
    for group in {case.group for case in cases}:
        assert group in text.getvalue()
    assert "not modelled yet (workload.task: sft)" in text.getvalue()
    assert "vtrain|a100|single-node (composed)" in text.getvalue()
    assert len(score.to_json(cases)["cases"]) == len(cases)


@pytest.mark.parametrize(("group", "source", "known"), [("nosuch", None, "mosaicml|"), (None, "nosuch", "mosaicml, ")])
def test_a_selection_of_nothing_lists_what_there_is(group: str | None, source: str | None, known: str) -> None:
    with pytest.raises(InputError, match="no published runs") as error:
        score.select(group, source)
    assert known in str(error.value)
