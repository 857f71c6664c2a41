"""The command line: parses, calls the rooms, prints. Rooms are imported by the command that needs them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cosim import process
from cosim.batch import located, simulate_lines, simulated
from cosim.cost_command import cost
from cosim.kernel_commands import calibrate, validate_kernels
from cosim.output import check_distinct, is_standard_output, whole_file, writing
from hwmodels.units import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from cosim.graph import OpGraph
    from cosim.result import Result
    from cosim.simulate import Progress
    from cosim.spec import RunSpec

app = typer.Typer(
    name="cosim",
    help="Simulates training steps of Transformers: time, memory, energy, cost, and what holds a run back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
hw = typer.Typer(help="Accelerators that are known.", no_args_is_help=True)
workload = typer.Typer(help="Models that are known.", no_args_is_help=True)
validate = typer.Typer(help="Predictions against measurements.", no_args_is_help=True)
graph = typer.Typer(help="Traced steps as graphs.", no_args_is_help=True)
app.add_typer(hw, name="hw")
app.add_typer(graph, name="graph")
app.add_typer(workload, name="workload")
app.add_typer(cost, name="cost")
app.add_typer(validate, name="validate")
app.command()(calibrate)
validate.command("kernels")(validate_kernels)

Set = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change a value of the run file.")]
Frontend = Annotated[
    Literal["eager", "compile"],
    typer.Option("--frontend", help="Operators as eager PyTorch runs them, or the graphs that torch.compile captures."),
]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON; -: print it.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """The `cosim` command; ends the process with 0, or with one sentence on standard error and the status of
    `cosim.process.run`.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)

    def command() -> int | None:
        # Not `app()`: typer answers a broken pipe and Ctrl-C itself, before we can.
        root = typer.main.get_command(app)
        with root.make_context("cosim", given) as context:
            answer = root.invoke(context)
        return answer if isinstance(answer, int) else 0

    sys.exit(process.run(command))


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from importlib.metadata import version as version_of

        print(version_of("cosim"))
        raise typer.Exit


@app.command()
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
    batch: Annotated[
        str | None, typer.Option("--batch", metavar="RUNS.jsonl", help="Many runs, one JSON object per line.")
    ] = None,
) -> None:
    """Simulate one training step: how fast, does it fit, what limits it."""
    if (run is None) == (batch is None):
        raise InputError("simulate: give one run file, or --batch RUNS.jsonl")
    pages = {"--html": html_file, "--perfetto": perfetto_file, "--memory-snapshot": memory_file}
    check_distinct({"RUN.yaml": run, "--batch": batch}, {"--json": json_file, **pages})
    if batch is not None:
        for option in (option for option, file in pages.items() if file is not None):
            raise InputError(f"{option}: a batch has no report; leave it out")
        _simulate_batch(batch, changes or [], json_file)
        return
    from cosim.spec import RunSpec

    spec = RunSpec.load(str(run), changes or [])
    check_distinct({"system.accelerator": _accelerator_file(spec)}, {"--json": json_file, **pages})
    with ExitStack() as outputs:
        json_out = outputs.enter_context(_output(json_file, "--json"))
        written = {option: outputs.enter_context(_output(file, option)) for option, file in pages.items()}
        with _status() as progress:
            result = simulated(spec, _name(str(run)), progress)
        if json_out is not None:
            with writing(json_file, "--json"):
                json_out.write_text(json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        for option, file in written.items():
            if file is not None:
                with writing(pages[option], option):
                    _write_page(option, result, file)
    if not any(file is not None and is_standard_output(file) for file in (json_file, *pages.values())):
        _print_result(result)  # last: a reader that closes the pipe costs no file


@app.command()
def trace(
    run: Annotated[str, typer.Argument(metavar="RUN.yaml", help="A run file; - is standard input.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="GRAPH", help="GraphML (.graphml) or node-link JSON (.json).")
    ],
    changes: Set = None,
    frontend: Frontend = "eager",
) -> None:
    """Write the traced step, with its techniques, as a graph for other tools."""
    from cosim.trace.export import check_name, write_graph

    check_distinct({"RUN.yaml": run}, {"--output": output})
    check_name(output)
    with _output(output, "--output") as written:
        step = _trace_step(run, changes, frontend)
        if written is not None:
            write_graph(step, written)
    print(f"{output}: {len(step):,} ops")


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
        print_graph_summary(read_graph(source), _console())
    else:
        print_graph_summary(described(_trace_step(source, changes, frontend)), _console())


def _trace_step(run: str, changes: list[str] | None, frontend: str) -> OpGraph:
    from cosim.spec import RunSpec

    spec = RunSpec.load(run, changes or [])
    with _status() as progress:
        from cosim.simulate import trace_step

        try:
            with redirect_stdout(sys.stderr):
                return trace_step(spec, progress, frontend)
        except InputError as error:
            raise located(error, _name(run)) from error


def _name(run: str) -> str:
    return "standard input" if run == "-" else run


def _accelerator_file(spec: RunSpec) -> str | None:
    """The file of the run's accelerator, if it is a file."""
    reference = spec.system.accelerator
    name = reference if isinstance(reference, str) else reference.base
    return name if name.endswith((".yaml", ".yml")) else None


@app.command()
def schema() -> None:
    """Print the JSON Schema of run files."""
    from cosim.spec import RunSpec

    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    print(json.dumps(dialect | RunSpec.model_json_schema(), indent=1))


@hw.command("list")
def hw_list() -> None:
    """The accelerators of the library."""
    from hwmodels import accelerator

    rows = [accelerator.summary(name) for name in accelerator.names()]
    _print_table([[row[key] for key in rows[0]] for row in rows], list(rows[0]) if rows else [])


@hw.command("show")
def hw_show(name: Annotated[str, typer.Argument(help="A name of `cosim hw list`, or a file.")]) -> None:
    """An accelerator's parts, its peaks and machine balance, and its file with the source of every number."""
    from hwmodels import accelerator, describe

    for line in describe.lines(accelerator.load(name)):
        print(f"# {line}".rstrip())
    _print_yaml(accelerator.load_raw(name))


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
    _print_table(rows, ["name", "family", "parameters", "layers", "hidden", "heads", "kv_heads"])


@workload.command("check")
def workload_check(
    pattern: Annotated[str, typer.Argument(metavar="[NAME]", help="Families and classes whose name has this.")] = "",
    real: Annotated[bool, typer.Option("--real", help="Published sizes instead of tiny ones (minutes).")] = False,
) -> None:
    """Trace every family and Hugging Face class: operators, FLOP and parameters against PyTorch's own counts."""
    from cosim.validate import coverage

    size = "real" if real else "tiny"
    with _status() as progress:
        rows = coverage.check(size, pattern, progress)
    coverage.print_coverage(rows, _console())
    raise typer.Exit(0 if all(row.good for row in rows) else 1)


@workload.command("show")
def workload_show(name: Annotated[str, typer.Argument(help="A name of `cosim workload list`.")]) -> None:
    """A model's dimensions, as a run file states them."""
    from workloads import named

    entry = named.find(name)
    print(f"# {entry.name}: {entry.config.parameters():,} parameters\n# {' '.join(str(entry.source).split())}")
    _print_yaml({"model": entry.config.stated()})


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
    with _output(json_file, "--json") as json_out:
        with _bar() as progress:
            cases = score.score(chosen, processes=processes, progress=progress)
        report.print_report(cases, _console())
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

    with _output(markdown_file, "--markdown") as page:
        with _status() as progress:
            cases = cpu_memory.check(pattern, progress)
        if page is not None:
            text = cpu_memory.markdown(cases, [pattern, "--markdown", str(markdown_file)])
            with writing(markdown_file, "--markdown"):
                page.write_text(text, encoding="utf-8")
    for table in cpu_memory.tables(cases):
        _console().print(table)
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
    _print_yaml(data)


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
        path = None if straight else stack.enter_context(_output(json_file, "--json"))
        stack.enter_context(writing(json_file, "--json"))
        out = stack.enter_context(path.open("w", encoding="utf-8")) if path else sys.stdout
        progress = stack.enter_context(_status())
        failed, done = simulate_lines(batch, changes, out, progress)
    if failed:
        process.say(f"{failed} of {done} runs could not be simulated; their lines say why", 0)


def _output(path: Path | None, option: str) -> AbstractContextManager[Path | None]:
    return nullcontext() if path is None else whole_file(path, option)


@contextmanager
def _status() -> Iterator[Progress | None]:
    """Shows what is being done on standard error, if that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    with Console(stderr=True).status("reading") as status:

        def show(text: str, share: float | None = None) -> None:
            status.update(text if share is None else f"{text} {share:.0%}")

        yield show


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


def _console() -> Console:
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=160)


def _print_result(result: Result) -> None:
    from cosim.report.terminal import print_result

    print_result(result, _console())


def _print_table(rows: list[list[str]], header: list[str]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_yaml(data: object) -> None:
    import yaml

    print(yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True), end="")


if __name__ == "__main__":
    main()
