"""The errors on published runs as a table for people."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from cosim.validate.score import Case, GroupScore, Summary, by_group, mean_of_groups


def print_report(cases: Sequence[Case], console: Console) -> None:
    """Per group: rows, errors of the step time, bias, memory; then the worst rows and what is not modelled yet."""
    groups = by_group(cases)
    console.print(_table(groups))
    overall = mean_of_groups(groups)
    if overall is not None:
        count, mean, bias = overall
        console.print(f"mean of {count} group{'s' * (count != 1)}: {mean:.1%}, bias {bias:+.1%}")
    if any(group.composed for group in groups):
        console.print("composed: sums of profiled parts, not timings; in no mean of groups")
    for group in groups:
        for reason, rows in group.not_modelled:
            console.print(f"{_name(group)}: {rows} not modelled yet ({reason})", highlight=False, markup=False)
        for reason, rows in group.problems:
            console.print(f"{_name(group)}: {rows} cannot be run: {reason}", highlight=False, markup=False)
    worst = [case for group in groups for case in group.worst]
    if worst:
        console.print(_worst(worst))


def _table(groups: Sequence[GroupScore]) -> Table:
    table = Table(title="Step time, predicted against published: |error|", title_justify="left", box=None)
    table.add_column("group", overflow="fold")
    for name in ("n", "not modelled", "mean", "median", "p90", "bias", "memory n", "memory mean", "bias"):
        table.add_column(name, justify="right")
    for group in groups:
        left_out = sum(rows for _, rows in (*group.not_modelled, *group.problems))
        table.add_row(_name(group), *_cells(group.time, left_out), *_memory(group.memory))
    return table


def _cells(time: Summary | None, left_out: int) -> list[str]:
    missing = str(left_out) if left_out else "-"
    if time is None:
        return ["0", missing, "-", "-", "-", "-"]
    return [str(time.cases), missing, f"{time.mean:.1%}", f"{time.median:.1%}", f"{time.p90:.1%}", f"{time.bias:+.1%}"]


def _memory(memory: Summary | None) -> list[str]:
    return ["-", "-", "-"] if memory is None else [str(memory.cases), f"{memory.mean:.1%}", f"{memory.bias:+.1%}"]


def _worst(cases: Sequence[Case]) -> Table:
    table = Table(title="Worst rows (`cosim validate show ID`)", title_justify="left", box=None)
    for name in ("id", "group"):
        table.add_column(name, overflow="fold")
    for name in ("published s", "predicted s", "error"):
        table.add_column(name, justify="right")
    for case in cases:
        measured, predicted = case.measured_step_time_s or 0.0, case.predicted_step_time_s or 0.0
        table.add_row(case.id, case.group, f"{measured:.4g}", f"{predicted:.4g}", f"{case.time_error or 0.0:+.1%}")
    return table


def _name(group: GroupScore) -> str:
    return f"{group.group} (composed)" if group.composed else group.group
