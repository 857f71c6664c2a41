"""The process around a command: signals that end it, streams that may be closed, and the one sentence it ends with."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import typer

from hwmodels.units import InputError

BROKEN_PIPE = 128 + signal.SIGPIPE
INTERRUPTED = 128 + signal.SIGINT
BAD_INPUT = 2
INTERNAL = 70  # sysexits.h, EX_SOFTWARE
DEBUG = "COSIM_DEBUG"
"""Environment variable that has the traceback of an internal error printed."""


class TerminatedError(BaseException):
    """SIGTERM or SIGHUP arrived; like Ctrl-C it passes everything that catches exceptions, so that files are tidied."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


def run(command: Callable[[], int | None]) -> int:
    """The exit status of `command`: what went wrong is one sentence on standard error.

    0, 2 (bad input, nowhere to write), 70 (an error of cosim's own), 128 + a signal's number.
    """
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - for the life of the process
    try:
        with _signals():
            if sys.stdout is None:
                raise InputError("standard output is closed; give it a place, for example > /dev/null")
            status = command() or 0
            sys.stdout.flush()
            return status
    except InputError as error:
        return say(error, BAD_INPUT)
    except typer.Exit as error:
        return _flushed(error.exit_code)
    except (KeyboardInterrupt, EOFError, typer.Abort):
        return say("interrupted", INTERRUPTED)
    except TerminatedError as error:
        return say(error, 128 + error.number)
    except BrokenPipeError:
        _drop_output()
        return BROKEN_PIPE
    except SystemExit as error:  # rich's answer to a broken pipe
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        _drop_output()
        return BROKEN_PIPE
    except OSError as error:
        return _said(error)
    except Exception as error:  # noqa: BLE001 - no traceback reaches the user
        if hasattr(error, "format_message"):  # click's own errors: a wrong option or argument
            return say(error.format_message() or "see cosim --help", getattr(error, "exit_code", BAD_INPUT))
        return say(internal_error(error), INTERNAL)


def internal_error(error: Exception) -> str:
    """What `error`, which nobody foresaw, says; with COSIM_DEBUG in the environment its traceback is printed."""
    if os.environ.get(DEBUG):
        traceback.print_exception(error)
    sentence = " ".join(f"internal error: {type(error).__name__}: {error}".split())[:500]
    return f"{sentence} ({DEBUG}=1 shows where)"


def say(message: object, status: int) -> int:
    """One line on standard error; answers `status`."""
    line = " ".join(str(message).split())
    with suppress(OSError):
        print("cosim: " + "".join(c if c.isprintable() else "?" for c in line), file=sys.stderr, flush=True)
    return status


def _flushed(status: int) -> int:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        return BROKEN_PIPE
    except OSError as error:
        return _said(error)
    return status


def _said(error: OSError) -> int:
    _drop_output()
    return say(f"{error.filename or 'standard output'}: {error.strerror or error}", BAD_INPUT)


def _drop_output() -> None:
    """What is buffered has nowhere to go: the interpreter's last flush must not fail again."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise TerminatedError while inside; one that is ignored (nohup) stays so."""

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # tidying up is not interrupted
        raise TerminatedError(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
