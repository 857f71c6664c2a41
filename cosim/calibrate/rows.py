"""Rows of published kernels.csv and collectives.csv as the work that they timed."""

import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosim.cost.rows import ATTENTION, algorithm_of, collective, kernels, op_of, positive, whole
from hwmodels.units import InputError
from hwmodels.work import Attention, Collective, Gemm, HostCopy, Pass


@dataclass(frozen=True, slots=True)
class Row:
    """One measured kernel or collective: `works` ran one after the other in `time_s`. `fitted` says which half it is
    in; `label` names the attention algorithm, or the system of a collective.
    """

    id: str
    source: str
    accelerator: str
    op: str
    works: tuple[Gemm | Attention | Pass | HostCopy | Collective, ...]
    time_s: float
    fitted: bool
    label: str = ""
    note: str = ""


def in_fitted_half(id: str) -> bool:
    """Whether a row is fitted on (the other half is only reported): a bit of a hash of its id, so that no one
    chooses.
    """
    return hashlib.sha256(id.encode()).digest()[0] % 2 == 0


def read_kernels(path: Path) -> list[Row]:
    """The timed rows of a kernels.csv. Raises InputError: no such file, a column missing, a row that is no kernel."""
    return list(_rows(path, "op", _kernel))


def read_collectives(path: Path) -> list[Row]:
    """The rows of a collectives.csv; ids are made of system, collective, devices and bytes.

    Raises InputError: no such file, a column missing, a row that is no collective.
    """
    return list(_rows(path, "collective", _collective))


def is_collectives(path: Path) -> bool:
    """Whether a csv file is one of collectives, by its columns. Raises InputError: it is neither, or unreadable."""
    lines = _lines(path)
    if not lines:
        raise InputError(f"{path}: is empty; it must be a csv file with a column 'op' or 'collective'")
    columns = lines[0]
    if "collective" not in columns and "op" not in columns:
        raise InputError(f"{path}: has neither a column 'op' nor 'collective'; its columns are {', '.join(columns)}")
    return "collective" in columns


def _lines(path: Path) -> list[list[str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return list(csv.reader(file))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: is not a csv file: {error}") from None


def _rows(path: Path, column: str, read: Any) -> Iterator[Row]:
    lines = _lines(path) or [[]]
    columns = lines[0]
    for needed in (column, "accelerator", "time_us"):
        if needed not in columns:
            raise InputError(f"{path}: has no column {needed!r}; its columns are {', '.join(columns)}")
    for number, values in enumerate(lines[1:], 2):
        if not values:
            continue
        if len(values) != len(columns):
            raise InputError(f"{path}, line {number}: has {len(values)} values for {len(columns)} columns")
        raw = dict(zip(columns, values, strict=True))
        try:
            row = read(raw)
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
        if row is not None:
            yield row


def _kernel(raw: dict[str, str]) -> Row | None:
    seconds = positive(raw, "time_us")
    if seconds is None:  # printed without a time
        return None
    op, source, note = op_of(raw), raw.get("source", ""), raw.get("note", "")
    algorithm = algorithm_of(raw) if op in ATTENTION else ""
    works = kernels(raw, algorithm)
    if source == "vidur" and op == "elementwise_add" and note.startswith("phi-2"):
        works *= 2  # Phi's parallel residual adds three tensors: two kernels
    id = raw.get("id") or "-".join(raw.values())
    return Row(id, source, raw["accelerator"], op, works, seconds * 1e-6, in_fitted_half(id), algorithm, note)


def _collective(raw: dict[str, str]) -> Row | None:
    seconds = positive(raw, "time_us")
    if seconds is None:
        return None
    system, kind = raw.get("system", ""), op_of({"collective": raw["collective"]})
    # vTrain's table gives the node's size there, vidur's how many of the group sit on one node.
    work = collective(raw, whole(raw, "devices_per_node"))
    id = "-".join((system, kind, raw["devices"], raw["devices_per_node"], raw["bytes"]))
    source = raw.get("source", "")
    return Row(id, source, raw["accelerator"], kind, (work,), seconds * 1e-6, in_fitted_half(id), system)
