"""What several commands share: options, where they write, how far they are, and what they print."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cosim.output import whole_file

if TYPE_CHECKING:
    from rich.console import Console

    from cosim.simulate import Progress

Set = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change a value of the run file.")]
Frontend = Annotated[
    Literal["eager", "compile"],
    typer.Option("--frontend", help="Operators as eager PyTorch runs them, or the graphs that torch.compile captures."),
]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON; -: print it.")]


def run_name(run: str) -> str:
    return "standard input" if run == "-" else run


def output(path: Path | None, option: str) -> AbstractContextManager[Path | None]:
    return nullcontext() if path is None else whole_file(path, option)


@contextmanager
def status() -> Iterator[Progress | None]:
    """Shows what is being done on standard error, if that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    with Console(stderr=True).status("reading") as status:

        def show(text: str, share: float | None = None) -> None:
            status.update(text if share is None else f"{text} {share:.0%}")

        yield show


def console() -> Console:
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=160)


def print_table(rows: list[list[str]], header: list[str]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_yaml(data: object) -> None:
    import yaml

    print(yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True), end="")
