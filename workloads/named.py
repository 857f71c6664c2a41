"""Models by name: the configurations in `workloads/library/*.yaml`, each with its source and, where known, its size."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hwmodels.units import InputError
from hwmodels.yaml_file import load_yaml
from workloads.model import ModelConfig, from_dimensions

_LIBRARY = Path(__file__).parent / "library"


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A library entry: where its dimensions come from, and how many parameters its authors state (None if unclear)."""

    name: str
    aliases: tuple[str, ...]
    config: ModelConfig
    source: str
    published_parameters: float | None


def names() -> list[str]:
    """The names of all models, by family and size; aliases are left out."""
    return list(_entries())


def load(name: str, where: str = "model") -> ModelConfig:
    """The configuration called `name`, which may be an alias. Raises InputError with the closest names."""
    return find(name, where).config


def source(name: str) -> str:
    """Where the dimensions of `name` come from."""
    return find(name).source


def find(name: str, where: str = "model") -> NamedModel:
    """The whole entry of `name`, which may be an alias. Raises InputError with the closest names."""
    entries = _entries()
    by_name = {alias: key for key, entry in entries.items() for alias in (key, *entry.get("aliases", ()))}
    if name not in by_name:
        close = difflib.get_close_matches(name.lower(), by_name, n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise InputError(f"{where}: there is no model {name[:80]!r}; {hint}`cosim workload list` has all names")
    key = by_name[name]
    entry = entries[key]
    config = from_dimensions(entry["model"], f"{where} {key}")
    return NamedModel(key, tuple(entry.get("aliases", ())), config, entry["source"], entry.get("parameters"))


@cache
def _entries() -> Mapping[str, Mapping[str, Any]]:
    """Name -> {source, model, aliases?, parameters?}; a file's `defaults` are filled into each of its models."""
    found: dict[str, Mapping[str, Any]] = {}
    for path in sorted(_LIBRARY.glob("*.yaml")):
        file: Any = load_yaml(path, path.name)
        for name, entry in file["models"].items():
            merged = {"source": file.get("source"), **entry, "model": file.get("defaults", {}) | entry["model"]}
            found[name] = MappingProxyType(merged)
    return MappingProxyType(found)
