"""Traces on disk, found by the content of what they were made from: arrays and JSON in one .npz file per graph, never
pickles.

The key hashes the model's description, the recipe, the source text of the packages that decide what is traced, and
the versions of torch and transformers. A damaged entry is traced again; a directory that cannot be written means no
cache, and the graph's provenance says so. Users' own modules are never cached. A hit does not import torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from cosim.graph import OpGraph
from cosim.trace.options import TraceOptions
from cosim.trace.step import Progress, Source, bind, canonical, one_sequence_differs, trace
from cosim.trace.stored import load_graph, save_graph
from workloads.model import HuggingFaceModel, ModelConfig

_ENTRIES = 500  # kept; a 70B model's takes about a megabyte
_ROOT = Path(__file__).parents[2]
_SOURCES = ("workloads/*.py", "cosim/trace/*.py", "cosim/graph.py")
_NOT_IN_A_TRACE = ("export.py", "cache.py", "stored.py")
"""What reads and writes traces; `stored.py` has a format number of its own."""


def cached_trace(model: Source, options: TraceOptions | None = None, progress: Progress | None = None) -> OpGraph:
    """As `trace`, from the disk cache if the same trace was made before.

    `provenance["cache"]` says "hit", "stored", "off: ..." or why the entry could not be written. Raises InputError as
    `trace`.
    """
    options = options or TraceOptions()
    if not isinstance(model, ModelConfig | HuggingFaceModel):
        return trace(model, options, progress)
    try:
        directory = cache_directory()
        paths = {fixed: directory / f"{key}.npz" for fixed, key in _keys(model, options).items()}
    except (OSError, TypeError) as error:
        return _noted(trace(model, options, progress), f"off: {_one_line(error)}")
    for path in paths.values():
        graph = load_graph(path)
        if graph is not None:
            return _noted(bind(graph, options), "hit")
    graph = trace(model, options, progress)
    try:
        _store(graph, paths[tuple(graph.provenance["fixed"])])
    except OSError as error:
        return _noted(graph, f"not written: {_one_line(error)}")
    return _noted(graph, "stored")


def cache_directory() -> Path:
    """Where traces are kept: $COSIM_CACHE_DIR, or the user's cache directory as the platform defines it."""
    chosen = os.environ.get("COSIM_CACHE_DIR")
    if chosen:
        return Path(chosen) / "traces"
    import platformdirs

    return Path(platformdirs.user_cache_dir("cosim", appauthor=False)) / "traces"


def _keys(model: ModelConfig | HuggingFaceModel, options: TraceOptions) -> dict[tuple[str, ...], str]:
    """For each set of axes that may be fixed, the key of a graph in which they are."""
    described: Any = canonical(model, options.sequence)
    recipe = dataclasses.asdict(options)
    sizes = {axis: recipe.pop(axis) for axis in ("batch", "sequence")}
    content = {
        "model": [type(described).__name__, dataclasses.asdict(described)],
        "options": recipe,
        "one_sequence": one_sequence_differs(model, options),
        "sources": _sources(),
        "torch": _version("torch"),
        "transformers": _version("transformers") if isinstance(model, HuggingFaceModel) else None,
    }
    fixed: list[tuple[str, ...]] = [(), ("batch",), ("sequence",), ("batch", "sequence")]
    if options.frontend == "compile":  # a graph of its sizes, fixed or not
        return {axes: _hash({**content, "sizes": sizes, "fixed": axes}) for axes in fixed}
    return {axes: _hash({**content, "sizes": {axis: sizes[axis] for axis in axes}}) for axes in fixed}


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:40]


def _sources() -> str:
    digest = hashlib.sha256()
    for pattern in _SOURCES:
        for path in sorted(_ROOT.glob(pattern)):
            if path.name in _NOT_IN_A_TRACE:
                continue
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _store(graph: OpGraph, path: Path) -> None:
    """Write to a temporary name, then rename: a reader sees a whole entry or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(suffix=".part", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            save_graph(graph, file)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise
    _forget_oldest(path.parent)


def _forget_oldest(directory: Path) -> None:
    entries = list(directory.glob("*.npz"))
    if len(entries) > _ENTRIES:
        with contextlib.suppress(OSError):
            for entry in sorted(entries, key=lambda path: path.stat().st_mtime)[: len(entries) - _ENTRIES]:
                entry.unlink()


def _noted(graph: OpGraph, note: str) -> OpGraph:
    return dataclasses.replace(graph, provenance={**graph.provenance, "cache": note})


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
