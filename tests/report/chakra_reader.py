"""Chakra traces read back by Google's protobuf, from the published schema, and played as a network simulator would."""

from __future__ import annotations

import heapq
import json
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

# schema/protobuf/et_def.proto of mlcommons/chakra: message -> field -> (number, type); "*": repeated, a capital letter:
# a message or an enum of the schema. Fields 3 to 32 of AttributeProto are one oneof.
_SCALARS = ("double", "float", "int32", "int64", "uint32", "uint64", "sint32", "sint64", "fixed32", "fixed64")
_SCALARS += ("sfixed32", "sfixed64", "bool", "string", "bytes")
SCHEMA: dict[str, dict[str, tuple[int, str]]] = {
    "AttributeProto": {
        "name": (1, "string"),
        "doc_string": (2, "string"),
        **{f"{kind}_val": (3 + 2 * i, kind) for i, kind in enumerate(_SCALARS)},
        **{f"{kind}_list": (4 + 2 * i, f"{kind.capitalize()}List") for i, kind in enumerate(_SCALARS)},
    },
    **{f"{kind.capitalize()}List": {"values": (1, f"*{kind}")} for kind in _SCALARS},
    "GlobalMetadata": {"version": (1, "string"), "attr": (2, "*AttributeProto")},
    "IOInfo": {"values": (1, "string"), "shapes": (2, "string"), "types": (3, "string")},
    "Node": {
        "id": (1, "uint64"),
        "name": (2, "string"),
        "type": (3, "NodeType"),
        "ctrl_deps": (4, "*uint64"),
        "data_deps": (5, "*uint64"),
        "start_time_micros": (6, "uint64"),
        "duration_micros": (7, "uint64"),
        "inputs": (8, "IOInfo"),
        "outputs": (9, "IOInfo"),
        "attr": (10, "*AttributeProto"),
    },
}
ENUMS = {
    "NodeType": "INVALID_NODE METADATA_NODE MEM_LOAD_NODE MEM_STORE_NODE COMP_NODE COMM_SEND_NODE COMM_RECV_NODE "
    "COMM_COLL_NODE",
    "CollectiveCommType": "ALL_REDUCE REDUCE ALL_GATHER GATHER SCATTER BROADCAST ALL_TO_ALL REDUCE_SCATTER "
    "REDUCE_SCATTER_BLOCK BARRIER",
}


@cache
def messages() -> dict[str, Any]:
    """The schema's messages as protobuf classes."""
    field_type = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="et_def.proto", package="ChakraProtoMsg", syntax="proto3")
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values.split()):
            enum.value.add(name=value, number=number)
    for name, fields in SCHEMA.items():
        message = file.message_type.add(name=name)
        if name == "AttributeProto":
            message.oneof_decl.add(name="value")
        for field_name, (number, kind) in fields.items():
            label = field_type.LABEL_REPEATED if kind.startswith("*") else field_type.LABEL_OPTIONAL
            made = message.field.add(name=field_name, number=number, label=label)
            kind = kind.removeprefix("*")
            if kind in ENUMS or kind in SCHEMA:
                made.type_name = f".ChakraProtoMsg.{kind}"
                made.type = field_type.TYPE_ENUM if kind in ENUMS else field_type.TYPE_MESSAGE
            else:
                made.type = getattr(field_type, f"TYPE_{kind.upper()}")
            if name == "AttributeProto" and number >= 3:
                made.oneof_index = 0
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = {name: pool.FindMessageTypeByName(f"ChakraProtoMsg.{name}") for name in SCHEMA}
    return {name: message_factory.GetMessageClass(one) for name, one in found.items()}


@dataclass
class Node:
    """A node as ASTRA-sim's feeder sees it."""

    id: int
    name: str
    type: str
    deps: list[int]
    start: int
    duration: int
    attr: dict[str, Any]


@dataclass
class Trace:
    metadata: dict[str, str]
    version: str
    nodes: list[Node] = field(default_factory=list)


def read(path: Path) -> Trace:
    """One rank's trace, length by length as protolib.decodeMessage reads it; fails on any field the schema lacks."""
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        size = shift = 0
        while True:
            byte = data[at]
            at += 1
            size |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        found.append(data[at : at + size])
        assert len(found[-1]) == size > 0
        at += size
    kinds = messages()
    head = kinds["GlobalMetadata"].FromString(found[0])
    trace = Trace({one.name: one.string_val for one in head.attr}, head.version)
    for text in found[1:]:
        node = kinds["Node"].FromString(text)
        assert node.SerializeToString() == text  # nothing unknown, nothing out of order
        attributes = {one.name: getattr(one, one.WhichOneof("value")) for one in node.attr}
        deps = [*node.data_deps, *node.ctrl_deps]
        name = ENUMS["NodeType"].split()[node.type]
        trace.nodes.append(
            Node(node.id, node.name, name, deps, node.start_time_micros, node.duration_micros, attributes)
        )
    return trace


def read_all(folder: Path, ranks: int) -> tuple[list[Trace], dict[int, list[int]]]:
    """All ranks' traces, and the members of every communicator."""
    groups = {int(name): members for name, members in json.loads((folder / "comm_groups.json").read_text()).items()}
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        ["comm_groups.json", *(f"trace.{rank}.et" for rank in range(ranks))]
    )
    return [read(folder / f"trace.{rank}.et") for rank in range(ranks)], groups


def replay(traces: list[Trace], one_communication: bool) -> int:
    """Microseconds until all is done, every node as long as it says; communications begin when all partners are there.

    As in ASTRA-sim (workload/Workload.cc, HardwareResource.cc), a rank's CPU and its device compute one node at a time
    each, and it communicates one at a time if `one_communication`, of those that are ready the one with the lowest
    number. Raises AssertionError when ranks wait for each other.
    """
    return _Replay(traces, one_communication).run()


def _unit(node: Node) -> str:
    """What runs a node; of communications there may be several at a time."""
    if node.type != "COMP_NODE":
        return "communication"
    return "cpu" if node.attr["is_cpu_op"] else "compute"


class _Replay:
    def __init__(self, traces: list[Trace], one_communication: bool) -> None:
        self.nodes = [{node.id: node for node in trace.nodes} for trace in traces]
        self.missing = [{node.id: len(set(node.deps)) for node in trace.nodes} for trace in traces]
        self.waiting: list[dict[int, list[int]]] = [defaultdict(list) for _ in traces]
        self.ready: list[dict[str, list[int]]] = [{"cpu": [], "compute": [], "communication": []} for _ in traces]
        links = 1 if one_communication else 10**9
        self.slots = [{"cpu": 1, "compute": 1, "communication": links} for _ in traces]
        self.turn: dict[tuple[int, str], int] = defaultdict(int)
        self.partners: dict[str, int] = defaultdict(int)
        self.posted: dict[Any, list[tuple[int, int, Node]]] = defaultdict(list)
        self.events: list[tuple[int, int, int]] = []
        for rank, trace in enumerate(traces):
            for name in {node.attr["pg_name"] for node in trace.nodes if "pg_name" in node.attr}:
                self.partners[name] += 1
            for node in trace.nodes:
                for dep in set(node.deps):
                    self.waiting[rank][dep].append(node.id)
                if not node.deps:
                    self._ready(rank, node.id)

    def run(self) -> int:
        now, left = 0, sum(map(len, self.nodes))
        for rank in range(len(self.nodes)):
            self._issue(rank, now)
        while self.events:
            now, rank, number = heapq.heappop(self.events)
            left -= 1
            self.slots[rank][_unit(self.nodes[rank][number])] += 1
            for after in self.waiting[rank][number]:
                self.missing[rank][after] -= 1
                if not self.missing[rank][after]:
                    self._ready(rank, after)
            self._issue(rank, now)
        assert not left, f"{left} nodes wait for each other"
        return now

    def _ready(self, rank: int, number: int) -> None:
        heapq.heappush(self.ready[rank][_unit(self.nodes[rank][number])], number)

    def _issue(self, rank: int, now: int) -> None:
        for unit, queue in self.ready[rank].items():
            while queue and self.slots[rank][unit]:
                node = self.nodes[rank][heapq.heappop(queue)]
                self.slots[rank][unit] -= 1
                for end, member, one in self._begun(rank, node, now):
                    heapq.heappush(self.events, (end, member, one.id))

    def _begun(self, rank: int, node: Node, now: int) -> list[tuple[int, int, Node]]:
        """The nodes whose end is known now: a collective's once the last member is there; a message's arrival once it
        was sent and is waited for, while its sender goes on without its receiver.
        """
        if node.type == "COMP_NODE":
            return [(now + node.duration, rank, node)]
        if node.type == "COMM_COLL_NODE":
            group = node.attr["pg_name"]
            self.turn[rank, group] += 1
            posted = self.posted[group, self.turn[rank, group]]
            posted.append((now, rank, node))
            whole = len(posted) == self.partners[group]
            return [(now + one.duration, member, one) for _, member, one in posted] if whole else []
        posted = self.posted[tuple(node.attr[f"comm_{what}"] for what in ("src", "dst", "tag"))]
        sends = node.type == "COMM_SEND_NODE"
        posted.append((now + node.duration if sends else now, rank, node))
        begun = [posted[-1]] if sends else []
        if len(posted) == 2:
            arrives = max(time for time, _, _ in posted)
            begun += [(arrives, member, one) for _, member, one in posted if one.type == "COMM_RECV_NODE"]
        return begun
