"""`cosim calibrate` and `cosim validate kernels`: constants from tables of kernels, and how far they reach."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cosim.output import check_distinct, whole_file, writing

if TYPE_CHECKING:
    from rich.console import Console


def calibrate(
    tables: Annotated[
        list[Path],
        typer.Argument(metavar="KERNELS.csv|COLLECTIVES.csv ...", help="Tables in the columns of the published ones."),
    ],
    hw: Annotated[str, typer.Option("--hw", metavar="NAME", help="A name of `cosim hw list`, or a file.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The accelerator with these constants, a .yaml file.")
    ],
) -> None:
    """Fit an accelerator's constants to half of the measured kernels, and report the other half."""
    from cosim.calibrate import accelerator
    from cosim.calibrate.report import print_calibration

    given = hw if hw.endswith((".yaml", ".yml")) else None
    check_distinct({**{str(path): path for path in tables}, "--hw": given}, {"--output": output})
    accelerator.check_output(output)
    with whole_file(output, "--output") as written:
        found = accelerator.calibrate(tables, hw)
        with writing(output, "--output"):
            written.write_text(accelerator.as_file(found, tables), encoding="utf-8")
    if str(output) != "-":
        print_calibration(found, _console())


def validate_kernels(
    accelerator: Annotated[
        str | None, typer.Option("--accelerator", help="Accelerators whose name contains this.")
    ] = None,
    op: Annotated[str | None, typer.Option("--op", help="Op classes whose name contains this.")] = None,
    uncalibrated: Annotated[
        bool, typer.Option("--uncalibrated", help="Without any calibration: the defaults of the family.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON; -: print it.")
    ] = None,
) -> None:
    """Predicted against published kernels and collectives; fitted half and other half apart."""
    from cosim.validate import kernels

    with nullcontext() if json_file is None else whole_file(json_file, "--json") as json_out:
        report = kernels.check(accelerator, op, uncalibrated)
        if json_out is not None:
            with writing(json_file, "--json"):
                text = json.dumps(kernels.to_json(report), indent=1, allow_nan=False)
                json_out.write_text(text + "\n", encoding="utf-8")
    if json_file is None or str(json_file) != "-":
        kernels.print_kernels(report, _console())


def _console() -> Console:
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=160)
