"""A traced step as a graph file for other tools: GraphML (.graphml) or node-link JSON (.json), and read back.

Nodes are ops with `target, op_class, phase, module, layer, input_shapes, input_formats, output_shapes, output_formats,
flops, bytes_read, bytes_written`; an edge leads from the op that makes a tensor to each that reads it, with `tensor,
bytes, saved` (kept from forward for backward). Shapes and formats are text, an item per operand: "[8,512] [512]". Of
the graph: `axes, parameters, trainable_parameters, saved_bytes, blocks, unknown_ops`; what has structure is JSON text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cosim.graph import Category, OpGraph, Phase
from cosim.output import whole_file
from cosim.trace.vocabulary import kind_bytes, kind_flops
from hwmodels.units import InputError

if TYPE_CHECKING:
    import networkx

    Graph = networkx.DiGraph[int]

SUFFIXES = (".graphml", ".json")
_TEXTS = ("module", "input_shapes", "input_formats", "output_shapes", "output_formats")
_NODE = ("target", "op_class", "phase", "module", "layer", "flops", "bytes_read", "bytes_written")
_GRAPH: Mapping[str, type] = {
    "axes": str,
    "parameters": int,
    "trainable_parameters": int,
    "saved_bytes": int,
    "blocks": str,
    "unknown_ops": str,
}


def described(graph: OpGraph) -> Graph:
    """The graph of `OpGraph.to_networkx`, with shapes, formats, FLOP and bytes, as numbers and text only."""
    described = graph.to_networkx()
    kinds = [_of_kind(graph, number) for number in range(len(graph.kinds))]
    for op, kind in enumerate(graph.op_kind.tolist()):
        node = described.nodes[op]
        node |= kinds[kind]
        node["module"] = _printable(node["module"])
    blocks = [
        {"path": b.path, "layers": len(b.layers), "forward_ops": b.forward_ops, "backward_ops": b.backward_ops}
        for b in graph.blocks
    ]
    described.graph = {
        "axes": json.dumps(dict(graph.axes)),
        "parameters": graph.parameter_count(),
        "trainable_parameters": graph.parameter_count(trainable_only=True),
        "saved_bytes": saved_bytes(graph),
        "blocks": json.dumps(blocks),
        "unknown_ops": json.dumps(dict(graph.unknown_ops)),
    }
    return described


def saved_bytes(graph: OpGraph) -> int:
    """Bytes of activations that are alive as forward ends."""
    forward = np.flatnonzero(graph.op_phase == Phase.FORWARD)
    if not len(forward):
        return 0
    last = int(forward[-1])
    kept = graph.storage_category == Category.ACTIVATIONS
    kept &= (graph.storage_alloc <= last) & (graph.storage_free > last)
    return int(graph.storage_bytes[kept].sum())


def check_name(path: Path) -> None:
    """Raises InputError if the name of a graph file does not say its format."""
    if path.suffix not in SUFFIXES:
        raise InputError(f"graph {path}: the name ends in {path.suffix or 'nothing'}; allowed: {', '.join(SUFFIXES)}")


def is_graph(path: Path) -> bool:
    """Whether a file holds a graph, rather than a run: by its name, and where that is .json by its first bytes."""
    if path.suffix != ".json":
        return path.suffix == ".graphml"
    try:
        with path.open("rb") as file:
            return b'"directed"' in file.read(200)
    except OSError:
        return False


def write_graph(graph: OpGraph, path: str | Path) -> None:
    """Writes the graph to `path`, in the format that its name ends in.

    Raises InputError: the name ends in something else, or the file cannot be written; then nothing is left behind.
    """
    import networkx

    path = Path(path)
    check_name(path)
    with whole_file(path, "graph") as written:
        if path.suffix == ".graphml":
            networkx.write_graphml_xml(described(graph), written)
        else:
            data = networkx.node_link_data(described(graph), edges="edges")
            written.write_text(json.dumps(data, separators=(",", ":"), allow_nan=False) + "\n", encoding="utf-8")


def read_graph(path: str | Path) -> Graph:
    """What `write_graph` wrote, equal to `described`. Raises InputError if the file is not such a graph."""
    path = Path(path)
    check_name(path)
    try:
        graph = _read_graphml(path) if path.suffix == ".graphml" else _read_json(path)
        _check(graph)
    except OSError as error:
        raise InputError(f"graph {path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # noqa: BLE001  a foreign file fails in the parser of its format, in any way
        raise InputError(f"graph {path}: is not a graph that `cosim trace` wrote: {error}") from None
    return graph


def _read_json(path: Path) -> Graph:
    import networkx

    return _directed(networkx.node_link_graph(json.loads(path.read_text(encoding="utf-8")), edges="edges"))


def _read_graphml(path: Path) -> Graph:
    import networkx

    graph = _directed(networkx.read_graphml(path, node_type=int))
    graph.graph = {name: value for name, value in graph.graph.items() if name in _GRAPH}
    for _, node in graph.nodes(data=True):
        for name in _TEXTS:  # GraphML does not keep empty texts
            node.setdefault(name, "")
    return graph


def _directed(graph: Any) -> Graph:
    if not graph.is_directed() or graph.is_multigraph():
        raise ValueError("its edges are not directed, or there are several between two ops")
    return graph  # type: ignore[no-any-return]


def _check(graph: Graph) -> None:
    for name, kind in _GRAPH.items():
        if not isinstance(graph.graph.get(name), kind):
            raise ValueError(f"it has no {name}")
    for number, node in graph.nodes(data=True):
        missing = [name for name in _NODE if name not in node]
        if missing:
            raise ValueError(f"node {number} has no {missing[0]}")
        if not all(math.isfinite(node[name]) for name in ("flops", "bytes_read", "bytes_written")):
            raise ValueError(f"node {number} has a number that is not finite")
    json.loads(graph.graph["blocks"]), json.loads(graph.graph["unknown_ops"])


def _of_kind(graph: OpGraph, number: int) -> dict[str, Any]:
    kind = graph.kinds[number]
    read, written = kind_bytes(graph, kind)

    def shapes(specs: tuple[int, ...]) -> str:
        return " ".join("[" + ",".join(map(str, graph.shapes[spec])) + "]" for spec in specs)

    def formats(specs: tuple[int, ...]) -> str:
        return " ".join(graph.specs[spec].dtype for spec in specs)

    return {
        "input_shapes": shapes(kind.inputs),
        "input_formats": formats(kind.inputs),
        "output_shapes": shapes(kind.outputs),
        "output_formats": formats(kind.outputs),
        "flops": float(kind_flops(graph, kind)),
        "bytes_read": float(read),
        "bytes_written": float(written),
    }


def _printable(text: str) -> str:
    """XML has no place for control characters."""
    return "".join(char if char.isprintable() else "?" for char in text)
