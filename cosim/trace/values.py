"""Numbers that a module's code reads of its tensors (a branch, `.item()`), which fake tensors do not have.

A rehearsal on small real tensors notes them in order (`Noting`), at two sizes; traces at any sizes are then told the
same ones (`Told`). A whole number that follows the sizes (the length of a row) follows them in the trace too. Which
branch is taken is thereby that of the rehearsal's random weights and inputs: an assumption, which the graph states.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cosim.trace.step import DataDependentError

Sizes = tuple[int, int]
"""Batch, sequence."""
MOST_BYTES = 4 * 2**30  # of weights that are made for a rehearsal, which makes gradients as large
_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


@dataclass(frozen=True, slots=True)
class Read:
    """A number that was read: on which line, its value, and whether before the step, while the module was built."""

    where: str
    value: Any
    building: bool = False


@dataclass(frozen=True, slots=True)
class Values:
    """What two rehearsals read, in the same order, and the sizes of each."""

    first: tuple[Read, ...]
    second: tuple[Read, ...]
    sizes: tuple[Sizes, Sizes]

    def told(self, sizes: Sizes, again: bool = False) -> Told:
        """For a trace at `sizes`: numbers of the first rehearsal; whole ones that differ from the second's by no rule
        are the second's in the trace that is made `again`, so that shapes which follow them differ.
        """
        return Told([self._at(number, sizes, again) for number in range(len(self.first))])

    def _at(self, number: int, sizes: Sizes, again: bool) -> Read:
        one, two = self.first[number], self.second[number]
        if one.value == two.value:
            return one
        rule = _rule((one.value, two.value), self.sizes)
        if rule is None:
            return two if again else one
        batches, sequences, times, plus = rule
        return Read(one.where, sizes[0] ** batches * sizes[1] ** sequences * times + plus, one.building)

    @property
    def varying(self) -> list[str]:
        """Lines that read whole numbers which follow the tensors' values, not their sizes."""
        pairs = zip(self.first, self.second, strict=True)
        found = [a.where for a, b in pairs if a.value != b.value and _rule((a.value, b.value), self.sizes) is None]
        return list(dict.fromkeys(found))

    @property
    def assumed(self) -> list[str]:
        """Each line that reads numbers during the step, with the first of them: "model.py:14 (True)"."""
        found: dict[str, str] = {}
        for read, other in zip(self.first, self.second, strict=True):
            if not read.building:
                sized = read.value != other.value and _rule((read.value, other.value), self.sizes) is not None
                found.setdefault(read.where, "as its sizes" if sized else _short(read.value))
        return [f"{where} ({value})" for where, value in found.items()]


class Told:
    """Numbers in the order in which they are asked for."""

    def __init__(self, reads: Sequence[Read]) -> None:
        self._reads: Iterator[Read] = iter(reads)

    def answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What `func`, which returns a number, returned in the rehearsal; its own result where it has one."""
        read, where = next(self._reads, None), caller()
        if read is None or read.where != where:
            raise DataDependentError(
                f"model: {where} reads values of its tensors in another order than a run on small real tensors does"
            )
        try:
            return func(*args, **kwargs)
        except DataDependentOutputException:
            return read.value


class Telling(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers from `told` while a module is built."""

    def __init__(self, told: Told) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._told = told

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return self._told.answer(func, args, kwargs) if reads_values(func) else func(*args, **kwargs)


class Noting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what is read of real tensors; `earlier` reads, but for whole numbers, are repeated, so that the path is
    the same.
    """

    def __init__(self, earlier: Sequence[Read] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads: list[Read] = []
        self.building = True
        self._earlier = earlier
        self._made_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.building and isinstance(result, Tensor) and not any(isinstance(arg, Tensor) for arg in args):
            self._made_bytes += result.untyped_storage().nbytes()
            if self._made_bytes > MOST_BYTES:
                raise DataDependentError(
                    "model: its control flow depends on the values of its tensors, and its weights are too large "
                    f"(over {MOST_BYTES >> 30} GiB) to run it for them; trace it with fewer layers or without branch"
                )
        if not reads_values(func):
            return result
        number = len(self.reads)
        whole = isinstance(result, int) and not isinstance(result, bool)
        if number < len(self._earlier) and not whole:
            result = self._earlier[number].value
        self.reads.append(Read(caller(), result, self.building))
        return result


class OneByOne(TorchFunctionMode):
    """`tolist` of real tensors reads number by number, as that of fake ones does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.tolist:
            return _listed(args[0])
        return func(*args, **(kwargs or {}))


def _listed(tensor: Tensor) -> Any:
    return tensor.item() if tensor.dim() == 0 else [_listed(part) for part in tensor]


def reads_values(func: Any) -> bool:
    """Whether an operator returns a number that depends on the values of tensors."""
    return torch.Tag.data_dependent_output in func.tags


def caller() -> str:
    """File and line of the model's code that is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if _is_the_users(frame):
            return _place(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return "its code"


def raised_at(error: BaseException) -> str:
    """File and line of the model's code at which `error` was raised."""
    found, trace = "its code", error.__traceback__
    while isinstance(trace, TracebackType):
        if _is_the_users(trace.tb_frame):
            found = _place(trace.tb_frame.f_code.co_filename, trace.tb_lineno)
        trace = trace.tb_next
    return found


def _is_the_users(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    return not name.startswith(_NOT_THE_USERS) and not name.startswith("<")


def _place(file: str, line: int) -> str:
    path = Path(file)
    within = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return f"{within}:{line}"


def _rule(values: tuple[Any, Any], sizes: tuple[Sizes, Sizes]) -> tuple[int, int, int, int] | None:
    """(i, j, c, d) of the whole number c * batch^i * sequence^j + d, d at most 1 off; None if it is none."""
    if not all(isinstance(value, int) for value in values):
        return None
    for plus in (0, -1, 1):
        for batches, sequences in ((0, 1), (1, 0), (1, 1), (0, 2), (1, 2)):
            times = [(v - plus) / (b**batches * s**sequences) for v, (b, s) in zip(values, sizes, strict=True)]
            if times[0] == times[1] and times[0].is_integer():
                return batches, sequences, int(times[0]), plus
    return None


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) and math.isfinite(value) else str(value)
