"""A report's file: it appears whole or not at all, and a path that cannot be written is the user's error, found first."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from hwmodels.units import InputError


@contextmanager
def replacing(path: str | Path) -> Iterator[TextIO]:
    """A UTF-8 text file that takes the place of `path` when the block ends without an error; until then it has another name.

    What is not an ordinary file (a pipe, /dev/null) is written to as it is.

    Raises InputError: `path` is a folder, its folder is missing, or it cannot be written.
    """
    try:
        target = Path(path).resolve()
        if target.is_dir():
            raise InputError(f"{str(path)!r} is a folder; give the name of a file to write")
        if not target.parent.is_dir():
            raise InputError(f"{str(path)!r} cannot be written: its folder {str(target.parent)!r} does not exist")
        in_place = target.exists() and not target.is_file()
        if target.is_file() and not os.access(target, os.W_OK):
            raise InputError(f"{str(path)!r} cannot be written: it is write-protected")
        written = target if in_place else target.with_name(f".{target.name[:100]}.{os.getpid()}.tmp")
        with _opened(written, in_place) as file:
            yield file
        if not in_place:
            written.replace(target)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"{str(path)!r} cannot be written: {reason}") from error


@contextmanager
def _opened(path: Path, in_place: bool) -> Iterator[TextIO]:
    """`path` for writing; unless it is written in place, it is removed again when the block fails."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        try:
            yield file
            file.flush()
        except BaseException:
            if not in_place:
                path.unlink(missing_ok=True)
            raise
