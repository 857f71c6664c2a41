"""All constants of one accelerator from tables of kernels and collectives, and the file that holds them."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosim.calibrate.attention import calibrate_attention
from cosim.calibrate.constants import Chips, Constant, Line, chips_for
from cosim.calibrate.gemm import calibrate_gemm, calibrate_simd
from cosim.calibrate.links import calibrate_links
from cosim.calibrate.passes import calibrate_passes
from cosim.calibrate.rows import Row, is_collectives, read_collectives, read_kernels
from hwmodels.catalog import LIBRARY, load_raw
from hwmodels.units import InputError


@dataclass(frozen=True, slots=True)
class Calibration:
    """Fitted constants of the accelerator `name` (`reference` as it was given), and the errors that they leave."""

    reference: str
    name: str
    constants: tuple[Constant, ...]
    lines: tuple[Line, ...]
    section: dict[str, Any]  # the whole `calibration:` section: these constants, and what else the base has

    @property
    def unidentified(self) -> tuple[Constant, ...]:
        """Constants that the rows do not determine."""
        return tuple(constant for constant in self.constants if constant.unidentified)


def calibrate(tables: Sequence[Path], reference: str) -> Calibration:
    """Fits the constants of the accelerator `reference` (a name or a file) to the fitted half of its rows in `tables`.

    Raises InputError: a table that is none, or no row of this accelerator.
    """
    chips = chips_for(reference)
    kernels: list[Row] = []
    collectives: list[Row] = []
    for path in tables:
        if is_collectives(path):
            collectives += read_collectives(path)
        else:
            kernels += read_kernels(path)
    mine = {row.accelerator for row in (*kernels, *collectives)}
    if not mine & chips.keys():
        found = ", ".join(sorted(mine)) or "none"
        raise InputError(f"{', '.join(map(str, tables))}: no row is of {next(iter(chips))}; there are rows of {found}")
    constants, lines = _fit(kernels, collectives, chips)
    if not constants:
        raise InputError(
            f"{', '.join(map(str, tables))}: too few rows of {next(iter(chips))} to fit a constant; it takes some dozen"
            " products, sums or attention kernels of at least 20 us, or all-reduces of at least 1 MiB"
        )
    name = next(iter(chips))
    base = load_raw(reference).get("calibration") or {}
    return Calibration(reference, name, tuple(constants), tuple(lines), _merged(base, constants))


def _fit(kernels: Sequence[Row], collectives: Sequence[Row], chips: Chips) -> tuple[list[Constant], list[Line]]:
    name = next(iter(chips))
    gemm, gemm_lines, values = calibrate_gemm(kernels, chips)
    simd, simd_lines = calibrate_simd(kernels, chips, values)
    attention, attention_lines = calibrate_attention(kernels, {name: chips[name]})
    passes, pass_lines = calibrate_passes(kernels, chips)
    links, link_lines = calibrate_links(collectives, chips[name])
    constants = [*gemm, *simd, *attention, *passes, *links]
    return constants, [*gemm_lines, *simd_lines, *attention_lines, *pass_lines, *link_lines]


def _merged(base: Mapping[str, Any], constants: Sequence[Constant]) -> dict[str, Any]:
    """`base` with the fitted constants in their places; what it derives or assumes gives way to fitted ones only."""
    section: dict[str, Any] = json.loads(json.dumps(base))  # a copy of plain data
    for constant in constants:
        *parents, key = constant.path.split(".")
        place = section
        for parent in parents:
            place = place.setdefault(parent, {})
        kept = isinstance(place.get(key), dict) and not {"fitted_on", "user"} & place[key].keys()
        if constant.kind == "fitted_on" or not kept or place[key].get(constant.kind) == constant.basis:
            place[key] = _entry(constant)
    return section


def _entry(constant: Constant) -> dict[str, Any]:
    number = float(f"{constant.value if abs(constant.value) > 1e-6 else 0.0:.4g}")
    entry: dict[str, Any] = {"value": f"{number:g} {constant.unit}" if constant.unit else number}
    if constant.kind == "fitted_on" and constant.uncertainty is not None:
        error = float(f"{constant.uncertainty:.2g}")
        entry["uncertainty"] = (
            "unbounded" if math.isinf(error) else f"{error:g} {constant.unit}" if constant.unit else error
        )
    entry[constant.kind] = constant.basis
    if constant.kind == "fitted_on":
        entry["rows"] = constant.rows
        if constant.held_out is not None:
            entry["error_held_out"] = round(constant.held_out, 3)
    return entry | ({"note": constant.note} if constant.note else {})


def as_yaml(section: Mapping[str, Any]) -> str:
    """A section of an accelerator file as text, one constant per line."""
    import yaml

    return str(yaml.safe_dump(dict(section), sort_keys=False, default_flow_style=None, width=10**6, allow_unicode=True))


def as_file(found: Calibration, tables: Sequence[Path]) -> str:
    """An accelerator file: the base with its `calibration:` section replaced."""
    names = " ".join(path.name for path in tables)
    head = f"# cosim calibrate {names} --hw {found.reference}\n# fitted to the half of rows that a hash of ids chose\n"
    reference = found.reference
    if reference.endswith((".yaml", ".yml")):
        reference = str(Path(reference).resolve())
    return head + as_yaml({"base": reference, "name": found.name, "set": {"calibration": found.section}})


def check_output(path: Path) -> None:
    """Raises InputError: a file of the library, or a name that is no accelerator file's."""
    if str(path) == "-":
        return
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(f"--output {path}: must end in .yaml, as files of accelerators do")
    if path.resolve().is_relative_to(LIBRARY.resolve()):
        raise InputError(f"--output {path}: is a file of the library, which is not overwritten; name another")
