"""`cosim` with a stand-in for the simulation: `python fake_run.py SECONDS ARGUMENTS...` sleeps instead."""

import sys
import time
from types import ModuleType
from typing import Any

from cosim.cli import main
from hwmodels.units import InputError

SECONDS = 0.0


class Answer:
    """What commands need of a result."""

    def __init__(self, spec: Any) -> None:
        self.spec = spec

    def to_json(self) -> dict[str, Any]:
        return {"devices": self.spec.system.devices}


def simulate(spec: Any, progress: Any = None, unfold: bool = False) -> Answer:
    if SECONDS:
        print("simulating", file=sys.stderr, flush=True)
        time.sleep(SECONDS)
    if spec.training.dropout == 0.25:
        raise ZeroDivisionError("nobody foresaw this")
    if spec.training.dropout == 0.125:
        print("a user's module says hello")
    if spec.training.dropout == 0.5:
        raise InputError("training.precision: this chip has no such format")
    return Answer(spec)


def modules() -> dict[str, ModuleType]:
    """The stand-ins, by the name under which the command line imports them."""
    found = {}
    for name, attributes in {
        "cosim.simulate": {"simulate": simulate},
        "cosim.report.terminal": {"print_result": lambda result, console: console.print("a table")},
        "cosim.report.html": {"write_html": lambda result, path: path.write_text("<html>")},
        "cosim.report.perfetto": {"write_perfetto": lambda result, path: path.write_text("{}")},
        "cosim.report.memory_snapshot": {"write_memory_snapshot": lambda result, path: path.write_text("snapshot")},
    }.items():
        found[name] = ModuleType(name)
        for key, value in attributes.items():
            setattr(found[name], key, value)
    return found


if __name__ == "__main__":
    SECONDS = float(sys.argv[1])
    sys.modules.update(modules())
    main(sys.argv[2:])
