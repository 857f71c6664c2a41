"""`cosim validate`: predictions against published runs, kernels and real memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from cosim.commands.kernels import validate_kernels
from cosim.commands.shared import Json, console, output, print_yaml, status
from cosim.output import writing

validate = typer.Typer(help="Predictions against measurements.", no_args_is_help=True)
validate.command("kernels")(validate_kernels)


@validate.command("published")
def validate_published(
    group: Annotated[str | None, typer.Option("--group", help="Groups whose name contains this.")] = None,
    source: Annotated[str | None, typer.Option("--source", help="One source of the published runs.")] = None,
    json_file: Json = None,
    processes: Annotated[
        int | None, typer.Option("--processes", min=1, max=1024, help="Default: one per core.")
    ] = None,
) -> None:
    """Predicted step times and memory against published ones, by group."""
    from cosim.validate import report, score

    chosen = score.select(group, source)
    with output(json_file, "--json") as json_out:
        with _bar() as progress:
            cases = score.score(chosen, processes=processes, progress=progress)
        report.print_report(cases, console())
        if json_out is not None:
            text = json.dumps(score.to_json(cases), indent=1, allow_nan=False)
            json_out.write_text(text + "\n", encoding="utf-8")


@validate.command("memory")
def validate_memory(
    pattern: Annotated[str, typer.Argument(metavar="[NAME]", help="Models whose name has this.")] = "",
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Write the tables as a page.")
    ] = None,
) -> None:
    """Peak memory of traced steps against real steps of small models on this machine's CPU."""
    from cosim.validate import cpu_memory

    with output(markdown_file, "--markdown") as page:
        with status() as progress:
            cases = cpu_memory.check(pattern, progress)
        if page is not None:
            text = cpu_memory.markdown(cases, [pattern, "--markdown", str(markdown_file)])
            with writing(markdown_file, "--markdown"):
                page.write_text(text, encoding="utf-8")
    for table in cpu_memory.tables(cases):
        console().print(table)
    raise typer.Exit(0 if all(case.good for case in cases) else 1)


@validate.command("show")
def validate_show(identifier: Annotated[str, typer.Argument(metavar="ID", help="The id of a published run.")]) -> None:
    """The run file of a published run."""
    from cosim.validate.published_runs import find, to_run

    run = find(identifier)
    data = to_run(run)
    print(f"# {run.id}: {run.columns['model']}, {run.source}, {run.columns['source_ref']}")
    if run.step_time_s is not None:
        print(f"# published step time: {run.step_time_s:g} s")
    if run.peak_memory_gib is not None:
        print(f"# published peak memory: {run.peak_memory_gib:g} GiB ({run.columns['memory_kind']})")
    if run.columns["assumptions"]:
        print(f"# assumed: {run.columns['assumptions']}")
    print_yaml(data)


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None] | None]:
    """Shows how many published runs are done on standard error, if that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("published runs", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield show
