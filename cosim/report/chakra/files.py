"""The traces of every rank of the cluster as files, `trace.0.et` and so on, with the communicators: `comm_groups.json`.

Replicas do the same with other partners: a device's nodes are encoded once, and what names a communicator or a partner
once for each rank. ASTRA-sim reads them with `--workload-configuration=DIR/trace` and
`--comm-group-configuration=DIR/comm_groups.json`.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cosim.engine.program import PICOSECONDS_PER_S
from cosim.output import writing
from cosim.report import words
from cosim.report.chakra.nodes import Node, nodes_of
from cosim.report.chakra.schema import COLLECTIVES, NodeType, attribute, delimited, metadata, node
from cosim.report.chakra.unfolding import unfolded
from cosim.report.communicators import Communicators
from cosim.result import Detail, Result
from hwmodels.units import InputError

MOST_NODES = 2_000_000
"""Of all ranks together, with one node per op; else the ops between two collectives are one node."""
GROUPS = "comm_groups.json"
_OURS = re.compile(r"trace\.\d+\.et|comm_groups\.json")
_ON_DEVICE, _ON_HOST = (attribute("is_cpu_op", "bool", on_host) for on_host in (0, 1))


def write_chakra(result: Result, folder: str | Path, most_nodes: int = MOST_NODES) -> None:
    """Writes one trace per rank and their communicators into `folder`, which is made, or holds an earlier export.

    Raises InputError: the result has no detail, or `folder` cannot be written or holds other files; then nothing is
    left behind.
    """
    detail = result.detail
    if detail is None:
        raise InputError("chakra: this result has no timeline; simulate the run again")
    ranks = Communicators.of(result.spec)
    level, devices = "operators", _nodes(result, detail, ranks, operators=True)
    if sum(map(len, devices)) * ranks.stage_ranks > most_nodes:
        level, devices = "tasks", _nodes(result, detail, ranks, operators=False)
    said = {
        "schema": "cosim",
        "model": words.model_name(result),
        "machine": words.machine(result),
        "level": level,
        "simulated_by": "cosim; no step of this run was executed",
    }
    start = delimited(metadata(said))
    with _whole_folder(Path(folder)) as place:
        for stage, nodes in enumerate(devices):
            parts = _parts(nodes, ranks)
            for rank in range(stage * ranks.stage_ranks, (stage + 1) * ranks.stage_ranks):
                (place / f"trace.{rank}.et").write_bytes(start + b"".join(_of_rank(parts, rank, ranks)))
        members = {str(number): list(group) for group, number in ranks.numbers.items()}
        (place / GROUPS).write_text(json.dumps(members) + "\n", encoding="utf-8")


def check_folder(folder: Path) -> None:
    """Raises InputError: a place where no traces can be written."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--chakra {folder}: is a file; allowed: the name of a folder")
    if not folder.absolute().parent.is_dir():
        raise InputError(f"--chakra {folder}: {folder.parent} is no folder; allowed: a name in a folder that exists")
    strange = [file.name for file in folder.iterdir() if not _OURS.fullmatch(file.name)] if folder.exists() else []
    if strange:
        raise InputError(
            f"--chakra {folder}: holds {words.plain_line(min(strange))}, which is no trace; "
            "allowed: a new folder, an empty one, or one of earlier traces, which are replaced"
        )


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, whose files move into it when the block ends well."""
    check_folder(folder)
    with writing(folder, "--chakra"):
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
        try:
            yield made
            folder.mkdir(exist_ok=True)
            for old in folder.iterdir():
                old.unlink()
            for file in made.iterdir():
                file.replace(folder / file.name)
        finally:
            shutil.rmtree(made, ignore_errors=True)


def _nodes(result: Result, detail: Detail, ranks: Communicators, operators: bool) -> list[list[Node]]:
    step_ps = round(result.step_time_s * PICOSECONDS_PER_S)
    repeats = detail.micro_steps - detail.micro_steps_played
    tasks = unfolded(detail.program, detail.timeline, repeats, step_ps)
    return nodes_of(detail.program, tasks, detail.ranks, ranks, operators)


@dataclass(frozen=True, slots=True)
class _Partnered:
    """A node that names a communicator or a partner: what is before its attributes, and the node."""

    before: bytes
    node: Node


def _parts(nodes: list[Node], ranks: Communicators) -> list[bytes | _Partnered]:
    """Nodes encoded, those that are the same on every rank as long runs."""
    parts: list[bytes | _Partnered] = []
    run: list[bytes] = []
    for one in nodes:
        if one.sent is None:
            run.append(delimited(_encoded(one, _computes(one))))
            continue
        if run:
            parts.append(b"".join(run))
            run = []
        parts.append(_Partnered(_encoded(one, _communicates(one, ranks)), one))
    return [*parts, b"".join(run)]


def _of_rank(parts: Iterable[bytes | _Partnered], rank: int, ranks: Communicators) -> Iterator[bytes]:
    known: dict[str, bytes] = {}
    for part in parts:
        if isinstance(part, bytes):
            yield part
            continue
        one = part.node
        assert one.sent is not None
        if one.kind == NodeType.COMM_COLL_NODE:
            group = one.sent.group
            if group not in known:
                known[group] = attribute("pg_name", "string", str(ranks.number(group, rank)))
            yield delimited(part.before + known[group])
            continue
        ends = rank, ranks.replica(rank, one.peer)
        source, target = ends if one.kind == NodeType.COMM_SEND_NODE else reversed(ends)
        yield delimited(part.before + attribute("comm_src", "int32", source) + attribute("comm_dst", "int32", target))


def _encoded(one: Node, attributes: bytes) -> bytes:
    attributes = (_ON_HOST if one.on_host else _ON_DEVICE) + attributes
    return node(one.number, one.name, one.kind, one.depends, one.start_us, one.duration_us, attributes)


def _computes(one: Node) -> bytes:
    if not one.flops and not one.hbm_bytes:
        return b""
    # at least 1 of each: a roofline divides by their ratio
    moved = attribute("tensor_size", "uint64", max(1, round(one.hbm_bytes)))
    return attribute("num_ops", "int64", max(1, round(one.flops))) + moved


def _communicates(one: Node, ranks: Communicators) -> bytes:
    """What all replicas of a communication have in common. Bytes are of a rank's input, as ASTRA-sim counts them: of an
    all-gather the part that it gives.
    """
    sent = one.sent
    assert sent is not None
    if one.kind != NodeType.COMM_COLL_NODE:
        return attribute("comm_size", "int64", math.ceil(sent.bytes)) + attribute("comm_tag", "int32", one.tag)
    size = sent.bytes / ranks.size(sent.group) if sent.kind == "all_gather" else sent.bytes
    return attribute("comm_type", "int64", COLLECTIVES[sent.kind]) + attribute("comm_size", "int64", math.ceil(size))
