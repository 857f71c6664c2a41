"""Programs become timelines: by the engine in C++, or by SimPy's, which defines the semantics.

The two give the same timeline, to the picosecond. COSIM_ENGINE=simpy or native in the environment chooses one.
"""

from __future__ import annotations

import os
import warnings

from cosim.engine.program import DeadlockError, Engine, Program, Timeline
from hwmodels.units import InputError

__all__ = ["DeadlockError", "Engine", "Program", "Timeline", "choose", "play"]

CHOICE = "COSIM_ENGINE"


def play(program: Program, engine: str = "") -> Timeline:
    """When every task of the program is issued, starts and ends; raises ValueError or DeadlockError.

    `engine` is native or simpy; see `choose`.
    """
    return choose(engine).play(program)


def choose(engine: str = "") -> Engine:
    """The engine of this name, else the one that COSIM_ENGINE names, else native, or simpy where native is not built.

    Raises InputError for another name, and for native by name where it is not built.
    """
    name = engine or os.environ.get(CHOICE, "")
    if name not in ("", "native", "simpy"):
        raise InputError(f"{CHOICE}: {name!r} is not an engine; native and simpy are")
    if name != "simpy":
        try:
            from cosim.engine.native_engine import NativeEngine

            return NativeEngine()
        except ImportError as missing:
            if name == "native":
                raise InputError(f"{CHOICE}: the native engine cannot be loaded: {missing}") from missing
            warnings.warn(
                f"the native engine cannot be loaded ({missing}); SimPy's plays instead, about 100 times slower",
                stacklevel=3,
            )
    from cosim.engine.simpy_engine import SimpyEngine

    return SimpyEngine()
