"""`cosim simulate`: one run with its reports, or a batch of runs."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cosim import process
from cosim.batch import simulate_lines, simulated
from cosim.commands.shared import Json, Set, console, output, run_name, status
from cosim.output import check_distinct, is_standard_output, writing
from hwmodels.units import InputError

if TYPE_CHECKING:
    from cosim.result import Result
    from cosim.spec import RunSpec


def simulate(
    run: Annotated[str | None, typer.Argument(metavar="RUN.yaml", help="A run file; - is standard input.")] = None,
    changes: Set = None,
    json_file: Json = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a report to open in a browser.")
    ] = None,
    perfetto_file: Annotated[
        Path | None,
        typer.Option("--perfetto", metavar="FILE", help="Write the timeline for ui.perfetto.dev; compressed if .gz."),
    ] = None,
    memory_file: Annotated[
        Path | None,
        typer.Option("--memory-snapshot", metavar="FILE", help="Write allocations for pytorch.org/memory_viz."),
    ] = None,
    chakra_folder: Annotated[
        Path | None,
        typer.Option("--chakra", metavar="DIR", help="Write MLCommons Chakra execution traces, one per rank."),
    ] = None,
    unfold: Annotated[
        bool, typer.Option("--unfold", help="Play every data-parallel replica (64 ranks at most) instead of one.")
    ] = False,
    batch: Annotated[
        str | None,
        typer.Option(
            "--batch",
            metavar="RUNS.jsonl",
            help="Many runs, one JSON object per line. A bad line is answered "
            "with its `error`, and the exit status stays 0.",
        ),
    ] = None,
) -> None:
    """Simulate one training step: how fast, does it fit, what limits it."""
    if (run is None) == (batch is None):
        raise InputError("simulate: give one run file, or --batch RUNS.jsonl")
    pages = {"--html": html_file, "--perfetto": perfetto_file, "--memory-snapshot": memory_file}
    check_distinct({"RUN.yaml": run, "--batch": batch}, {"--json": json_file, **pages})
    if batch is not None:
        for option in (option for option, file in {**pages, "--chakra": chakra_folder}.items() if file is not None):
            raise InputError(f"{option}: a batch has no report; leave it out")
        if unfold:
            raise InputError("--unfold: is of one run, not of a batch; leave it out")
        _simulate_batch(batch, changes or [], json_file)
        return
    from cosim.spec import RunSpec

    spec = RunSpec.load(str(run), changes or [])
    check_distinct({"system.accelerator": _accelerator_file(spec)}, {"--json": json_file, **pages})
    if chakra_folder is not None:
        from cosim.report.chakra.files import check_folder

        check_folder(chakra_folder)
    with ExitStack() as outputs:
        json_out = outputs.enter_context(output(json_file, "--json"))
        written = {option: outputs.enter_context(output(file, option)) for option, file in pages.items()}
        with status() as progress:
            result = simulated(spec, run_name(str(run)), progress, unfold)
        if json_out is not None:
            with writing(json_file, "--json"):
                json_out.write_text(json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        for option, file in written.items():
            if file is not None:
                with writing(pages[option], option):
                    _write_page(option, result, file)
        if chakra_folder is not None:
            from cosim.report.chakra.files import write_chakra

            write_chakra(result, chakra_folder)
    if not any(file is not None and is_standard_output(file) for file in (json_file, *pages.values())):
        _print_result(result)  # last: a reader that closes the pipe costs no file


def _accelerator_file(spec: RunSpec) -> str | None:
    """The file of the run's accelerator, if it is a file."""
    reference = spec.system.accelerator
    name = reference if isinstance(reference, str) else reference.base
    return name if name.endswith((".yaml", ".yml")) else None


def _write_page(option: str, result: Result, file: Path) -> None:
    if option == "--html":
        from cosim.report.html import write_html

        write_html(result, file)
    elif option == "--perfetto":
        from cosim.report.perfetto import write_perfetto

        write_perfetto(result, file)
    else:
        from cosim.report.memory_snapshot import write_memory_snapshot

        write_memory_snapshot(result, file)


def _simulate_batch(batch: str, changes: list[str], json_file: Path | None) -> None:
    """One line out per line in, in order; a line that cannot be run becomes {"error": sentence}."""
    straight = json_file is None or is_standard_output(json_file)
    with ExitStack() as stack:
        path = None if straight else stack.enter_context(output(json_file, "--json"))
        stack.enter_context(writing(json_file, "--json"))
        out = stack.enter_context(path.open("w", encoding="utf-8")) if path else sys.stdout
        progress = stack.enter_context(status())
        failed, done = simulate_lines(batch, changes, out, progress)
    if failed:
        process.say(f"{failed} of {done} runs could not be simulated; their lines say why", 0)


def _print_result(result: Result) -> None:
    from cosim.report.terminal import print_result

    print_result(result, console())
