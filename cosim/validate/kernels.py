"""Predicted against published kernels and collectives: errors by accelerator, op class, implementation and source, on
the half of the rows that constants were fitted on and on the other half.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosim.calibrate.constants import ENVELOPES, HOST_FLOOR, SHORT_S
from cosim.calibrate.fit import Errors, errors, price
from cosim.calibrate.rows import Row, read_collectives, read_kernels
from hwmodels.accelerator import Accelerator, load, names
from hwmodels.cluster import Cluster
from hwmodels.units import InputError
from hwmodels.work import Collective, Gemm

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PUBLISHED = Path(__file__).parent / "published"
LARGE_MESSAGE = 2**20  # bytes
SCHEMA_VERSION = 1
_POINTWISE = ("elementwise_add", "elementwise_gelu", "softmax")
_NCCL_TESTS = "vtrain_nccl"


@dataclass(frozen=True, slots=True)
class Kind:
    """What a row counts as: its op class, and the mean error that the other half is held to (None: none)."""

    op: str
    bar: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Line:
    """Errors of one accelerator, op class, implementation and source on both halves."""

    accelerator: str
    op: str
    implementation: str  # an attention algorithm, or the system of a collective
    source: str
    fitted: Errors
    held_out: Errors
    bar: float | None
    note: str

    @property
    def met(self) -> bool | None:
        """Whether the other half keeps to the bar; None where there is no bar, or no row."""
        return None if self.bar is None or not self.held_out.rows else self.held_out.mean <= self.bar


@dataclass(frozen=True, slots=True)
class Report:
    """All lines, and how many rows were left out for which reason."""

    lines: tuple[Line, ...]
    left_out: dict[str, int] = field(default_factory=dict)
    uncalibrated: bool = False


def check(accelerator: str | None = None, op: str | None = None, uncalibrated: bool = False) -> Report:
    """Prices the published rows of accelerators and op classes whose names contain `accelerator` and `op`.

    `uncalibrated` removes the `calibration:` section of every file: family defaults. Raises InputError: nothing chosen.
    """
    rows = [*read_kernels(PUBLISHED / "kernels.csv"), *read_collectives(PUBLISHED / "collectives.csv")]
    floors = _floors(rows)
    kinds = [(row, kind_of(row, floors)) for row in rows]
    chosen = [(r, k) for r, k in kinds if (accelerator or "") in r.accelerator and (op or "") in k.op]
    if not chosen:
        option, known = ("--accelerator", sorted({row.accelerator for row in rows}))
        if any((accelerator or "") in name for name in known):
            option, known = "--op", sorted({kind.op for _, kind in kinds})
        given = accelerator if option == "--accelerator" else op
        raise InputError(f"{option}: no published row has {given!r:.80} in its name; there are {', '.join(known)}")
    predict, left_out = _predictor(uncalibrated), Counter[str]()
    groups: dict[tuple[str, Kind, str, str], list[tuple[Row, float]]] = {}
    for row, kind in chosen:
        try:
            seconds = predict(row)
        except InputError as error:
            left_out[str(error)] += 1
        else:
            groups.setdefault((row.accelerator, kind, row.label, row.source), []).append((row, seconds))
    lines = [_line(*key, found) for key, found in groups.items()]
    lines.sort(key=lambda line: (line.op, line.accelerator, line.implementation, line.source))
    return Report(tuple(lines), dict(left_out), uncalibrated)


def kind_of(row: Row, floors: dict[tuple[str, str], float] | None = None) -> Kind:
    """The class of a row, by op, format and duration; `floors`: the shortest row of each op of sources that time from
    the host.
    """
    work = row.works[0]
    if isinstance(work, Collective):
        return _collective_kind(row, work)
    if row.op.startswith("attention"):
        return Kind(row.op, 0.10)
    long = row.time_s >= SHORT_S
    size = ">= 20 us" if long else "< 20 us"
    floor = (floors or {}).get((row.source, row.op), 0.0)
    if row.time_s < HOST_FLOOR.get(row.source, 0.0) * floor:
        return Kind(f"{row.op} near its floor", note="timed from the host")
    if row.op == "gemm" and isinstance(work, Gemm):
        if row.source in ENVELOPES:
            return Kind("gemm best shape", note="the best of a search: an envelope")
        if work.format == "fp32":
            return Kind(f"gemm fp32 {size}", 0.15 if long else None)
        barred = row.accelerator.split("-")[0] in ("a100", "h100", "b200")
        return Kind(f"gemm 16-bit {size}", 0.10 if long and barred else None)
    return Kind(f"{row.op} {size}", 0.15 if row.op in _POINTWISE else None)


def _collective_kind(row: Row, work: Collective) -> Kind:
    across = "" if work.devices == work.per_node else " across nodes"
    if work.bytes < LARGE_MESSAGE:
        return Kind(f"{row.op} < 1 MiB{across}")
    barred = row.source == _NCCL_TESTS and row.op == "all_reduce" and not across
    return Kind(f"{row.op} >= 1 MiB{across}", 0.12 if barred else None)


def _floors(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], float] = {}
    for row in rows:
        if row.source in HOST_FLOOR:
            found[row.source, row.op] = min(found.get((row.source, row.op), row.time_s), row.time_s)
    return found


def _predictor(uncalibrated: bool) -> Callable[[Row], float]:
    """A function that prices a row on its chip of the library. Raises InputError: a chip or kernel that it lacks."""
    known = set(names())
    chips: dict[str, Accelerator] = {}
    clusters: dict[tuple[str, int, int], Cluster] = {}

    def chip_of(name: str) -> Accelerator:
        if name not in known:
            raise InputError(f"{name} is not in the library")
        if name not in chips:
            plain = {"base": name, "name": name, "set": {"calibration": {}}}
            chips[name] = load(plain if uncalibrated else name)
        return chips[name]

    def predict(row: Row) -> float:
        chip, work = chip_of(row.accelerator), row.works[0]
        if not isinstance(work, Collective):
            return price(chip, row)
        key = (row.accelerator, work.devices, work.per_node)
        if key not in clusters:
            clusters[key] = Cluster.build(chip, work.devices, work.per_node if work.devices > work.per_node else 8)
        return clusters[key].collective_cost(work).time_s

    return predict


def _line(accelerator: str, kind: Kind, implementation: str, source: str, found: list[tuple[Row, float]]) -> Line:
    seconds = {row.id: time for row, time in found}
    halves = [
        errors(lambda row: seconds[row.id], [row for row, _ in found if row.fitted == half]) for half in (True, False)
    ]
    return Line(accelerator, kind.op, implementation, source, halves[0], halves[1], kind.bar, kind.note)


def to_json(report: Report) -> dict[str, Any]:
    """The report as JSON values."""
    return {
        "schema_version": SCHEMA_VERSION,
        "calibration": "uncalibrated" if report.uncalibrated else "calibrated",
        "lines": [{**asdict(line), "met": line.met} for line in report.lines],
        "left_out": report.left_out,
    }


def print_kernels(report: Report, console: Console) -> None:
    """One table of both halves, what was left out, and the bars that are missed."""
    console.print(_table(report))
    for reason, rows in sorted(report.left_out.items()):
        console.print(f"{rows} rows not priced: {reason}", highlight=False, markup=False)
    judged = [line for line in report.lines if line.met is not None]
    missed = [line for line in judged if not line.met]
    console.print(f"bars on the other half: {len(judged) - len(missed)} of {len(judged)} met")
    for line in missed:
        name = " ".join(filter(None, (line.accelerator, line.op, line.implementation, line.source)))
        console.print(f"missed: {name}: {line.held_out.mean:.1%} > {line.bar:.0%}", highlight=False, markup=False)


def _table(report: Report) -> Table:
    from rich.table import Table

    state = "uncalibrated: family defaults" if report.uncalibrated else "as the library's files calibrate them"
    table = Table(title=f"Kernels and collectives, predicted against published: |error| ({state})", box=None)
    table.title_justify = "left"
    for name in ("op", "accelerator", "implementation", "source"):
        table.add_column(name, overflow="fold")
    table.add_column("half")
    for name in ("n", "mean", "median", "p90", "bias", "bar"):
        table.add_column(name, justify="right")
    for line in report.lines:
        who = (line.op, line.accelerator, line.implementation, line.source)
        judged = "" if line.bar is None else f"{line.bar:.0%}"
        verdict = {True: " met", False: " missed", None: ""}[line.met]
        if line.fitted.rows:
            table.add_row(*who, "not fitted" if report.uncalibrated else "fitted", *_cells(line.fitted), "")
            who = ("", "", "", "")
        if line.held_out.rows:
            table.add_row(*who, "other", *_cells(line.held_out), judged + verdict)
    return table


def _cells(found: Errors) -> list[str]:
    return [str(found.rows), *(f"{v:.1%}" for v in (found.mean, found.median, found.p90)), f"{found.bias:+.1%}"]
