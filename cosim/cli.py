"""The command line: its commands by group, and the process around them. Each command imports the rooms it needs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from cosim import process
from cosim.commands.cost import cost
from cosim.commands.graph import graph, trace
from cosim.commands.hw import hw
from cosim.commands.kernels import calibrate
from cosim.commands.simulate import simulate
from cosim.commands.validate import validate
from cosim.commands.workload import workload

app = typer.Typer(
    name="cosim",
    help="Simulates training steps of Transformers: time, memory, energy, cost, and what holds a run back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
def schema() -> None:
    """Print the JSON Schema of run files."""
    from cosim.spec import RunSpec

    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    print(json.dumps(dialect | RunSpec.model_json_schema(), indent=1))


app.command()(simulate)
app.command()(trace)
app.command()(calibrate)
app.add_typer(hw, name="hw")
app.add_typer(graph, name="graph")
app.add_typer(workload, name="workload")
app.add_typer(cost, name="cost")
app.add_typer(validate, name="validate")


if __name__ == "__main__":
    main()
