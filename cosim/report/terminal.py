"""A result on the terminal: how fast, does it fit, what limits it; then where time, memory, energy and money go."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cosim.report import words
from cosim.report.breakdown import Part, grouped, memory_parts, time_parts
from cosim.report.rank_memory import peaks
from cosim.result import Result

_PARTS_SHOWN = 8
_NOTES_SHOWN = 3
_RANKS_SHOWN = 16
_WIDEST = 110
_NAME_WIDTH = 26
_AMOUNT_WIDTH, _SHARE_WIDTH, _GAP, _INDENT = 11, 8, 2, 2
_LEAST_BAR = 4
_HEADLINE_NAME_WIDTH = 11
_UNIT = re.compile(r"(?<=\d) (?=[^\W\d]|%)")  # between a number and its unit, where no line may end


def print_result(result: Result, console: Console) -> None:
    """Prints `result` as tables that need 80 columns; in ASCII where the console's encoding has no more.

    Model names and messages are printed as they are, never as rich's markup or as terminal commands.
    """
    _Printer(result, console).print_all()


class _Printer:
    """The tables of one result for one console, which decides their width and their characters."""

    def __init__(self, result: Result, console: Console) -> None:
        self.result, self.console = result, console
        self.ascii = console.options.ascii_only
        self.width = min(console.width, _WIDEST)

    def print_all(self) -> None:
        self._title()
        self._headline()
        self._time()
        self._memory()
        self._energy()
        self._notes()

    def text(self, content: str, style: str = "") -> Text:
        content = words.plain_line(content)
        if self.ascii:
            content = content.replace("×", "x").replace("µ", "u").encode("ascii", "replace").decode("ascii")
        return Text(content, style=style)

    def bar(self, share: float, width: int, style: str) -> Text:
        """`share` of 1 as a bar in eighths of a character."""
        eighths = round(max(0.0, min(1.0, share)) * width * 8)
        if self.ascii:
            return Text("#" * round(eighths / 8), style=style)
        return Text("█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8], style=style)

    def print(self, renderable: Any) -> None:
        self.console.print(Padding(renderable, (0, 0, 0, 2)), width=self.width, highlight=False)

    def heading(self, title: str) -> None:
        self.console.print()
        self.console.print(self.text(title, "bold"), width=self.width)

    def _title(self) -> None:
        result = self.result
        title = self.text(f"{words.model_name(result)} on {words.machine(result)}", "bold")
        self.console.print(title, width=self.width)
        self.console.print(self.text(words.facts_line(result), "dim"), width=self.width)
        self.console.print()

    def _headline(self) -> None:
        result = self.result
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column()
        step = self.text(words.seconds(result.step_time_s), "bold")
        if result.step_time_interval_s is not None:
            low, high = result.step_time_interval_s
            step.append_text(self.text(f"  ({words.seconds(low)} to {words.seconds(high)})", "not bold dim"))
        if result.anchor_factor is not None:
            step.append(f"  anchored, factor {result.anchor_factor:.3f}", style="not bold dim")
        per_device = words.rate(result.tokens_per_s_per_device)
        table.add_row("Step time", step)
        beside = _HEADLINE_NAME_WIDTH
        tokens = f"{words.rate(result.tokens_per_s)}, per device {per_device}"
        table.add_row("Tokens/s", self.wrapped(tokens, beside))
        utilisation = f"MFU {words.percent(result.mfu)}, HFU {words.percent(result.hfu)}"
        table.add_row("Utilisation", self.wrapped(utilisation, beside))
        style = "bold green" if result.feasible else "bold red"
        table.add_row("Memory", self.wrapped(words.verdict(result), _HEADLINE_NAME_WIDTH, style))
        used = result.peak_memory_bytes / result.memory_capacity_bytes if result.memory_capacity_bytes > 0 else 1.0
        table.add_row(
            "",
            Text.assemble(
                "[",
                self._gauge(used, min(30, self.width - _INDENT - _HEADLINE_NAME_WIDTH - _GAP - 2), style),
                f"] {words.percent(used)} of the device's memory",
            ),
        )
        table.add_row("Limited by", self.text(result.limited_by, "bold"))
        self.print(table)

    def _gauge(self, share: float, width: int, style: str) -> Text:
        filled = round(max(0.0, min(1.0, share)) * width)
        full, empty = ("#", "-") if self.ascii else ("█", "░")
        return Text(full * filled, style=style) + Text(empty * (width - filled), style="dim")

    def _parts_table(self) -> Table:
        table = Table.grid(padding=(0, _GAP))
        table.add_column(width=self._name_width, no_wrap=True, overflow="crop" if self.ascii else "ellipsis")
        table.add_column(min_width=_AMOUNT_WIDTH, justify="right", no_wrap=True)
        table.add_column(min_width=_SHARE_WIDTH, justify="right", no_wrap=True)
        if self._bar_width:
            table.add_column(no_wrap=True)
        return table

    @property
    def _name_width(self) -> int:
        """Names give way to numbers where a terminal is narrow."""
        return max(4, min(_NAME_WIDTH, self.width - _INDENT - _AMOUNT_WIDTH - _SHARE_WIDTH - 2 * _GAP))

    @property
    def _bar_width(self) -> int:
        """0 where a terminal has no room for bars."""
        room = self.width - _INDENT - _NAME_WIDTH - _AMOUNT_WIDTH - _SHARE_WIDTH - 3 * _GAP
        return min(40, room) if room >= _LEAST_BAR else 0

    def wrapped(self, content: str, beside: int, style: str = "") -> Text:
        """Lines beside a column of that width, none of which ends between a number and its unit."""
        room = max(8, self.width - _INDENT - beside - _GAP)
        lines = textwrap.wrap(_UNIT.sub("\0", self.text(content).plain), room, break_on_hyphens=False)
        return Text("\n".join(lines).replace("\0", " "), style=style)

    def _row(self, table: Table, *cells: Text | str, share: float, style: str) -> None:
        bar = (self.bar(share, self._bar_width, style),) if self._bar_width else ()
        table.add_row(*cells, *bar)

    def _time(self) -> None:
        self.heading("Where the time of a step goes")
        table = self._parts_table()
        parts = time_parts(self.result)
        for group, amount, share, inner in grouped(parts):
            title = words.name_of(group)
            values = (self.text(words.seconds(amount)), words.percent(share))
            color = _GROUP_STYLE.get(group, "white")
            self._row(table, self.text(title), *values, share=share, style=color)
            if len(inner) > 1 or inner[0].name != title:
                for part in _largest(inner):
                    row = (
                        self.text("  " + part.name, "dim"),
                        self.text(words.seconds(part.amount)),
                        words.percent(part.share),
                    )
                    self._row(table, *row, share=part.share, style=f"dim {color}")
        total = self.text(words.seconds(sum(p.amount for p in parts)))
        table.add_row(self.text("step", "bold"), total, words.percent(1.0))
        self.print(table)

    def _memory(self) -> None:
        rank = self.result.worst_rank
        self.heading(f"Memory of a device at the peak (rank {rank})")
        table = self._parts_table()
        for part in memory_parts(self.result):
            row = (self.text(part.name), words.memory(part.amount), words.percent(part.share))
            self._row(table, *row, share=part.share, style="cyan")
        table.add_row(self.text("peak", "bold"), words.memory(self.result.peak_memory_bytes), words.percent(1.0))
        self.print(table)
        self._memory_of_ranks()

    def _memory_of_ranks(self) -> None:
        """The peak of every pipeline rank, where there are several."""
        held = peaks(self.result)
        if not held:
            return
        self.heading("Peak memory of the pipeline ranks")
        table = self._parts_table()
        most = max(held)
        shown = sorted(sorted(range(len(held)), key=lambda rank: -held[rank])[:_RANKS_SHOWN])
        for rank in shown:
            peak, worst = held[rank], rank == self.result.worst_rank
            name = self.text(f"rank {rank}{' (the most)' if worst else ''}", "bold" if worst else "")
            self._row(table, name, words.memory(peak), "", share=peak / most, style="cyan")
        if len(shown) < len(held):
            table.add_row(self.text(f"{len(held) - len(shown)} others", "dim"), self.text("less", "dim"))
        self.print(table)

    def _energy(self) -> None:
        result = self.result
        self.heading("Energy and cost of all devices")
        table = Table.grid(padding=(0, 2))
        name_width = min(_NAME_WIDTH, self.width // 3)
        table.add_column(width=name_width)
        table.add_column(no_wrap=False)
        cost = words.money(result.cost_usd)
        table.add_row("per step", self.wrapped(f"{words.energy(result.energy_j)}, {cost}", name_width))
        if result.run is not None:
            tokens = words.looked_up(result.spec, "workload.tokens")
            title = f"run of {words.count(tokens)} tokens" if tokens else "whole run"
            table.add_row(self.text(title), self.wrapped(run_words(result.run), name_width))
        self.print(table)

    def _notes(self) -> None:
        result = self.result
        unknown = [f"{op.get('target')} ({op.get('count')} times)" for op in result.unknown_ops]
        status = str(result.calibration.get("status", ""))
        notes = [
            *(("warning", text, "yellow") for text in result.warnings),
            *self._short("extrapolated", result.extrapolated),
            *self._short("assumed", result.assumed),
            *self._short("unknown ops", unknown),
            *([("calibration", status, "")] if status else []),
        ]
        if not notes:
            return
        self.heading("Notes")
        table = Table.grid(padding=(0, 2))
        table.add_column(width=12, no_wrap=True)
        table.add_column()
        last = ""
        for what, text, style in notes:
            table.add_row(self.text(what if what != last else "", style), self.text(text))
            last = what
        self.print(table)

    def _short(self, what: str, notes: Iterable[str]) -> list[tuple[str, str, str]]:
        every = list(notes)
        rows = [(what, text, "") for text in every[:_NOTES_SHOWN]]
        if len(every) > _NOTES_SHOWN:
            rows.append((what, f"and {len(every) - _NOTES_SHOWN} more; --json and --html list them", ""))
        return rows


_GROUP_STYLE: Mapping[str, str] = {
    "compute": "blue",
    "optimizer": "magenta",
    "exposed_communication": "yellow",
    "host": "white",
    "bubble": "white",
}


def run_words(run: Mapping[str, float]) -> str:
    """Time, energy and cost of the whole run in one line; what is not known is left out."""
    said = []
    for key, say in (("time_s", words.seconds), ("energy_j", words.energy), ("cost_usd", words.money)):
        value = run.get(key)
        if value is not None:
            said.append(say(value))
    if "goodput" in run:
        said.append(
            f"goodput {words.percent(run['goodput'])} with {words.count(run['failures'])} failures, a checkpoint every "
            f"{words.seconds(run['checkpoint_interval_s'])}"
        )
    return ", ".join(said)


def _largest(parts: tuple[Part, ...]) -> list[Part]:
    """The largest parts, and the others as one."""
    if len(parts) <= _PARTS_SHOWN:
        return list(parts)
    rest = parts[_PARTS_SHOWN - 1 :]
    amount, share = sum(part.amount for part in rest), sum(part.share for part in rest)
    return [*parts[: _PARTS_SHOWN - 1], Part(rest[0].group, f"{len(rest)} others", amount, share)]
