"""Reads the sections of an accelerator file: each value checked where it is read, each with where it came from.

A value is written plainly (`capacity: 80 GiB`) or with its provenance (`capacity: {value: 80 GiB, source:
a100-datasheet}`); the keys `source`, `derived`, `assumed` and `fitted_on` beside a section's other keys hold for
every plain value in it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TypeVar, cast

from hwmodels.units import InputError, parse_quantity

PROVENANCE = ("source", "derived", "assumed", "fitted_on", "user")
NOTES = (*PROVENANCE, "rows", "sources", "uncertainty", "error_fitted", "error_held_out", "note")
_MANY = 10**9
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where one value of an accelerator file came from: `kind` is one of PROVENANCE, or "none"."""

    path: str
    value: str
    kind: str
    text: str


class Section:
    """One mapping of an accelerator file. Readers take keys out of it; `close` refuses what nobody took.

    With a list of `problems`, what would be raised is noted there instead, and a reader answers with a value that is
    allowed, so that one reading finds all problems of a file.
    """

    def __init__(
        self,
        data: object,
        where: str,
        path: str = "",
        inherited: tuple[str, str] = ("none", ""),
        log: list[Provenance] | None = None,
        problems: list[str] | None = None,
    ) -> None:
        self._problems = problems
        if not isinstance(data, Mapping):
            self._problem(f"{where}: {path or 'the file'} must be a mapping of keys to values, not {data!r:.80}")
            data, self._problems = {}, []
        self._data, self._where, self._path = data, where, path
        self._provenance = _provenance_of(data) or inherited
        self._taken: set[str] = set()
        self._present = True
        self.log: list[Provenance] = [] if log is None else log

    def at(self, key: str) -> str:
        """The file and the full path of `key`, as errors name it."""
        return f"{self._where}: {self._full(key)}"

    def _full(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key

    def _problem(self, problem: str | InputError) -> None:
        """Raises the problem, or notes it where problems are gathered."""
        if self._problems is None:
            raise problem if isinstance(problem, InputError) else InputError(problem)
        self._problems.append(str(problem))

    def _or(self, read: Callable[[], T], instead: T) -> T:
        try:
            return read()
        except InputError as error:
            if self._problems is None:
                raise
            self._problems.append(str(error))
            return instead

    def part(self, read: Callable[[], T], *needs: object) -> T:
        """What `read` makes of this file, which needs the parts `needs`. Where problems are gathered, None stands for a
        part that has one or lacks what it needs; such a file is never used.
        """
        if any(need is None for need in needs):
            return cast(T, None)
        return self._or(read, cast(T, None))

    def _take(self, key: str) -> object:
        self._taken.add(key)
        raw = self._data.get(key)
        if isinstance(raw, Mapping) and "value" in raw:
            unknown = [str(k) for k in raw if k != "value" and k not in NOTES]
            if unknown:
                raise InputError(
                    f"{self.at(key)}: unknown key {unknown[0]!r} beside the value; allowed are {', '.join(NOTES)}"
                )
            value, provenance = raw["value"], _provenance_of(raw) or self._provenance
        else:
            value, provenance = raw, self._provenance
        if raw is not None:
            self.log.append(Provenance(self._full(key), str(value), *provenance))
        return value

    def has(self, key: str) -> bool:
        """Whether the file gives `key`."""
        return self._data.get(key) is not None

    def absent(self) -> "Section":
        """This section, as one that the file lacks and must have."""
        self._present = False
        return self

    @property
    def present(self) -> "Section | None":
        """This section; None where the file must have it and lacks it."""
        return self if self._present else None

    def keys(self) -> list[str]:
        """The keys of this section that are parameters, not provenance."""
        return [str(key) for key in self._data if key not in NOTES]

    def _missing(self, key: str) -> InputError:
        """The error for a required key; names the key that was meant to be it, if there is one."""
        meant = get_close_matches(key, [given for given in self.keys() if given not in self._taken], n=1, cutoff=0.8)
        hint = f"; there is {meant[0]!r}, which is not a known key" if meant else ""
        return InputError(f"{self.at(key)} is missing{hint}")

    def quantity(self, key: str, dimension: str, default: float | None = None, zero: bool = False) -> float:
        """The SI value of `key`, a quantity of `dimension` with a unit; zero is refused unless `zero`."""
        return self._number(
            key, default, lambda value: parse_quantity(value, dimension, self.at(key), not zero), 0.0, math.inf, False
        )

    def number(
        self, key: str, default: float | None = None, low: float = 0.0, high: float = math.inf, zero: bool = False
    ) -> float:
        """The plain number `key` in [low, high]; zero is refused unless `zero`."""
        return self._number(key, default, lambda value: _plain(value, self.at(key)), low, high, not zero)

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = _MANY) -> int:
        """The whole number `key` in [low, high]."""
        value = self._number(key, default, lambda value: _plain(value, self.at(key)), low, high, False)
        if value != int(value):
            self._problem(f"{self.at(key)}: {value!r} must be a whole number")
        return int(value)

    def _number(
        self, key: str, default: float | None, read: Callable[[object], float], low: float, high: float, positive: bool
    ) -> float:
        instead = default if default is not None else min(max(low, 1.0), high)
        return self._or(lambda: self._checked(key, default, read, low, high, positive), instead)

    def _checked(
        self, key: str, default: float | None, read: Callable[[object], float], low: float, high: float, positive: bool
    ) -> float:
        raw = self._take(key)
        if raw is None:
            if default is None:
                raise self._missing(key)
            return default
        value = read(raw)
        if positive and value == 0:
            raise InputError(f"{self.at(key)}: {raw!r} must be greater than zero")
        if not low <= value <= high:
            allowed = f"between {low:g} and {high:g}" if high < _MANY or value > high else f"at least {low:g}"
            raise InputError(f"{self.at(key)}: {raw!r} must be {allowed}")
        return value

    def text(self, key: str, default: str | None = None, choices: tuple[str, ...] = ()) -> str:
        """The text `key`, one of `choices` where there are any."""
        instead = default if default is not None else (*choices, "")[0]
        return self._or(lambda: self._text(key, default, choices), instead)

    def _text(self, key: str, default: str | None, choices: tuple[str, ...]) -> str:
        raw = self._take(key)
        if raw is None:
            if default is None:
                raise self._missing(key)
            return default
        if not isinstance(raw, str | int | float) or isinstance(raw, bool):
            raise InputError(f"{self.at(key)}: {raw!r:.80} must be text")
        value = str(raw)
        if choices and value not in choices:
            raise InputError(f"{self.at(key)}: {value!r} is not one of {', '.join(choices)}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """The truth value `key`."""
        raw = self._take(key)
        if raw is None:
            return default
        if not isinstance(raw, bool):
            self._problem(f"{self.at(key)}: {raw!r:.80} must be true or false")
        return bool(raw)

    def section(self, key: str, required: bool = False) -> "Section":
        """The mapping `key` as a section; an empty one where the file leaves it out, unless `required`."""
        self._taken.add(key)
        raw = self._data.get(key)
        problems = self._problems
        if raw is None and required:
            self._problem(self._missing(key))
            problems = []  # what it lacks besides follows from this
        found = Section({} if raw is None else raw, self._where, self._full(key), self._provenance, self.log, problems)
        return found.absent() if raw is None and required else found

    def sections(self, key: str, count: int = 0) -> list["Section"]:
        """The mapping `key`, or each of a list of them, as sections. Raises InputError: there is none.

        With a `count`, as many: those that the file leaves out are empty, and more are refused.
        """
        raw = self._data.get(key)
        if count:
            found = self.sections(key) if isinstance(raw, list) else [self.section(key)]
            if len(found) > count:
                self._problem(f"{self.at(key)}: there are {len(found)} for {count}")
            return found[:count] + [Section({}, self._where, self._full(key), log=self.log)] * (count - len(found))
        if not isinstance(raw, list):
            return [self.section(key, required=True)]
        self._taken.add(key)
        if not raw:
            self._problem(self._missing(key))
            raw = [{}]
        return [
            Section(item, self._where, f"{self._full(key)}[{place}]", self._provenance, self.log, self._problems)
            for place, item in enumerate(raw)
        ]

    def table(self, key: str, allowed: tuple[str, ...], required: bool = False) -> dict[str, float]:
        """The mapping `key` of names (each one of `allowed`) to numbers greater than zero."""
        section = self.section(key, required)
        for name in section.keys():
            if name not in allowed:
                self._problem(f"{section.at(name)}: {name!r} is not one of {', '.join(allowed)}")
        return {name: section.number(name) for name in section.keys() if name in allowed}

    def close(self) -> None:
        """Raises InputError for the first key that nothing read; notes each where problems are gathered."""
        for key in self._data:
            if key in self._taken or key in NOTES:
                continue
            close = get_close_matches(str(key), sorted(self._taken), 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known here are {', '.join(sorted(self._taken))}"
            self._problem(f"{self.at(str(key))} is not a known key; {hint}")


def _plain(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise InputError(f"{where}: {value!r:.80} must be a number")
    try:
        number = float(value)
    except ValueError:
        raise InputError(f"{where}: {value!r:.80} must be a number without a unit") from None
    if not math.isfinite(number):
        raise InputError(f"{where}: {value!r} must be a finite number")
    return number


def _provenance_of(data: Mapping[object, object]) -> tuple[str, str] | None:
    for kind in PROVENANCE:
        if kind in data:
            return kind, str(data[kind])
    return None
