"""The one way in which a YAML document or a line of JSON comes in: plain data of bounded size, with errors that name
the line.

The scalars are those of YAML 1.2's core schema, so that `1e12` is a number, `no` is text and `010` is ten. Object tags,
duplicate keys, aliases that expand without bound and documents over `SIZE_LIMIT_BYTES` are refused.
"""

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from hwmodels.units import InputError

SIZE_LIMIT_BYTES = 1_000_000
_NODE_LIMIT = 200_000  # values in a document once its aliases are followed
_DEPTH_LIMIT = 100
_DIGIT_LIMIT = 400  # beyond the largest float
_TAG = "tag:yaml.org,2002:"
_TAGS = frozenset(_TAG + name for name in ("str", "int", "float", "bool", "null", "seq", "map"))
_BASE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SCALARS: tuple[tuple[str, str, str], ...] = (  # type, pattern, first characters
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("int", r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("merge", r"<<", "<"),
)


class _Loader(_BASE):  # type: ignore[misc]  # PyYAML's C loader has no type
    """PyYAML's safe loader with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}


for _type, _pattern, _first in _SCALARS:
    for _character in [*_first, ""] if _type == "null" else _first:
        _Loader.yaml_implicit_resolvers.setdefault(_character, []).append(
            (_TAG + _type, re.compile(rf"(?:{_pattern})\Z"))
        )


def _integer(loader: Any, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    digits = text.lstrip("-+").replace("_", "")
    if len(digits) > _DIGIT_LIMIT:
        raise yaml.MarkedYAMLError(problem=_too_long(len(digits)), problem_mark=node.start_mark)
    base = {"0o": 8, "0x": 16}.get(digits[:2], 10)
    return int(digits, base) * (-1 if text.startswith("-") else 1)


_Loader.add_constructor(_TAG + "int", _integer)


def load_yaml(source: Path | str, where: str) -> object:
    """The plain data (mappings, lists, text, numbers, true/false, None) in a file (`Path`) or in YAML text (`str`).

    `where` names the source in errors. An empty document is refused.

    Raises InputError: unreadable, not UTF-8, too large, not YAML, more than one document, an object tag, a duplicate or
    composite key, too deep, or aliases that expand beyond bounds.
    """
    text = read_text(source, where) if isinstance(source, Path) else source
    if len(text) > SIZE_LIMIT_BYTES:
        raise InputError(f"{where}: is larger than the {SIZE_LIMIT_BYTES // 1_000_000} MB that is allowed")
    try:
        _check_depth(text, where)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None or (node.tag == _TAG + "null" and not text.strip("-~ \n\r\t")):
                raise InputError(f"{where}: is empty")
            _check(node, where, {}, ())
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{where}{line}: is not valid YAML: {_one_line(error.problem or error.context)}") from None
    except yaml.reader.ReaderError as error:
        raise InputError(f"{where}: is not valid YAML: holds the control character U+{error.character:04X}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}: is not valid YAML: {_one_line(error)}") from None


def load_json(line: bytes, where: str) -> object:
    """The plain data in one line of JSON; `where` names it in errors.

    Raises InputError: not UTF-8, too large, empty, not JSON, a duplicate key, nested too deeply.
    """
    text = decode(line, where).strip()
    if not text:
        raise InputError(f"{where}: is empty")
    try:
        return json.loads(
            text,
            object_pairs_hook=lambda pairs: _without_twins(pairs, where),
            parse_int=lambda digits: _short_integer(digits, where),
        )
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: is not valid JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise InputError(f"{where}: is nested too deeply") from None


def _without_twins(pairs: list[tuple[str, object]], where: str) -> dict[str, object]:
    data = dict(pairs)
    if len(data) != len(pairs):
        keys = [key for key, _ in pairs]
        twin = next(key for key in keys if keys.count(key) > 1)
        raise InputError(f"{where}: the key {twin!r:.60} is there twice")
    return data


def _short_integer(digits: str, where: str) -> int:
    if len(digits) > _DIGIT_LIMIT:
        raise InputError(f"{where}: is not valid JSON: {_too_long(len(digits))}")
    return int(digits)


def _too_long(digits: int) -> str:
    return f"a number has {digits} digits; allowed: {_DIGIT_LIMIT}"


def read_text(path: Path, where: str) -> str:
    """The text of a file of at most `SIZE_LIMIT_BYTES`; raises InputError if it is larger, unreadable or not UTF-8."""
    try:
        with path.open("rb") as file:
            data = file.read(SIZE_LIMIT_BYTES + 1)
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # a null character in the name
        raise InputError(f"{where}: cannot be read: {error}") from None
    return decode(data, where)


def decode(data: bytes, where: str) -> str:
    """`data` as UTF-8 text; raises InputError if it is over `SIZE_LIMIT_BYTES` or not UTF-8."""
    if len(data) > SIZE_LIMIT_BYTES:
        raise InputError(f"{where}: is larger than the {SIZE_LIMIT_BYTES // 1_000_000} MB that is allowed")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: is not UTF-8 text (byte {error.start})") from None


def _check_depth(text: str, where: str) -> None:
    """Refuses deep nesting from the events, which are read without recursion; libyaml's composer would end the
    process.
    """
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _DEPTH_LIMIT:
                raise InputError(f"{where}: is nested deeper than the {_DEPTH_LIMIT} levels that are allowed")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _check(node: yaml.Node, where: str, sizes: dict[int, int], parents: tuple[int, ...]) -> int:
    """The number of values below `node` with aliases followed; each node is visited once."""
    if id(node) in parents:
        raise InputError(f"{where}, line {node.start_mark.line + 1}: an alias contains itself")
    if id(node) in sizes:
        return sizes[id(node)]
    at = f"{where}, line {node.start_mark.line + 1}"
    if node.tag not in _TAGS:
        raise InputError(f"{at}: the tag '{node.tag.replace(_TAG, '!!')}' is not allowed; only plain data is")
    size = 1
    if isinstance(node, yaml.ScalarNode):
        size += len(node.value) // 100  # long text that is repeated by aliases grows too
    elif isinstance(node, yaml.MappingNode):
        keys = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise InputError(f"{where}, line {key.start_mark.line + 1}: a key must be text or a number")
            if (key.tag, key.value) in keys:
                raise InputError(f"{where}, line {key.start_mark.line + 1}: the key '{key.value}' is there twice")
            keys.add((key.tag, key.value))
            size += 1 + _check(value, where, sizes, (*parents, id(node)))
    elif isinstance(node, yaml.SequenceNode):
        size += sum(_check(item, where, sizes, (*parents, id(node))) for item in node.value)
    if size > _NODE_LIMIT:
        raise InputError(f"{at}: holds more than the {_NODE_LIMIT} values that are allowed once aliases are followed")
    sizes[id(node)] = size
    return size


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:200]
