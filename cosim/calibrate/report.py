"""What a calibration found, for people: constants with their errors, what the rows leave open, and residuals."""

from rich.console import Console
from rich.table import Table

from cosim.calibrate.accelerator import Calibration
from cosim.calibrate.fit import Errors


def print_calibration(found: Calibration, console: Console) -> None:
    """Two tables, constants and residuals, and the constants that are not identifiable."""
    constants = Table(title=f"Constants of {found.name}", title_justify="left", box=None)
    for name in ("constant", "value", "+-", "rows", "from", "note"):
        constants.add_column(name, justify="right" if name in ("value", "+-", "rows") else "left", overflow="fold")
    for one in found.constants:
        fitted = one.kind == "fitted_on"
        error = "" if one.uncertainty is None or not fitted else f"{one.uncertainty:.2g}"
        rows = str(one.rows) if fitted else one.kind
        constants.add_row(one.path, f"{one.value:.4g} {one.unit}".strip(), error, rows, one.basis, one.note)
    console.print(constants)
    residuals = Table(title="Residuals: prediction against measurement", title_justify="left", box=None)
    for name in ("op", "source", "half", "n", "mean", "median", "p90", "bias"):
        residuals.add_column(name, justify="left" if name in ("op", "source", "half") else "right")
    for line in found.lines:
        residuals.add_row(line.op, line.source, "fitted", *_cells(line.fitted))
        residuals.add_row("", "", "other", *_cells(line.held_out))
    console.print(residuals)
    for one in found.unidentified:
        console.print(f"not identifiable: {one.path}: {one.note}", highlight=False, markup=False)


def _cells(found: Errors) -> tuple[str, ...]:
    if not found.rows:
        return ("0", "-", "-", "-", "-")
    return (str(found.rows), *(f"{v:.1%}" for v in (found.mean, found.median, found.p90)), f"{found.bias:+.1%}")
