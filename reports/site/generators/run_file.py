"""The run file's reference, section by section, from the JSON Schema and the table of what is modelled."""

from collections.abc import Iterator, Mapping
from typing import Any

from cosim.spec import RunSpec
from cosim.spec.modelled import MODELLED
from generators.markdown import code, sentence, table

_VARIANTS = {  # the mappings that a field takes beside a name, by the field
    "workload.model": ("ModelDimensions", "HuggingFaceModel", "PythonModel"),
    "system.accelerator": ("AcceleratorOverride",),
    "training.recompute": ("EveryBlocks",),
}
_TYPES = {
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "string": "text",
    "object": "mapping",
}


def reference() -> str:
    """One heading and one table per section."""
    return "\n\n".join(_section(*found) for found in sections())


def sections() -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(path, what it is, JSON Schema) of every section and of every mapping that stands in a name's place."""
    schema = RunSpec.model_json_schema()
    definitions = schema["$defs"]
    yield from _below("", schema, definitions)


def fields() -> Iterator[str]:
    """Every path of the run file, such as "training.precision"."""
    for path, _, schema in sections():
        for name in schema["properties"]:
            yield f"{path}.{name}" if path else name


def _below(path: str, schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for name, field in schema["properties"].items():
        here = f"{path}.{name}" if path else name
        for reference in _references(field):
            inner = definitions[reference]
            yield here, inner["description"], inner
            yield from _below(here, inner, definitions)


def _references(field: Mapping[str, Any]) -> list[str]:
    found = [field, *field.get("allOf", ()), *field.get("anyOf", ()), *field.get("oneOf", ())]
    return [option["$ref"].rpartition("/")[2] for option in found if "$ref" in option]


def _section(path: str, what: str, schema: Mapping[str, Any]) -> str:
    required = schema.get("required", ())
    rows = [_row(f"{path}.{name}", name, field, name in required) for name, field in schema["properties"].items()]
    variant = next((title for title in _VARIANTS.get(path, ()) if title == schema["title"]), None)
    heading = {"ModelDimensions": "dimensions", "HuggingFaceModel": "Hugging Face", "PythonModel": "a module"}
    title = path + (f": {heading.get(variant, 'a mapping')}" if variant else "")
    head = table(("key", "meaning", "allowed", "default", "modelled today"), rows)
    return f"## {title}\n\n{sentence(what)}\n\n{head}"


def _row(path: str, name: str, field: Mapping[str, Any], required: bool) -> list[str]:
    return [
        code(name),
        sentence(field.get("description", "")),
        _allowed(field),
        _default(field, required),
        _modelled(path),
    ]


def _allowed(field: Mapping[str, Any]) -> str:
    options = field.get("anyOf") or field.get("oneOf") or [field]
    return " or ".join(dict.fromkeys(word for option in options if (word := _option(option))))


def _option(option: Mapping[str, Any]) -> str:
    if "enum" in option:
        return " ".join(map(code, option["enum"]))
    if "const" in option:
        return code(option["const"])
    if "$ref" in option:
        return "mapping"
    if option.get("type") == "null":
        return ""
    if option.get("type") == "array":
        return f"list of {_option(option['items']) or 'values'}" if "items" in option else "list"
    low, above = option.get("minimum"), option.get("exclusiveMinimum", option.get("gt"))
    high, below = option.get("maximum"), option.get("exclusiveMaximum")
    bounds = [f"≥ {low:,}"] if low is not None else [f"> {above:g}"] if above is not None else []
    bounds += [f"≤ {high:,.10g}"] if high is not None else [f"< {below:g}"] if below is not None else []
    return f"{_TYPES.get(option.get('type', ''), option.get('type', 'any'))} {', '.join(bounds)}".strip()


def _default(field: Mapping[str, Any], required: bool) -> str:
    if required:
        return "**required**"
    value = field.get("default")
    if value is None:
        return "see meaning" if "default" in field.get("description", "").lower() else "—"
    if value in ([], (), {}):
        return "none"
    return code(str(value).lower() if isinstance(value, bool) else value)


def _modelled(path: str) -> str:
    if path not in MODELLED:
        return "all"
    return " ".join(_value(value) for value in MODELLED[path])


def _value(value: object) -> str:
    if value is None:
        return "leaving it out"
    if isinstance(value, bool):
        return code(str(value).lower())
    return "none" if value == () else code(value)
