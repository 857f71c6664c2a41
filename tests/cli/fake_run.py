"""`cosim` with a stand-in for the simulation: `python fake_run.py SECONDS ARGUMENTS...` sleeps instead."""

import sys
import time
from types import ModuleType
from typing import Any

from cosim.cli import main
from hwmodels.units import InputError


class Answer:
    """What commands need of a result."""

    def __init__(self, spec: Any) -> None:
        self.spec = spec

    def to_json(self) -> dict[str, Any]:
        return {"devices": self.spec.system.devices}


def simulate(spec: Any, progress: Any = None) -> Answer:
    print("simulating", file=sys.stdout, flush=True)
    time.sleep(float(sys.argv[1]))
    if spec.training.dropout == 0.5:
        raise InputError("training.precision: this chip has no such format")
    return Answer(spec)


def install() -> None:
    """Puts the stand-ins where the command line finds them."""
    for name, attributes in {
        "cosim.simulate": {"simulate": simulate},
        "cosim.report.terminal": {"print_result": lambda result, console: console.print("a table")},
        "cosim.report.html": {"write_html": lambda result, path: path.write_text("<html>")},
    }.items():
        module = ModuleType(name)
        for key, value in attributes.items():
            setattr(module, key, value)
        sys.modules[name] = module


if __name__ == "__main__":
    install()
    main(sys.argv[2:])
