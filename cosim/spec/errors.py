"""pydantic's errors as one sentence: the file, the key, the value, and what would be allowed."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from hwmodels.units import InputError

_SHOWN = 3  # sentences; the rest is counted
_TYPES = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "tuple_type": "must be a list",
    "finite_number": "must be a finite number",
    "string_unicode": "must be Unicode text, without half of a surrogate pair",
    "string_too_short": "must not be empty",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "greater than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
    "string_too_long": ("max_length", "no longer than (characters)"),
    "too_long": ("max_length", "no longer than"),
}


def translate(error: ValidationError, model: type[BaseModel], where: str) -> InputError:
    """The InputError that says what `error` says; the kind of an InputError raised by a validator is kept."""
    details = [detail for detail in error.errors(include_url=False) if detail["type"] != "default_factory_not_called"]
    for detail in details:
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, InputError) and not detail["loc"]:
            cause.args = (f"{where}: {cause}",)
            return cause
    sentences = _joined([_sentence(detail, model) for detail in details])
    more = f"; and {len(sentences) - _SHOWN} more" if len(sentences) > _SHOWN else ""
    return InputError(f"{where}: {'; '.join(sentences[:_SHOWN])}{more}")


def _joined(sentences: Sequence[str]) -> list[str]:
    """Each sentence once; what a value must be in one of several types is one sentence."""
    joined: dict[str, str] = {}
    for sentence in dict.fromkeys(sentences):
        key, must, words = sentence.partition(" must be ")
        joined[key] = f"{joined[key]}, or {words}" if must and key in joined else sentence
    return list(joined.values())


def closest(name: str, known: Sequence[str]) -> str:
    """ "; did you mean 'x'?" if one of `known` is close to `name`, else nothing."""
    match = difflib.get_close_matches(name[:100], known, n=1)
    return f"; did you mean '{match[0]}'?" if match else ""


def _sentence(detail: Mapping[str, Any], model: type[BaseModel]) -> str:
    location = [part for part in detail["loc"] if not str(part).startswith("<") and not _is_type(part)]
    key = ".".join(short(part) for part in location) or "the run file"
    kind, context, value = detail["type"], detail.get("ctx", {}), short(detail["input"], quote=True)
    if kind == "missing":
        return f"{key} is missing"
    if kind == "extra_forbidden":
        allowed = _allowed_keys(model, detail["loc"][:-1])
        hint = closest(str(location[-1]), allowed) or f"; allowed: {', '.join(allowed)}"
        return f"{key} is not a key of the run file{hint}"
    if kind == "string_type" and detail["loc"][-1] == "<name>":
        return f"{key}: {value} must be a name or a mapping"
    if kind in _TYPES:
        return f"{key}: {value} {_TYPES[kind]}"
    if kind == "literal_error":
        allowed = context["expected"].replace("'", "").replace(" or ", ", ")
        if _is_type(detail["loc"][-1]):
            return f"{key}: {value} must be {allowed}"
        hint = closest(str(detail["input"]), allowed.split(", ")) or ";"
        return f"{key}: {value} is not allowed{hint} allowed: {allowed}"
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        return f"{key}: {value} must be {words} {context[bound]}"
    if kind == "value_error":
        return f"{key}: {str(context['error']).removeprefix(': ')}"
    if kind == "string_pattern_mismatch":
        example = {"python": "package.module:function", "huggingface": "LlamaForCausalLM"}.get(str(location[-1]), "")
        return f"{key}: {value} must be written like {example}"
    return f"{key}: {value}: {detail['msg'][:1].lower()}{detail['msg'][1:]}"


def _is_type(part: int | str) -> bool:
    """Whether a part of a location is pydantic's name of one of several plain types."""
    return part == "bool" or str(part).startswith("literal[")


def _allowed_keys(model: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    """The keys of the section at `path` of `model`; `path` holds the tag of a union after its field."""
    section: Any = model
    candidates: list[type[BaseModel]] = [model]
    for part in path:
        if str(part).startswith("<"):
            candidates = [c for c in candidates if _tag_fits(c, str(part))] or candidates
        elif isinstance(part, str) and part in section.model_fields:
            candidates = _sections(section.model_fields[part].annotation)
        section = candidates[0] if candidates else section
    return sorted(section.model_fields)


def _tag_fits(section: type[BaseModel], tag: str) -> bool:
    return tag.strip("<>") in section.__name__.lower() or tag == "<mapping>"


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models that occur in a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for inner in getattr(annotation, "__args__", ()) for section in _sections(inner)]


def short(value: object, quote: bool = False) -> str:
    """`value` in one short line."""
    if isinstance(value, dict | list | tuple):
        return "a mapping" if isinstance(value, dict) else "a list"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int) and abs(value) > 10**30:
        return "a number of that size"
    text = repr(value) if quote or not str(value).isprintable() else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
