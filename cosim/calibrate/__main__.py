"""`python -m cosim.calibrate --kernels F --collectives F --hw NAME`: constants, and errors per op class and source."""

import argparse
import sys
from pathlib import Path

from cosim.calibrate.kernels import (
    Constant,
    Line,
    calibrate_attention,
    calibrate_gemm,
    calibrate_passes,
    calibrate_simd,
    chips_for,
)
from cosim.calibrate.links import calibrate_links
from cosim.calibrate.rows import read_collectives, read_kernels
from hwmodels.accelerator import load
from hwmodels.units import InputError


def main() -> int:
    """Prints the fitted constants of one accelerator as its file's `calibration:` section, then the errors."""
    parser = argparse.ArgumentParser(prog="python -m cosim.calibrate", description=__doc__)
    parser.add_argument("--kernels", type=Path, required=True)
    parser.add_argument("--collectives", type=Path, required=True)
    parser.add_argument("--hw", required=True)
    arguments = parser.parse_args()
    try:
        constants, lines = calibrate(arguments.kernels, arguments.collectives, arguments.hw)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(as_yaml(constants))
    print()
    for line in lines:
        print(f"{line.op:34s} {line.source:16s} fitted    {line.fitted}")
        print(f"{'':34s} {'':16s} held out  {line.held_out}")
    return 0


def calibrate(kernels: Path, collectives: Path, name: str) -> tuple[list[Constant], list[Line]]:
    """All constants of the accelerator `name` and their errors, from the two tables."""
    chips = chips_for(name)
    rows = read_kernels(kernels)
    gemm, gemm_lines, values = calibrate_gemm(rows, chips)
    simd, simd_lines = calibrate_simd(rows, chips, values)
    attention, attention_lines = calibrate_attention(rows, {name: chips[name]}, load("h100-sxm-80gb"))
    passes, pass_lines = calibrate_passes(rows, chips)
    links, link_lines = calibrate_links(read_collectives(collectives), chips[name])
    constants = [*gemm, *simd, *attention, *passes, *links]
    return constants, [*gemm_lines, *simd_lines, *attention_lines, *pass_lines, *link_lines]


def as_yaml(constants: list[Constant]) -> str:
    """The constants as the `calibration:` section of an accelerator file, each with what it was fitted on."""
    lines = ["calibration:"]
    previous: list[str] = []
    for constant in sorted(constants, key=lambda c: c.path.split(".")[:-1]):
        *sections, key = constant.path.split(".")
        for depth, section in enumerate(sections):
            if sections[: depth + 1] != previous[: depth + 1]:
                lines.append("  " * (depth + 1) + f"{section}:")
        previous = sections
        value = f"{constant.value if abs(constant.value) > 1e-6 else 0.0:.4g}" + (
            f" {constant.unit}" if constant.unit else ""
        )
        parts = [f"value: {value}", f'{constant.kind}: "{constant.basis}"']
        if constant.kind == "fitted_on":
            parts += [f"rows: {constant.rows}", f"error_held_out: {constant.held_out:.3f}"]
        if constant.note:
            parts.append(f'note: "{constant.note}"')
        lines.append("  " * (len(sections) + 1) + f"{key}: {{{', '.join(parts)}}}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
