"""What a person reads on the terminal, at the widths and encodings that terminals and pipes have."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.cells import cell_len
from rich.console import Console

from cosim.report.terminal import print_result
from cosim.result import Result


def _printed(result: Result, width: int, encoding: str = "utf-8", terminal: bool = False) -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print_result(result, Console(file=file, width=width, force_terminal=terminal))
    file.flush()
    buffer = file.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("width", [80, 120, 160])
def test_no_line_is_wider_than_the_terminal_and_no_row_of_numbers_breaks(result: Result, width: int) -> None:
    lines = _printed(result, width).splitlines()
    assert max(map(cell_len, lines)) <= width
    matmul = next(line for line in lines if line.split()[:1] == ["matmul"])
    assert matmul.split()[1:5] == ["5.051", "s", "56.8", "%"]


@pytest.mark.parametrize("width", [40, 45, 50, 60])
def test_on_a_narrow_terminal_names_and_bars_give_way_and_numbers_keep_their_units(result: Result, width: int) -> None:
    text = _printed(result, width)
    assert max(map(cell_len, text.splitlines())) <= width
    for said in ("5.051 s", "56.8 %", "57.31 GiB", "79.6 GiB", "8.895 s", "100.0 %"):
        assert said in text
    assert not [line for line in text.splitlines() if line.strip().startswith(("GiB", "ms ", "kWh", "cents"))]


def test_it_says_how_fast_whether_it_fits_and_what_limits_it(result: Result) -> None:
    text = _printed(result, 80)
    for said in (
        "8.895 s",
        f"{result.tokens_per_s:,.0f}, per device {result.tokens_per_s_per_device:,.0f}",
        f"MFU {100 * result.mfu:.1f} %",
        "fits: 57.31 GiB of 79.6 GiB",
        "compute: matrix unit",
        "all-gather",
        "activations",
        "run of 15 trillion tokens",
    ):
        assert said in text


def test_a_run_that_does_not_fit_says_by_how_much_and_what_would_help(changed: Callable[..., Result]) -> None:
    gib = 2.0**30
    reason = "needs 98.3 GiB of 79.6 GiB, 18.7 GiB too much; try recompute: full"
    text = _printed(changed(feasible=False, peak_memory_bytes=98.3 * gib, infeasible_reason=reason), 120)
    assert f"does not fit: {reason}" in text
    assert "123.5 % of the device's memory" in text
    unexplained = _printed(changed(feasible=False, peak_memory_bytes=98.3 * gib), 80)
    assert "does not fit: 98.3 GiB of 79.6 GiB at the peak, 18.7 GiB too much" in unexplained


def test_a_pipe_gets_no_colours_and_an_ascii_one_only_ascii(result: Result) -> None:
    assert "\x1b" not in _printed(result, 80)
    ascii_text = _printed(result, 80, "ascii")
    assert "####" in ascii_text
    assert "?" not in ascii_text


def test_names_are_printed_as_they_are_and_steer_nothing(hostile: Result) -> None:
    text = _printed(hostile, 120, terminal=True)
    assert "[bold]" in text
    assert "\x1b[31m" not in text
    assert _printed(hostile, 80, "ascii")


def test_small_parts_are_summed_up_and_the_parts_make_the_step(changed: Callable[..., Result]) -> None:
    classes = {f"class {i}": 0.1 / (i + 1) for i in range(30)}
    parts = {"compute": classes, "exposed_communication": {}, "bubble": 0.0, "host": 0.0, "optimizer": 0.0}
    text = _printed(changed(time_breakdown_s=parts, step_time_s=sum(classes.values())), 80)
    assert "23 others" in text
    assert "class 29" not in text


def test_unknown_cost_is_said_to_be_unknown(changed: Callable[..., Result]) -> None:
    assert "unknown" in _printed(changed(cost_usd=None, run=None), 80)
