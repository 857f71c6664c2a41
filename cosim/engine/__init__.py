"""Programs become timelines: `play` uses the default engine; SimPy's is the reference that defines the semantics."""

from __future__ import annotations

from cosim.engine.program import DeadlockError, Program, Timeline

__all__ = ["DeadlockError", "Program", "Timeline", "play"]


def play(program: Program) -> Timeline:
    """When every task of the program is issued, starts and ends; raises ValueError or DeadlockError."""
    from cosim.engine.simpy_engine import SimpyEngine  # simpy is loaded only where something is played

    return SimpyEngine().play(program)
