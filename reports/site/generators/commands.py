"""The commands, from the command line's own declarations."""

from collections.abc import Iterator
from typing import Any

import typer

from cosim.cli import app
from generators.markdown import code, sentence, table


def found() -> Iterator[tuple[str, Any]]:
    """(words, command) of every command, such as "cosim hw list"."""
    yield from _below("cosim", typer.main.get_command(app))


def reference() -> str:
    """One heading per command, with its arguments and options."""
    return "\n\n".join(_command(words, command) for words, command in found())


def _below(words: str, command: Any) -> Iterator[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        yield words, command
        return
    for name, inner in command.commands.items():
        yield from _below(f"{words} {name}", inner)


def _command(words: str, command: Any) -> str:
    rows = [_parameter(parameter) for parameter in command.params]
    what = sentence(command.help or "")
    return f"## {words}\n\n{what}" + (f"\n\n{table(('argument or option', 'meaning'), rows)}" if rows else "")


def _parameter(parameter: Any) -> list[str]:
    if parameter.param_type_name == "argument":
        name = parameter.metavar or parameter.name.upper()
    else:
        name = " ".join((max(parameter.opts, key=len), *([parameter.metavar] if parameter.metavar else [])))
    return [code(name), sentence(getattr(parameter, "help", None) or "")]
