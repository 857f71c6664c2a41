"""Data flows down the list of rooms and never back up, and so do imports, also those written inside functions."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the bottom up. A room imports rooms of its own line or of lines above it in this list; within a line, without
# cycles. Longer names win over shorter ones: what a program is, how its tasks merge and what they allocate is the
# language that mapping writes and an engine plays, so it stands below both.
ROOMS = (
    ("hwmodels", "cosim_native"),
    ("workloads",),
    ("cosim.output",),
    ("cosim.graph", "cosim.stacks"),
    ("cosim.goodput",),
    ("cosim.engine.program", "cosim.engine.kernels", "cosim.engine.allocation"),
    ("cosim.spec",),
    ("cosim.trace",),
    ("cosim.techniques",),
    ("cosim.parallel",),
    ("cosim.mapping",),
    ("cosim.cost",),
    ("cosim.engine",),
    ("cosim.memory", "cosim.result", "cosim.played"),
    ("cosim.footprint", "cosim.notices"),
    ("cosim.summary", "cosim.remedies", "cosim.replicas"),
    ("cosim.simulate",),
    (
        "cosim.explore",
        "cosim.compare",
        "cosim.numerics",
        "cosim.validate",
        "cosim.calibrate",
        "cosim.measure",
        "cosim.report",
    ),
    ("cosim.process",),
    ("cosim.batch",),
    ("cosim.commands",),
    ("cosim.cli",),
    ("cosim",),  # the front door, cosim/__init__.py
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
OURS = {"cosim", "hwmodels", "workloads", "cosim_native"}

# What of hwmodels the models of workloads may know: units, number formats, and how a library file is read.
WORKLOADS_MAY_IMPORT = {"hwmodels.units", "hwmodels.number_formats", "hwmodels.yaml_file"}
NATIVE_MAY_IMPORT = {"numpy", "torch"}


def _modules() -> dict[str, Path]:
    roots = [(ROOT / package, ROOT) for package in ("cosim", "hwmodels", "workloads")]
    roots.append((ROOT / "native" / "cosim_native", ROOT / "native"))
    found = {}
    for package, base in roots:
        for path in sorted(package.rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, with its line; `from package import module` names the module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = node.module or ""
            for alias in node.names:
                submodule = f"{module}.{alias.name}"
                yield (submodule if submodule in MODULES else module), node.lineno


def _room(module: str) -> str | None:
    if module == "cosim":
        return module
    named = [room for room in LEVEL if room != "cosim" and (module == room or module.startswith(room + "."))]
    return max(named, key=len, default=None)


def _arrows() -> Iterator[tuple[str, str, str]]:
    """(importing module, imported module of ours, where) for every import."""
    for module, path in MODULES.items():
        for imported, line in _imports(path):
            if imported.partition(".")[0] in OURS:
                yield module, imported, f"{path.relative_to(ROOT)}:{line}"


def test_every_module_belongs_to_a_room() -> None:
    assert [module for module in MODULES if _room(module) is None] == []


def test_no_import_runs_back_up() -> None:
    wrong = []
    for module, imported, where in _arrows():
        upper, lower = _room(module), _room(imported)
        if upper and lower and LEVEL[lower] > LEVEL[upper]:
            wrong.append(f"{where}: {upper} imports {imported}, which is above it")
    assert not wrong, "\n" + "\n".join(wrong)


def test_rooms_of_one_line_do_not_import_in_circles() -> None:
    beside: dict[str, set[str]] = {room: set() for room in LEVEL}
    for module, imported, _where in _arrows():
        upper, lower = _room(module), _room(imported)
        if upper and lower and upper != lower and LEVEL[upper] == LEVEL[lower]:
            beside[upper].add(lower)

    def reach(room: str, seen: frozenset[str]) -> set[str]:
        return {room}.union(*(reach(other, seen | {room}) for other in beside[room] - seen))

    circles = [(room, other) for room in LEVEL for other in beside[room] if room in reach(other, frozenset())]
    assert circles == []


def test_hardware_models_import_nothing_of_ours() -> None:
    wrong = [where for module, imported, where in _arrows() if _room(module) == "hwmodels" != _room(imported)]
    assert wrong == []


def test_workloads_know_only_units_and_formats_of_the_hardware() -> None:
    wrong = [
        f"{where} imports {imported}"
        for module, imported, where in _arrows()
        if _room(module) == "workloads" and _room(imported) == "hwmodels" and imported not in WORKLOADS_MAY_IMPORT
    ]
    assert wrong == []


def test_native_needs_only_numpy_and_torch() -> None:
    allowed = {"cosim_native", *NATIVE_MAY_IMPORT, *sys.stdlib_module_names}
    wrong = [
        f"{path.name}:{line} imports {imported}"
        for module, path in MODULES.items()
        if _room(module) == "cosim_native"
        for imported, line in _imports(path)
        if imported.partition(".")[0] not in allowed
    ]
    assert wrong == []


@pytest.mark.parametrize("module", ["hwmodels", "cosim_native", "cosim.cli"])
def test_starting_up_loads_no_heavy_library(module: str) -> None:
    """`cosim --help` and `cosim hw list` answer at once: heavy libraries wait until they are needed."""
    heavy = {"torch", "plotly", "scipy", "transformers", "networkx", "simpy"}
    program = f"import sys, {module}; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert heavy.isdisjoint(ran.stdout.split())
