"""`cosim workload`: the models of the library."""

from __future__ import annotations

from typing import Annotated

import typer

from cosim.commands.shared import console, print_table, print_yaml, status

workload = typer.Typer(help="Models that are known.", no_args_is_help=True)


@workload.command("list")
def workload_list() -> None:
    """The models of the library."""
    from workloads import named

    rows = []
    for name in named.names():
        config = named.load(name)
        size = f"{config.parameters() / 1e9:.3g} B"
        rows.append(
            [name, config.family, size, *map(str, (config.layers, config.hidden, config.heads, config.kv_heads))]
        )
    print_table(rows, ["name", "family", "parameters", "layers", "hidden", "heads", "kv_heads"])


@workload.command("check")
def workload_check(
    pattern: Annotated[str, typer.Argument(metavar="[NAME]", help="Families and classes whose name has this.")] = "",
    real: Annotated[bool, typer.Option("--real", help="Published sizes instead of tiny ones (minutes).")] = False,
) -> None:
    """Trace every family and Hugging Face class: operators, FLOP and parameters against PyTorch's own counts."""
    from cosim.validate import coverage

    size = "real" if real else "tiny"
    with status() as progress:
        rows = coverage.check(size, pattern, progress)
    coverage.print_coverage(rows, console())
    raise typer.Exit(0 if all(row.good for row in rows) else 1)


@workload.command("show")
def workload_show(name: Annotated[str, typer.Argument(help="A name of `cosim workload list`.")]) -> None:
    """A model's dimensions, as a run file states them."""
    from workloads import named

    entry = named.find(name)
    print(f"# {entry.name}: {entry.config.parameters():,} parameters\n# {' '.join(str(entry.source).split())}")
    print_yaml({"model": entry.config.stated()})
