"""`cosim hw`: the accelerators of the library."""

from __future__ import annotations

from typing import Annotated

import typer

from cosim.commands.shared import print_table, print_yaml

hw = typer.Typer(help="Accelerators that are known.", no_args_is_help=True)


@hw.command("list")
def hw_list() -> None:
    """The accelerators of the library."""
    from hwmodels import accelerator

    rows = [accelerator.summary(name) for name in accelerator.names()]
    print_table([[row[key] for key in rows[0]] for row in rows], list(rows[0]) if rows else [])


@hw.command("show")
def hw_show(name: Annotated[str, typer.Argument(help="A name of `cosim hw list`, or a file.")]) -> None:
    """An accelerator's parts, its peaks and machine balance, and its file with the source of every number."""
    from hwmodels import accelerator, describe

    for line in describe.lines(accelerator.load(name)):
        print(f"# {line}".rstrip())
    print_yaml(accelerator.load_raw(name))
