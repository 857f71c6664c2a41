"""Many runs: one JSON object per line in, one per line out, in order; a line that cannot be run says why."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

from cosim.process import internal_error
from hwmodels.units import InputError

if TYPE_CHECKING:
    from cosim.result import Result
    from cosim.simulate import Progress
    from cosim.spec import RunSpec

_LINE_LIMIT = 1_000_000  # characters of one run


def simulate_lines(batch: str, changes: Sequence[str], out: TextIO, progress: Progress | None) -> tuple[int, int]:
    """Simulate every line of the file `batch` ("-": standard input) and write the answers to `out`.

    Answers how many lines failed, and how many there were. A failed line becomes {"error": sentence}, whatever went
    wrong in it; modules and files that a line names are looked for beside the batch file. Raises InputError if the file
    cannot be read.
    """
    directory = None if batch == "-" else Path(batch).parent
    return answer_lines(batch, out, lambda line, where: _answer(line, where, directory, changes, progress))


def answer_lines(batch: str, out: TextIO, answer: Callable[[bytes, str], dict[str, Any]]) -> tuple[int, int]:
    """Write `answer(line, its name)` for every line of the file `batch` ("-": standard input) to `out`, as JSON.

    Answers how many lines failed (their answers have `error`), and how many there were. Raises InputError if the file
    cannot be read.
    """
    failed = done = 0
    with _lines(batch) as lines:
        for number, line in enumerate(lines, 1):
            found = answer(line, f"{batch}, line {number}")
            failed, done = failed + ("error" in found), number
            out.write(json.dumps(found, allow_nan=False) + "\n")
    return failed, done


def simulated(spec: RunSpec, where: str, progress: Progress | None, unfold: bool = False) -> Result:
    """The result of one run, of every replica with `unfold`; what its modules print goes to standard error.

    Raises InputError whose sentence begins with `where`, the name of the run file.
    """
    try:
        with redirect_stdout(sys.stderr):
            from cosim.simulate import simulate

            return simulate(spec, progress, unfold)
    except InputError as error:
        raise located(error, where) from error


def located(error: InputError, where: str) -> InputError:
    """`error` with the run file's name before its sentence, if it does not begin with it."""
    if not str(error).startswith(where):
        error.args = (f"{where}: {error}",)
    return error


def _answer(
    line: bytes, where: str, directory: Path | None, changes: Sequence[str], progress: Progress | None
) -> dict[str, Any]:
    from cosim.spec import RunSpec

    try:
        answer = simulated(RunSpec.from_json(line, where, changes, directory), where, progress).to_json()
        json.dumps(answer, allow_nan=False)
        return answer
    except InputError as error:
        return {"error": " ".join(str(error).split())}
    except Exception as error:  # noqa: BLE001 - one bad line does not cost the others
        return {"error": f"{where}: {internal_error(error)}"}


@contextmanager
def _lines(name: str) -> Iterator[Iterable[bytes]]:
    """The lines of a file or of standard input, each of bounded size: what is beyond the bound is read and dropped."""
    if name == "-" and sys.stdin is None:
        raise InputError("--batch -: standard input is closed")
    try:
        file = nullcontext(sys.stdin.buffer) if name == "-" else Path(name).open("rb")  # noqa: SIM115
    except (OSError, ValueError) as error:
        raise InputError(f"--batch {name}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    with file as lines:
        yield _bounded(lines, name)


def _bounded(file: BinaryIO, name: str) -> Iterator[bytes]:
    try:
        while line := file.readline(_LINE_LIMIT + 1):
            rest = line
            while not rest.endswith(b"\n") and (rest := file.readline(_LINE_LIMIT)):
                pass
            yield line
    except OSError as error:
        raise InputError(f"--batch {name}: cannot be read: {error.strerror or error}") from None
