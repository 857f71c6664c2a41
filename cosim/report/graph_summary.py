"""What a step graph holds, on the terminal: ops by phase and class, blocks, parameters, activations, unknown ops."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cosim.report import words

if TYPE_CHECKING:
    import networkx

_PHASES = ("forward", "recompute", "backward", "optimizer")


def print_graph_summary(graph: networkx.DiGraph[int], console: Console) -> None:
    """Prints the summary of a graph as `cosim.trace.export.described` makes it."""
    rows: dict[tuple[str, str], Counter[str]] = {}
    for _, node in graph.nodes(data=True):
        for phase in (node["phase"], "all"):
            row = rows.setdefault((phase, node["op_class"]), Counter())
            row.update({"ops": 1, "flops": node["flops"], "bytes": node["bytes_read"] + node["bytes_written"]})
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("phase")
    table.add_column("class")
    for name in ("ops", "FLOP", "bytes"):
        table.add_column(name, justify="right")
    for phase in (*_PHASES, "all"):
        mine = {op_class: row for (of, op_class), row in rows.items() if of == phase}
        if phase == "all":
            mine = {"": sum(mine.values(), Counter[str]())}
        for op_class, row in sorted(mine.items(), key=lambda item: (-item[1]["flops"], -item[1]["bytes"])):
            table.add_row(phase, words.plain_line(words.name_of(op_class)), *_numbers(row))
    console.print(table)
    console.print()
    for name, said in _facts(graph.graph):
        console.print(Text(f"{name:<18} {words.plain_line(said)}"), soft_wrap=True)


def _numbers(row: Counter[str]) -> tuple[str, str, str]:
    flops = f"{row['flops']:.4g}" if row["flops"] else ""
    return f"{row['ops']:,}", flops, words.memory(row["bytes"]) if row["bytes"] else ""


def _facts(said: dict[str, Any]) -> list[tuple[str, str]]:
    blocks, unknown = json.loads(said["blocks"]), json.loads(said["unknown_ops"])
    trainable = "" if said["trainable_parameters"] == said["parameters"] else "trainable"
    facts = [("parameters", f"{said['parameters']:,}")]
    if trainable:
        facts.append(("trainable", f"{said['trainable_parameters']:,}"))
    facts.append(("activations saved", words.memory(said["saved_bytes"])))
    for block in blocks:
        ops = f"{block['forward_ops']} forward and {block['backward_ops']} backward ops each"
        facts.append(("repeated block", f"{block['layers']} x {block['path']}, {ops}"))
    facts.append(("unknown ops", ", ".join(f"{count} x {target}" for target, count in unknown.items()) or "none"))
    return facts
