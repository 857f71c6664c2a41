"""cosim simulates training steps of Transformers: time, memory, energy, money, and what holds a run back.

result = cosim.simulate(cosim.RunSpec.load("run.yaml"))
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosim.result import Result as Result
    from cosim.simulate import simulate as simulate
    from cosim.spec import RunSpec as RunSpec
    from hwmodels.units import InputError as InputError

__all__ = ["InputError", "Result", "RunSpec", "simulate"]

_HOMES = {
    "InputError": "hwmodels.units",
    "Result": "cosim.result",
    "RunSpec": "cosim.spec",
    "simulate": "cosim.simulate",
}


def __getattr__(name: str) -> Any:
    """The public names, each imported when first used, so that `cosim --help` does not wait for them."""
    if name not in _HOMES:
        raise AttributeError(f"module 'cosim' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """The package, in which `simulate` stays the call also once the module of that name has been imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "simulate" and isinstance(value, ModuleType):
            value = value.simulate
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
