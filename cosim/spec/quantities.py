"""What sections of a run file are made of: their base class, quantities with units, and short types."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from hwmodels.units import InputError, format_quantity, parse_quantity


class Section(BaseModel):
    """A part of the run file: immutable, no unknown keys, no conversion between types, no nan or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=False)


def _plain(value: object) -> object:
    """Refuses what JSON cannot hold: nan, infinity, keys that are not text."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise InputError(f"the key {key!r} must be text")
            _plain(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _plain(item)
    elif isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{value} must be a finite number")
    elif not isinstance(value, str | int | float | bool | None):
        raise InputError(f"{type(value).__name__} is not plain data")
    return value


def as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def quantity(dimension: str, positive: bool = False) -> tuple[BeforeValidator, PlainSerializer]:
    """Reads text with a unit into an SI number, and writes it back as text."""
    return (
        BeforeValidator(lambda value: None if value is None else parse_quantity(value, dimension, "", positive), str),
        PlainSerializer(
            lambda value: format_quantity(value, dimension, 12), return_type=str, when_used="json-unless-none"
        ),
    )


Name = Annotated[str, Field(min_length=1, max_length=200)]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Length = Annotated[int, Field(ge=1, le=1_000_000_000)]
Share = Annotated[float, Field(ge=0, lt=1)]
Plain = Annotated[dict[str, Any], AfterValidator(_plain)]
Bandwidth = Annotated[float, *quantity("bandwidth", positive=True)]
Duration = Annotated[float, *quantity("time")]
GradientFormat = Literal["fp32", "bf16", "fp16"]
