"""Rows of published kernels.csv and collectives.csv as the work that they timed."""

import csv
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cosim.cost import IMPLEMENTATIONS
from hwmodels.units import InputError
from hwmodels.vector_unit import ELEMENT_WORK
from hwmodels.work import Attention, Collective, Gemm, Pass, Phase


@dataclass(frozen=True, slots=True)
class Row:
    """One measured kernel or collective: `works` ran one after the other in `time_s`. `fitted` says which half it is
    in.
    """

    id: str
    source: str
    accelerator: str
    op: str
    works: tuple[Gemm | Attention | Pass | Collective, ...]
    time_s: float
    fitted: bool
    label: str = ""


def in_fitted_half(id: str) -> bool:
    """Whether a row is fitted on (the other half is only reported): a bit of a hash of its id, so that no one
    chooses.
    """
    return hashlib.sha256(id.encode()).digest()[0] % 2 == 0


def read_kernels(path: Path) -> list[Row]:
    """The rows of a kernels.csv that one of the hardware models can price; others are left out.

    Raises InputError: no such file, or a column missing.
    """
    return [row for row in map(_kernel, _read(path, "op")) if row is not None]


def read_collectives(path: Path) -> list[Row]:
    """The rows of a collectives.csv; ids are made of system, collective, devices and bytes.

    Raises InputError: no such file, or a column missing.
    """
    return [_collective(raw) for raw in _read(path, "collective")]


def _read(path: Path, column: str) -> Iterable[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if rows and column not in rows[0]:
        raise InputError(f"{path}: has no column {column!r}; its columns are {', '.join(rows[0])}")
    return rows


def _kernel(raw: dict[str, str]) -> Row | None:
    if not raw["time_us"]:
        return None
    op, source, seconds = raw["op"], raw["source"], float(raw["time_us"]) * 1e-6
    works: tuple[Gemm | Attention | Pass, ...]
    label = ""
    if op in ("gemm", "bmm", "grouped_gemm"):
        works = (_gemm(raw),)
    elif op.startswith("attention") and source == "flash_attention":
        implementation = re.search(r"impl=(\w+)", raw["note"])
        algorithm = IMPLEMENTATIONS.get(implementation[1] if implementation else "")
        if algorithm is None:  # standard, pytorch, xformers: other graphs
            return None
        label = algorithm
        phases: tuple[Phase, ...] = ("forward",) if op == "attention_fwd" else ("forward", "backward")
        works = tuple(_attention(raw, algorithm, phase) for phase in phases)
    else:
        kind = op.removeprefix("elementwise_")
        if kind not in ELEMENT_WORK:
            return None
        # Phi's parallel residual adds three tensors: two kernels.
        twice = source == "vidur" and kind == "add" and raw["note"].startswith("phi-2")
        works = (_pass(raw, kind),) * (2 if twice else 1)
    return Row(raw["id"], source, raw["accelerator"], op, works, seconds, in_fitted_half(raw["id"]), label)


def _gemm(raw: dict[str, str]) -> Gemm:
    layout = raw["layout"] if raw["layout"] in ("TN", "NN", "NT") else "TN"
    output = "fp32" if layout == "NT" and raw["source"] == "simumax" else raw["dtype"]
    m, n, k, batch = (int(raw[key] or 1) for key in ("m", "n", "k", "b"))
    return Gemm(m, n, k, batch, raw["dtype"], output, layout)  # type: ignore[arg-type]


def _attention(raw: dict[str, str], algorithm: str, phase: Phase) -> Attention:
    seq = int(raw["seq"])
    heads, kv_heads = int(raw["heads"]), int(raw["kv_heads"] or raw["heads"])
    causal = raw["causal"] == "True"
    return Attention(
        algorithm, phase, int(raw["b"]), heads, kv_heads, seq, seq, int(raw["head_dim"]), causal, raw["dtype"]
    )


def _pass(raw: dict[str, str], kind: str) -> Pass:
    work = ELEMENT_WORK[kind]
    elements = float(int(raw["m"] or 1) * int(raw["n"] or 1) * int(raw["b"] or 1))
    element = 4.0 if raw["dtype"] == "fp32" else 2.0
    return Pass(
        read_bytes=work.reads * element * elements,
        write_bytes=element * elements,
        vector_ops=work.vector_ops * elements,
        special_ops=work.special_ops * elements,
        format=raw["dtype"],
        kind=work.kind,
    )


def _collective(raw: dict[str, str]) -> Row:
    id = "-".join((raw["system"], raw["collective"], raw["devices"], raw["devices_per_node"], raw["bytes"]))
    devices, per_node = int(raw["devices"]), int(raw["devices_per_node"])
    # vTrain's table gives the node's size there, vidur's how many of the group sit on one node.
    kind = raw["collective"]
    work = Collective(kind, float(raw["bytes"]), devices, min(devices, per_node))  # type: ignore[arg-type]
    seconds = float(raw["time_us"]) * 1e-6
    return Row(id, raw["source"], raw["accelerator"], kind, (work,), seconds, in_fitted_half(id), raw["system"])
