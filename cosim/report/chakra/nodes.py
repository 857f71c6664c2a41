"""A played program as the nodes of Chakra traces: those of one device, which stands for all its replicas.

A compute task becomes its ops in order, with the collectives among them; a collective or a message of its own becomes
one node, and a message another one where it arrives. Times are as played: a task's is shared among its nodes as
their times alone are. Nodes wait for what their tasks wait for and for the task before on their stream, all of it as
data dependencies, since not every reader looks at control dependencies. A host thread is a chain of launches on the
CPU, one for each task, which waits until its own begins. A message is received behind the computation before the task
that needs it, so that a simulator that does one communication at a time never has ranks wait for each other.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosim.engine.program import Label, Program, Sent
from cosim.parallel.communication import communications
from cosim.report import words
from cosim.report.chakra.schema import NodeType
from cosim.report.chakra.unfolding import Unfolding
from cosim.report.communicators import Communicators
from cosim.result import TracedStep

PICOSECONDS_PER_US = 1_000_000
MESSAGE = "send_recv"
AGREEMENT = Sent("all_reduce", "pipeline", 4.0)
"""What stands for waiting for other stages without a message: ranks agree on one fp32 number, the gradients' norm."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node of every replica of a device; `depends` are numbers of earlier ones. `sent` is what it communicates: with
    its group, or with device `peer` (of a message, whose `tag` its sender and receiver know).
    """

    number: int
    name: str
    kind: NodeType
    depends: tuple[int, ...]
    start_us: int
    duration_us: int
    flops: float = 0.0
    hbm_bytes: float = 0.0
    sent: Sent | None = None
    peer: int = -1
    tag: int = 0
    on_host: bool = False


@dataclass(frozen=True, slots=True)
class Ops:
    """What the nodes of a device's ops are made of, per op; `sent` of those that communicate."""

    name: tuple[str, ...]
    time_s: NDArray[np.float64]
    flops: NDArray[np.float64]
    hbm_bytes: NDArray[np.float64]
    runs: NDArray[np.bool_]
    sent: dict[int, Sent]


def ops_of(traced: TracedStep, ranks: Communicators) -> Ops:
    """The ops of a device; views run nothing, and neither does a collective of one rank."""
    graph, prices = traced.graph, traced.prices
    sent = {
        one.op: Sent(one.kind, one.group, float(one.bytes))
        for one in communications(graph)
        if ranks.size(one.group) > 1
    }
    runs = prices.kernels > 0
    runs[list(sent)] = True
    names = [kind.target for kind in graph.kinds]
    modules = [words.plain_line(module) for module in graph.modules]
    said = tuple(
        f"{modules[module]} {names[kind]}".strip()
        for kind, module in zip(graph.op_kind.tolist(), graph.op_module.tolist(), strict=True)
    )
    return Ops(said, prices.time_s, prices.flops, prices.hbm_bytes, runs, sent)


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a task: one op or several, with their share of its time."""

    name: str
    share: float
    flops: float = 0.0
    hbm_bytes: float = 0.0
    sent: Sent | None = None


def pieces_of(label: Label, ops: Ops | None, parts: int, operators: bool, ranks: Communicators) -> list[Piece]:
    """What one of the `parts` tasks of a label does: collectives of its own, or its ops with the collectives among
    them; without `operators` those between two collectives as one.
    """
    if label.sent:
        share = 1.0 / len(label.sent)
        own = [Piece(label.name, share, sent=sent) for sent in label.sent if ranks.size(sent.group) > 1]
        return own or [Piece(label.name, 1.0)]
    first, stop = label.ops
    if ops is None or not ops.runs[first:stop].any():
        return [Piece(label.name, 1.0)]
    chosen = first + np.flatnonzero(ops.runs[first:stop])
    total = math.fsum(ops.time_s[chosen]) or 1.0
    pieces: list[Piece] = []
    for op in chosen.tolist():
        sent, share = ops.sent.get(op), float(ops.time_s[op]) / total
        one = Piece(ops.name[op], share, float(ops.flops[op]), float(ops.hbm_bytes[op]), sent)
        alone = (operators and parts == 1) or sent is not None
        if pieces and not alone and pieces[-1].sent is None:
            last = pieces.pop()
            one = Piece(label.name, last.share + share, last.flops + one.flops, last.hbm_bytes + one.hbm_bytes)
        elif not alone:
            one = replace(one, name=label.name)
        pieces.append(one)
    return [replace(piece, flops=piece.flops / parts, hbm_bytes=piece.hbm_bytes / parts) for piece in pieces]


class _Device:
    """One device's nodes while they grow."""

    def __init__(self, ops: Ops | None) -> None:
        self.ops = ops
        self.nodes: list[Node] = []
        self.last: dict[int, int] = {}  # stream -> its last node
        self.ends: dict[int, int] = {}  # task -> its last node
        self.received: dict[int, int] = {}  # message -> the last node of its arrival
        self.launched: dict[int, int] = {}  # host thread -> its last launch
        self.awaited: dict[int, int] = {}  # host thread -> the last node that it waits for
        self.computed = 0  # the last node that computes

    def add(self, name: str, kind: NodeType, depends: set[int], start_ps: float, end_ps: float, **more: Any) -> int:
        """Append a node; times are rounded so that what touches still does. Number 0 among `depends` is nothing."""
        start, end = round(start_ps / PICOSECONDS_PER_US), round(end_ps / PICOSECONDS_PER_US)
        number = len(self.nodes) + 1
        waits = tuple(sorted(depends - {0}))
        self.nodes.append(Node(number, words.plain_line(name), kind, waits, start, end - start, **more))
        return number

    def add_pieces(self, pieces: list[Piece], depends: set[int], start_ps: int, end_ps: int) -> int:
        """A task's nodes, one after another."""
        done, last = 0.0, 0
        for piece in pieces:
            begin, done = done, done + piece.share
            kind = NodeType.COMP_NODE if piece.sent is None else NodeType.COMM_COLL_NODE
            start, end = (start_ps + min(1.0, share) * (end_ps - start_ps) for share in (begin, done))
            more: dict[str, Any] = {"flops": piece.flops, "hbm_bytes": piece.hbm_bytes, "sent": piece.sent}
            last = self.add(piece.name, kind, depends, start, end, **more)
            depends = {last}
        return last


class _Writing:
    """The nodes of all devices while they grow."""

    def __init__(
        self, program: Program, tasks: Unfolding, traced: tuple[TracedStep, ...], ranks: Communicators, operators: bool
    ) -> None:
        self.program, self.tasks, self.ranks, self.operators = program, tasks, ranks, operators
        made = {id(step): ops_of(step, ranks) for step in traced}
        self.devices = [_Device(made[id(traced[d])] if d < len(traced) else None) for d in range(ranks.stages)]
        device = np.array([stream.device for stream in program.streams])[program.stream]
        self.where: list[int] = device[tasks.task].tolist()
        self.messages = np.array([_is_message(label) for label in program.labels])[program.label[tasks.task]].tolist()
        self.receiver = {
            before: self.where[at]
            for at, waits in enumerate(tasks.depends)
            for before in waits
            if self.messages[before] and self.where[before] != self.where[at]
        }
        rows = zip(program.label.tolist(), program.micro_step.tolist(), program.stream.tolist(), strict=True)
        self.parts = Counter(rows)  # one task cut into several has one label
        self.pieces: dict[tuple[int, int, int], list[Piece]] = {}

    def write(self, at: int) -> None:
        """Add the nodes of task `at`."""
        task, device = self.tasks.task[at], self.devices[self.where[at]]
        label, stream = self.program.labels[self.program.label[task]], int(self.program.stream[task])
        computes = self.program.streams[stream].kind == "compute"
        depends = self._waits(at, computes) | self._launched(at, device, label) | {device.last.get(stream, 0)}
        span = self.tasks.start_ps[at], self.tasks.end_ps[at]
        if self.messages[at]:
            more: dict[str, Any] = {"sent": label.sent[0], "peer": self.receiver.get(at, self.where[at]), "tag": at}
            last = device.add(label.name, NodeType.COMM_SEND_NODE, depends, *span, **more)
        else:
            last = device.add_pieces(self._pieces(task, device.ops), depends, *span)
        device.last[stream] = device.ends[at] = last
        if computes:
            device.computed = last
        if self.program.synchronises[task]:
            device.awaited[int(self.program.host[task])] = last

    def _launched(self, at: int, device: _Device, label: Label) -> set[int]:
        """Add a task's launch; answers what is behind the host when it begins: the launch before, or what it waited
        for.
        """
        task = self.tasks.task[at]
        host = int(self.program.host[task])
        if host < 0:
            return set()
        before = {device.launched.get(host, 0), device.awaited.pop(host, 0)}
        begin = self.tasks.issue_ps[at]
        end = begin + int(self.program.launch_ps[task])
        device.launched[host] = device.add(f"launch {label.name}", NodeType.COMP_NODE, before, begin, end, on_host=True)
        return before

    def _waits(self, at: int, computes: bool) -> set[int]:
        """The nodes of its device that a task waits for."""
        here = self.where[at]
        device = self.devices[here]
        waits, elsewhere = set[int](), False
        for before in self.tasks.depends[at]:
            if self.where[before] == here:
                waits.add(device.ends[before])
            elif self.messages[before]:
                waits.add(self._received(before, device))
            else:
                elsewhere = True
        if elsewhere and computes and self.ranks.stages > 1:  # a collective brings its members together by itself
            start = self.tasks.start_ps[at]
            waits = {device.add("agree", NodeType.COMM_COLL_NODE, waits, start, start, sent=AGREEMENT)}
        return waits

    def _received(self, message: int, device: _Device) -> int:
        """The arrival of a message, and what ranks that got parts of it do to put it together."""
        if message in device.received:
            return device.received[message]
        label = self.program.labels[self.program.label[self.tasks.task[message]]]
        first, *others = label.sent
        span = self.tasks.start_ps[message], self.tasks.end_ps[message]
        name = label.name.replace("send", "receive", 1)
        more: dict[str, Any] = {"sent": first, "peer": self.where[message], "tag": message}
        last = device.add(name, NodeType.COMM_RECV_NODE, {device.computed}, *span, **more)
        for sent in others:
            last = device.add(f"{name}, whole", NodeType.COMM_COLL_NODE, {last}, span[1], span[1], sent=sent)
        device.received[message] = last
        return last

    def _pieces(self, task: int, ops: Ops | None) -> list[Piece]:
        program = self.program
        key = (int(program.label[task]), int(program.micro_step[task]), int(program.stream[task]))
        parts = self.parts[key]
        known = (key[0], key[2], parts)
        if known not in self.pieces:
            self.pieces[known] = pieces_of(program.labels[key[0]], ops, parts, self.operators, self.ranks)
        return self.pieces[known]


def nodes_of(
    program: Program, tasks: Unfolding, traced: tuple[TracedStep, ...], ranks: Communicators, operators: bool
) -> list[list[Node]]:
    """The nodes of every device, those that are waited for before those that wait."""
    writing = _Writing(program, tasks, traced, ranks, operators)
    for at in range(len(tasks.task)):
        writing.write(at)
    return [device.nodes for device in writing.devices]


def _is_message(label: Label) -> bool:
    return bool(label.sent) and label.sent[0].kind == MESSAGE
