"""An `OpGraph` as one .npz file: its columns as arrays, everything else as JSON in the array `description`."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from cosim.graph import Block, Csr, OpGraph, OpKind, Parameter, TensorSpec

_VERSION = 2
_COLUMNS = (
    *("op_kind", "op_phase", "op_module", "op_layer"),
    *("tensor_spec", "tensor_storage", "storage_spec", "storage_category", "storage_alloc", "storage_free"),
)
_ROWS = ("op_inputs", "op_outputs")


def save_graph(graph: OpGraph, file: IO[bytes]) -> None:
    """Write the graph to an open binary file."""
    description = {
        "version": _VERSION,
        "axes": dict(graph.axes),
        "specs": [dataclasses.astuple(spec) for spec in graph.specs],
        "kinds": [dataclasses.astuple(kind) for kind in graph.kinds],
        "modules": graph.modules,
        "parameters": [dataclasses.astuple(parameter) for parameter in graph.parameters],
        "blocks": [dataclasses.astuple(block) for block in graph.blocks],
        "unknown_ops": dict(graph.unknown_ops),
        "provenance": dict(graph.provenance),
    }
    arrays: dict[str, Any] = {name: getattr(graph, name) for name in _COLUMNS}
    for name in _ROWS:
        rows: Csr = getattr(graph, name)
        arrays[f"{name}.indptr"], arrays[f"{name}.indices"] = rows.indptr, rows.indices
    arrays["description"] = np.frombuffer(json.dumps(description).encode(), dtype=np.uint8)
    np.savez(file, **arrays)


def load_graph(path: Path) -> OpGraph | None:
    """The graph in a file; None if there is no such file, or it is damaged, or of another version."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        description = json.loads(arrays["description"].tobytes())
        if description["version"] != _VERSION:
            return None
        return _graph(description, arrays)
    except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError, zipfile.BadZipFile):
        return None


def _graph(description: dict[str, Any], arrays: dict[str, Any]) -> OpGraph:
    count = len(arrays["op_kind"])
    columns: dict[str, Any] = {name: arrays[name] for name in _COLUMNS}
    rows: dict[str, Any] = {name: Csr(arrays[f"{name}.indptr"], arrays[f"{name}.indices"]) for name in _ROWS}
    if any(len(row) != count for row in rows.values()) or any(len(columns[n]) != count for n in _COLUMNS[:4]):
        raise ValueError("columns differ in length")
    return OpGraph(
        axes=description["axes"],
        specs=tuple(TensorSpec(*_tuples(values)) for values in description["specs"]),
        kinds=tuple(OpKind(*_tuples(values)) for values in description["kinds"]),
        modules=tuple(description["modules"]),
        parameters=tuple(Parameter(*values) for values in description["parameters"]),
        blocks=tuple(Block(*_tuples(values)) for values in description["blocks"]),
        unknown_ops=description["unknown_ops"],
        provenance=description["provenance"],
        **columns,
        **rows,
    )


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
