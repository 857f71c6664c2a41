"""The software stack's reference: every fact with the comment beside it, and its value and source in each profile."""

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

from cosim import stacks
from cosim.stacks.stack import ByArchitecture, Stack
from generators.markdown import code, sentence, table
from hwmodels.units import format_quantity

_FIELD = re.compile(r"^    (\w+): .*?(?:  # (.*))?$")
_SECTION = re.compile(r"^    # \S")
_IDENTITY = ("name", "title", "sources", "assumed")


@dataclasses.dataclass(frozen=True, slots=True)
class Fact:
    """One field of `Stack`: its section's comment, and its own."""

    name: str
    section: str
    comment: str


def found() -> list[Fact]:
    """Every fact in the order of the class, with the comments of its source."""
    names = {field.name for field in dataclasses.fields(Stack)} - set(_IDENTITY)
    facts: dict[str, Fact] = {}
    section, current, gap = "", "", True
    for line in inspect.getsource(Stack).splitlines():
        if not line.strip():
            gap = True
        elif _SECTION.match(line):
            section = line.strip("# ") if gap else f"{section} {line.strip('# ')}"
            current, gap = "", False
        elif (field := _FIELD.match(line)) and field[1] in names:
            current, gap = field[1], False
            facts[current] = Fact(current, section, (field[2] or "").strip())
        elif current and "#" in line:  # the comment goes on
            more = line.partition("#")[2].strip()
            facts[current] = dataclasses.replace(facts[current], comment=f"{facts[current].comment} {more}".strip())
    return list(facts.values())


def facts() -> str:
    """A table per section of the class."""
    defaults = Stack(name="", title="", sources={}, assumed=())
    sections: dict[str, list[list[str]]] = {}
    for fact in found():
        row = [code(fact.name), sentence(fact.comment), _value(fact.name, getattr(defaults, fact.name))]
        sections.setdefault(fact.section, []).append(row)
    texts = []
    for section, rows in sections.items():
        title, _, more = section.partition(". ")
        texts.append(f"### {title.rstrip('.')}\n\n{sentence(more)}\n\n{table(('fact', 'meaning', 'neutral'), rows)}")
    return "\n\n".join(texts)


def values() -> str:
    """What each profile of the library says and where that can be read; what it inherits has the base's source."""
    return "\n\n".join(_profile(name) for name in stacks.names())


def _profile(name: str) -> str:
    profile = stacks.load(name)
    known = [fact.name for fact in found() if fact.name not in profile.assumed]
    rows = [[code(key), _value(key, getattr(profile, key)), profile.sources[key].replace("|", "/")] for key in known]
    assumed = ", ".join(map(code, profile.assumed)) or "nothing"
    return f"### {name}\n\n{profile.title}. Assumed (neutral): {assumed}.\n\n{table(('fact', 'value', 'source'), rows)}"


def _value(name: str, value: Any) -> str:
    if isinstance(value, ByArchitecture):
        return ", ".join(_parts(name, value))
    if isinstance(value, bool):
        return code(str(value).lower())
    if name.endswith("_s"):
        return code(format_quantity(value, "time"))
    if name.endswith("_bytes"):
        return code(format_quantity(value, "data"))
    return code(value)


def _parts(name: str, value: ByArchitecture[Any]) -> Iterator[str]:
    yield _value(name, value.default)
    for architecture, other in value.others:
        yield f"{architecture} {_value(name, other)}"
