"""`cosim hw`: the accelerators of the library, and files of one's own."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cosim.commands.shared import print_table, print_yaml

if TYPE_CHECKING:
    from hwmodels.accelerator import Accelerator

hw = typer.Typer(help="Accelerators that are known.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="A name of `cosim hw list`, or a file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, in SI units.")]


@hw.command("list")
def hw_list() -> None:
    """The accelerators of the library."""
    from hwmodels import catalog, listing

    rows = [listing.summary(name) for name in catalog.names()]
    print_table([[row[key] for key in rows[0]] for row in rows], list(rows[0]) if rows else [])


@hw.command("show")
def hw_show(name: Name, as_json: AsJson = False) -> None:
    """An accelerator's parts, its peaks and machine balance, and its file with the source of every number."""
    from hwmodels import accelerator, describe

    chip = accelerator.load(name)
    if as_json:
        _print_json(describe.to_json(chip))
        return
    for line in describe.lines(chip):
        print(f"# {line}".rstrip())
    print_yaml(accelerator.load_raw(name))


@hw.command("check")
def hw_check(
    file: Annotated[str, typer.Argument(metavar="FILE", help="An accelerator file, or a name of `cosim hw list`.")],
    as_json: AsJson = False,
) -> None:
    """All problems of an accelerator file, and what in it can hardly be meant; the status is 2 if it cannot be used."""
    from hwmodels.check import check

    found = check(file)
    if as_json:
        _print_json({"problems": found.problems, "warnings": found.warnings})
    else:
        for problem in found.problems:
            print(f"problem: {problem}")
        for warning in found.warnings:
            print(f"warning: {warning}")
        if not found.problems:
            print("no problems")
    raise typer.Exit(2 if found.problems else 0)


@hw.command("diff")
def hw_diff(
    one: Annotated[str, typer.Argument(metavar="A", help="A name of `cosim hw list`, or a file.")],
    other: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    as_json: AsJson = False,
) -> None:
    """What is different in two accelerator files, and in the peaks and machine balance that follow."""
    from hwmodels import accelerator, describe

    chips = accelerator.load(one), accelerator.load(other)
    values = describe.differences(accelerator.load_raw(one), accelerator.load_raw(other))
    if as_json:
        sides = [describe.to_json(chip) for chip in chips]
        names = [side["name"] for side in sides]
        peaks = {side: data["peaks"] for side, data in zip(("a", "b"), sides, strict=True)}
        _print_json({"names": names, "values": {path: list(pair) for path, pair in values.items()}, "peaks": peaks})
        return
    header = ["", *(chip.name for chip in chips)]
    rows = [[path, *("-" if value is None else value for value in pair)] for path, pair in values.items()]
    print_table(rows or [["no number is different", "", ""]], header)
    print()
    print_table(_derived(chips), ["derived", *header[1:]])


def _derived(chips: tuple[Accelerator, Accelerator]) -> list[list[str]]:
    """Peak and machine balance by format, one chip beside the other."""
    from hwmodels.describe import peaks
    from hwmodels.units import format_quantity

    sides = [peaks(chip) for chip in chips]
    rows = []
    for format in dict.fromkeys([*sides[0], *sides[1]]):
        found = [side.get(format) for side in sides]
        rows.append(
            [f"{format} peak", *("-" if pair is None else format_quantity(pair[0], "compute") for pair in found)]
        )
        balances = ("-" if pair is None else f"{pair[1]:.3g} FLOP per byte of memory" for pair in found)
        rows.append([f"{format} balance", *balances])
    return rows


def _print_json(data: dict[str, Any]) -> None:
    print(json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False))
