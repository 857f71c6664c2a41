"""The Python interface: the package's own text, whose examples are tests, and every public name's signature."""

import inspect
import re
import textwrap

import cosim
from generators.markdown import sentence

_EXAMPLE = re.compile(r"((?:^(?:>>>|\.\.\.).*\n?)+(?:^(?!>>>|\.\.\.)\S.*\n?|^ +\S.*\n?)*)+", re.MULTILINE)


def text() -> str:
    """The package's docstring, its examples as code."""
    return _EXAMPLE.sub(lambda match: f"\n```pycon\n{match[0].rstrip()}\n```\n", inspect.cleandoc(cosim.__doc__ or ""))


def names() -> str:
    """One heading per public name, with signature and docstring."""
    return "\n\n".join(_name(name) for name in cosim.__all__)


def _name(name: str) -> str:
    value = getattr(cosim, name)
    parts = [f"### {name}"]
    if inspect.isfunction(value):
        signature = f"{name}{inspect.signature(value)}".replace("'", "")
        parts.append(f"```python\n{textwrap.fill(signature, 96, subsequent_indent='    ')}\n```")
    parts.append(_prose(inspect.getdoc(value) or ""))
    public = [key for key in vars(value) if not key.startswith("_")] if inspect.isclass(value) else []
    methods = [key for key in public if _is_method(value, key)]
    parts += [f"`{name}.{key}`\n:   {sentence(_first(inspect.getdoc(getattr(value, key)) or ''))}" for key in methods]
    return "\n\n".join(parts)


def _is_method(owner: type, key: str) -> bool:
    found = inspect.getattr_static(owner, key)
    if key == "model_post_init" or not inspect.getdoc(getattr(owner, key)):  # pydantic's own; what says nothing
        return False
    return isinstance(found, staticmethod | classmethod | property) or inspect.isfunction(found)


def _first(text: str) -> str:
    return " ".join(text.partition("\n\n")[0].split())


def _prose(text: str) -> str:
    """A docstring as Markdown: names in angle brackets are no HTML."""
    return text.replace("<", "&lt;")
