"""Finds accelerator files: the library's by name, anybody's by path, and variations by `base` and `set`."""

import copy
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from hwmodels.units import InputError, parse_quantity
from hwmodels.yaml_file import load_yaml

_VARIATION_KEYS = ("base", "set", "name", "title", "architecture", "sources", "source", "assumed", "derived")
# What constants are fitted on; not what memory holds, what is drawn, or what it costs.
_FITTED_ON = ("clock", "matrix", "vector", "memory", "links")
_HOLDS = ("memory.hbm.capacity",)
_KEPT = 128  # files, more than the library has
LIBRARY = Path(__file__).parent / "library"


def names() -> list[str]:
    """The accelerators of the library, sorted."""
    return sorted(path.stem for path in LIBRARY.glob("*.yaml"))


def load_raw(name: str | Mapping[str, Any]) -> dict[str, Any]:
    """The file of the accelerator that `name` stands for as it is written, sources and all; `base` is resolved.

    Raises InputError: no such accelerator, or an unreadable file.
    """
    return copy.deepcopy(resolve(name).data)


@lru_cache(_KEPT)
def _document(path: Path, _version: tuple[int, int], label: str) -> object:
    """The plain data of a file, read once: many build on the same one. Nobody changes it."""
    return load_yaml(path, label)


@dataclass(frozen=True, slots=True)
class Written:
    """An accelerator as it is written: its plain `data` with every `base` resolved, the `label` that errors call it,
    and the `bases` that it builds on, nearest first, each with the paths that were set on top of it; `origin` is the
    nearest whose values all have sources (None: itself).
    """

    data: dict[str, Any]
    label: str
    bases: tuple[tuple[str, tuple[str, ...]], ...] = ()
    origin: "Written | None" = None

    def calibrated_on(self) -> tuple[str, tuple[str, ...]] | None:
        """The base whose fitted constants this one has, and what was changed since of the parts that they were fitted
        on; None where it has its own.
        """
        if not self.bases or not self.data.get("calibration"):
            return None
        changed = dict.fromkeys(path for _, paths in reversed(self.bases) for path in paths if _is_fitted_on(path))
        return self.bases[-1][0], tuple(changed)


def _is_fitted_on(path: str) -> bool:
    """Whether kernels or collectives run at another speed when `path` changes; how much memory holds is not that."""
    return path.split(".")[0] in _FITTED_ON and path not in _HOLDS


def resolve(reference: str | Mapping[str, Any], where: str = "accelerator", above: tuple[str, ...] = ()) -> Written:
    """What `reference` stands for; `above` are the files that build on it.

    `reference` is a library name, the path of a .yaml file, or {base: NAME, set: {path: value}, name: ..., title: ...}.
    Raises InputError: nothing of that name, a file that is no mapping, an unusable `set`, files that build on each
    other in a circle.
    """
    if isinstance(reference, Mapping):
        return _variation(reference, where, above)
    if not isinstance(reference, str):
        raise InputError(f"{where}: {reference!r:.80} must be a name, a .yaml file, or {{base: NAME, set: {{...}}}}")
    if reference.endswith((".yaml", ".yml")):
        path = Path(reference).expanduser()
    elif Path(reference).name == reference and (LIBRARY / f"{reference}.yaml").is_file():
        path = LIBRARY / f"{reference}.yaml"
    else:
        close = _meant(reference)
        hint = f"did you mean {' or '.join(close)}?" if close else "`cosim hw list` has the names"
        raise InputError(f"{where}: no accelerator is called {reference!r:.80}; {hint}")
    key = str(path.resolve())
    if key in above:
        circle = " -> ".join(Path(file).name for file in (*above[above.index(key) :], key))
        raise InputError(f"{where}: files build on each other in a circle: {circle}")
    data = _document(path, _version(path), str(path))
    if not isinstance(data, dict):
        raise InputError(f"{path}: must be a mapping of keys to values")
    label = path.name
    if "base" not in data:
        return Written(data, label)
    base = data["base"]
    if isinstance(base, str) and base.endswith((".yaml", ".yml")):  # as the file sees it
        data = {**data, "base": str(path.parent / base)}
    return _variation(data, label, (*above, key))


def _version(path: Path) -> tuple[int, int]:
    """What changes when a file does; zeros where it cannot be read, which reading it says better."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return 0, 0
    return found.st_mtime_ns, found.st_size


def _meant(reference: str) -> list[str]:
    """Names that `reference` may stand for: those that have it in them or in their title, however it is written
    (H100, TPU v4, Trainium2), or are spelt alike.
    """
    wanted = re.sub(r"[^a-z0-9]", "", reference.lower())
    if len(wanted) > 2:
        for said in (lambda name: name, _title):
            found = [name for name in names() if wanted in re.sub(r"[^a-z0-9]", "", said(name).lower())]
            if found:
                return found
    return get_close_matches(reference.lower(), names(), 3, 0.6)


def _title(name: str) -> str:
    found = re.search(r"^title: (.*)$", (LIBRARY / f"{name}.yaml").read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else name


def _variation(data: Mapping[str, Any], where: str, above: tuple[str, ...]) -> Written:
    unknown = [key for key in data if key not in _VARIATION_KEYS]
    if "base" not in data or unknown:
        problem = f"unknown key {unknown[0]!r}" if unknown else "no `base`"
        raise InputError(
            f"{where}: {problem}; a variation is {{base: NAME, set: {{path: value}}}} and may give name, title, sources"
        )
    base = resolve(data["base"], f"{where}: base", above)
    result = dict(base.data)
    changes = data.get("set") or {}
    if not isinstance(changes, Mapping):
        raise InputError(f"{where}: set: must be a mapping of paths to values, for example {{matrix.cores: 132}}")
    provenance = next(
        ((kind, data[kind]) for kind in ("source", "derived", "assumed") if kind in data), ("user", f"set in {where}")
    )
    for path, value in changes.items():
        _set(result, str(path), value, provenance, where)
    base_name = str(result.get("name", data["base"]))
    result["name"] = data.get("name", base_name + " (changed)" if changes else base_name)
    result |= {key: data[key] for key in ("title", "architecture") if key in data}
    if "sources" in data:
        result["sources"] = {**_named(result.get("sources")), **_named(data["sources"])}
    origin = (base.origin or base) if provenance[0] == "user" else base.origin
    return Written(result, where, ((base_name, tuple(map(str, changes))), *base.bases), origin)


def _named(sources: Any) -> dict[Any, Any]:
    """Sources by name; those of a list by number, and by their text where two lists meet."""
    if isinstance(sources, list):
        return {str(source): source for source in sources}
    return dict(sources) if isinstance(sources, Mapping) else {}


def _set(tree: dict[str, Any], path: str, value: Any, provenance: tuple[str, Any], where: str) -> None:
    """Puts `value` at `path` of `tree`, whose sections on the way are copied: others have them too. `matrix[1].rows`
    is of the second of several parts.
    """
    keys: list[str | int] = [int(key) if key.isdigit() else key for key in re.findall(r"[^.\[\]]+", path)]
    if not keys or not isinstance(keys[0], str):
        raise InputError(f"{where}: set: {path!r:.80} is no path of keys, such as matrix.cores")
    node: Any = tree
    for index, (key, inner) in enumerate(itertools.pairwise(keys)):
        said = f"{where}: set: {path}: {'.'.join(map(str, keys[: index + 1]))}"
        step = _step(node, key, said)
        if isinstance(step, list) and isinstance(inner, str):
            raise InputError(f"{said}: there are {len(step)} of them; say which, as in {key}[0].{inner}")
        if not isinstance(step, list) and (not isinstance(step, dict) or "value" in step):
            raise InputError(f"{said} is a value, not a section")
        if isinstance(step, dict) and isinstance(inner, int):
            raise InputError(f"{said} is one part; leave out [{inner}]")
        node[key] = node = copy.copy(step)
    last = keys[-1]
    old = _step(node, last, f"{where}: set: {path}")
    if isinstance(old, dict) and old and "value" not in old and not isinstance(value, Mapping | list):
        raise InputError(f"{where}: set: {path} is a section; name one of its keys: {', '.join(map(str, old))}")
    if isinstance(value, Mapping):
        node[last] = dict(value)
    elif isinstance(value, list):  # several parts of a kind
        node[last] = list(value)
    else:
        node[last] = {"value": value, provenance[0]: provenance[1]}


def _step(node: Any, key: str | int, said: str) -> Any:
    """What `node` has at `key`; an empty section where it has nothing."""
    if isinstance(key, str):
        found = node.get(key)
        return {} if found is None else found
    if key >= len(node):
        raise InputError(f"{said}: there are {len(node)} of them, counted from 0")
    return node[key]


def si_value(written: object, dimension: str) -> float | None:
    """The SI number that a file states in this dimension; None where it states another one."""
    try:
        return parse_quantity(written, dimension, "")
    except InputError:
        return None
