"""`cosim trace` and `cosim graph`: the traced step as a graph, for other tools or summed up."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cosim.batch import located
from cosim.commands.shared import Frontend, Set, console, output, run_name, status
from cosim.output import check_distinct
from hwmodels.units import InputError

if TYPE_CHECKING:
    from cosim.graph import OpGraph

graph = typer.Typer(help="Traced steps as graphs.", no_args_is_help=True)


def trace(
    run: Annotated[str, typer.Argument(metavar="RUN.yaml", help="A run file; - is standard input.")],
    graph_file: Annotated[
        Path, typer.Option("--output", "-o", metavar="GRAPH", help="GraphML (.graphml) or node-link JSON (.json).")
    ],
    changes: Set = None,
    frontend: Frontend = "eager",
) -> None:
    """Write the traced step, with its techniques, as a graph for other tools."""
    from cosim.trace.export import check_name, write_graph

    check_distinct({"RUN.yaml": run}, {"--output": graph_file})
    check_name(graph_file)
    with output(graph_file, "--output") as written:
        step = _trace_step(run, changes, frontend)
        if written is not None:
            write_graph(step, written)
    print(f"{graph_file}: {len(step):,} ops")


@graph.command("summary")
def graph_summary(
    source: Annotated[str, typer.Argument(metavar="RUN.yaml|GRAPH", help="A run file, -, or what cosim trace wrote.")],
    changes: Set = None,
    frontend: Frontend = "eager",
) -> None:
    """Ops by phase and class with FLOP and bytes, repeated blocks, parameters, activations, unknown ops."""
    from cosim.report.graph_summary import print_graph_summary
    from cosim.trace.export import described, is_graph, read_graph

    if is_graph(Path(source)):
        if changes:
            raise InputError(f"--set: {source} is a graph, in which nothing can be set; give the run file")
        if frontend != "eager":
            raise InputError(f"--frontend: {source} is a graph, which is traced already; give the run file")
        print_graph_summary(read_graph(source), console())
    else:
        print_graph_summary(described(_trace_step(source, changes, frontend)), console())


def _trace_step(run: str, changes: list[str] | None, frontend: str) -> OpGraph:
    from cosim.spec import RunSpec

    spec = RunSpec.load(run, changes or [])
    with status() as progress:
        from cosim.simulate import trace_step

        try:
            with redirect_stdout(sys.stderr):
                return trace_step(spec, progress, frontend)
        except InputError as error:
            raise located(error, run_name(run)) from error
