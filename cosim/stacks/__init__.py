"""Software stacks: named profiles of the facts about software that decide a step's time besides shapes and chip."""

from cosim.stacks.stack import ARCHITECTURES, ByArchitecture, Stack, load, names

__all__ = ["ARCHITECTURES", "ByArchitecture", "Stack", "load", "names"]
