"""Messages of the Chakra schema in the protobuf wire format (schema/protobuf/et_def.proto of mlcommons/chakra).

Only the fields that are written here are known here, so that no generated code and no protobuf package is needed. A
file is a GlobalMetadata and then Nodes, each behind its length as a varint (chakra's protolib.encodeMessage).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum

VERSION = "0.0.4"
_VARINT, _BYTES = 0, 2  # wire types, https://protobuf.dev/programming-guides/encoding
_ATTRIBUTE_NAME = 1
_ATTRIBUTE_VALUE = {"int32": 7, "int64": 9, "uint64": 13, "bool": 27, "string": 29}
"""Fields of the oneof AttributeProto.value by type; ASTRA-sim's feeder expects each attribute in the one it has."""
_METADATA_VERSION, _METADATA_ATTRIBUTE = 1, 2
_ID, _NAME, _TYPE, _DATA_DEPENDENCIES, _START, _DURATION, _ATTRIBUTE = 1, 2, 3, 5, 6, 7, 10


class NodeType(IntEnum):
    """The kinds of Node that a simulated step has."""

    COMP_NODE = 4
    COMM_SEND_NODE = 5
    COMM_RECV_NODE = 6
    COMM_COLL_NODE = 7


COLLECTIVES: Mapping[str, int] = {
    "all_reduce": 0,
    "all_gather": 2,
    "broadcast": 5,
    "all_to_all": 6,
    "reduce_scatter": 7,
}
"""CollectiveCommType of each kind of hwmodels.work.Collective but messages."""


def attribute(name: str, kind: str, value: int | str) -> bytes:
    """The field `attr` of a Node: a name and a value of type `kind`, which is there even if it is 0."""
    number = _ATTRIBUTE_VALUE[kind]
    said = _text(number, str(value)) if kind == "string" else _varint(number << 3 | _VARINT) + _varint(int(value))
    return _field(_ATTRIBUTE, _text(_ATTRIBUTE_NAME, name) + said)


def node(
    number: int,
    name: str,
    kind: NodeType,
    depends: Iterable[int],
    start_micros: int,
    duration_micros: int,
    attributes: bytes,
) -> bytes:
    """A Node without its length; what is 0 is left out, as proto3 does."""
    waits = b"".join(_varint(before) for before in depends)
    return b"".join(
        [
            _number(_ID, number),
            _text(_NAME, name),
            _number(_TYPE, kind),
            _field(_DATA_DEPENDENCIES, waits) if waits else b"",
            _number(_START, start_micros),
            _number(_DURATION, duration_micros),
            attributes,
        ]
    )


def metadata(attributes: Mapping[str, str]) -> bytes:
    """The GlobalMetadata without its length, with attributes of text."""
    said = [
        _field(_METADATA_ATTRIBUTE, _text(_ATTRIBUTE_NAME, name) + _text(_ATTRIBUTE_VALUE["string"], value))
        for name, value in attributes.items()
    ]
    return _text(_METADATA_VERSION, VERSION) + b"".join(said)


def delimited(message: bytes) -> bytes:
    """A message behind its length."""
    return _varint(len(message)) + message


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3 | _VARINT) + _varint(value) if value else b""


def _text(field: int, text: str) -> bytes:
    return _field(field, text.encode())


def _field(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | _BYTES) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the high bit says that more follow."""
    if value < 0x80:
        return bytes((value,))
    made = bytearray()
    while value >= 0x80:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    made.append(value)
    return bytes(made)
