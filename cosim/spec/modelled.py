"""What of the run file is modelled today: one table. A field that is not in it is modelled in full.

A field is accepted and checked from the day it is in the run file; until it is modelled, other values than those listed
here are refused. Modelling something is an edit of this table.
"""

from collections.abc import Mapping
from typing import Any

from hwmodels.units import InputError

_ONE = (1,)
_NONE = (None,)

MODELLED: Mapping[str, tuple[object, ...]] = {
    "workload.task": ("pretrain",),
    "system.anchor": _NONE,
    "training.framework": (
        *("pytorch", "composer", "torchtitan", "megatron-lm", "megatron-core", "megatron-deepspeed", "nemo"),
        *("maxtext", "tensorflow", "paddle"),
    ),
    "training.optimizer": ("adamw", "adam", "sgd", "lion", "lamb", "adafactor", "muon"),
    "training.recompute": ("none", "selective", "selective_op", "full", "{every: n}"),
    "training.techniques": ((),),
}


class NotModelledError(InputError):
    """A sensible run that asks for something that is not modelled yet: the field `key` holds `value`."""

    def __init__(self, message: str, key: str = "", value: object = None) -> None:
        super().__init__(message)
        self.key, self.value = key, value


def check_modelled(spec: object) -> None:
    """Raises NotModelledError for the first path of the table at which `spec` holds another value than those listed."""
    for path, values in MODELLED.items():
        value: Any = spec
        for name in path.split("."):
            value = getattr(value, name, _ABSENT)
        if value is _ABSENT or value in values or not isinstance(value, str | int | float | tuple | None):
            continue
        allowed = ", ".join(_text(item) for item in values)
        raise NotModelledError(f"{path}: {_text(value)} is not modelled yet; modelled today: {allowed}", path, value)


_ABSENT = object()


def _text(value: object) -> str:
    if value is None:
        return "leaving it out"
    if isinstance(value, tuple):
        return f"[{', '.join(_text(item) for item in value)}]"[:80]
    return str(value).lower() if isinstance(value, bool) else str(value)[:80]
