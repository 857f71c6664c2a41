"""Files that appear whole or not at all, and never in the place of one that is read."""

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from hwmodels.units import InputError

STANDARD_OUTPUT = "-"


@contextmanager
def whole_file(path: Path, what: str) -> Iterator[Path]:
    """A temporary path beside `path`, which becomes `path` when the block ends well and vanishes when it does not.

    It is made at once, so that a place that cannot be written to is found before the work is done; `what` names the
    option in the error. Standard output ("-"), and what exists and is not a regular file (a device, a pipe), is written
    to at the end.

    Raises InputError.
    """
    straight = is_standard_output(path)
    with _explained(path, what):
        special = straight or (path.exists() and not path.is_file())
        if not straight and path.is_dir():
            raise InputError(f"{what} {path}: is a directory; allowed: the name of a file")
        target = path if special else Path(os.path.realpath(path))
        name = "" if straight else target.name
        descriptor, temporary_name = tempfile.mkstemp(
            prefix=f".{name[:100]}.", suffix=target.suffix[:20], dir=None if special else target.parent
        )
    temporary = Path(temporary_name)
    try:
        os.close(descriptor)
        yield temporary
        with _explained(path, what):
            if straight:
                _copy_to_standard_output(temporary)
            elif special:
                with temporary.open("rb") as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
            else:
                temporary.chmod(_mode(target))
                temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path | None, what: str) -> Iterator[None]:
    """A full disk or device while inside becomes an InputError that names the option `what` and its file."""
    with _explained(path or Path(STANDARD_OUTPUT), what):
        yield


def is_standard_output(path: Path) -> bool:
    """Whether `path` is "-", or a name of what standard output already writes to (/dev/stdout)."""
    if str(path) == STANDARD_OUTPUT:
        return True
    with suppress(OSError, ValueError, AttributeError):
        return os.path.samestat(path.stat(), os.fstat(sys.stdout.fileno())) and not _is_device(path)
    return False


def check_distinct(inputs: Mapping[str, str | Path | None], outputs: Mapping[str, str | Path | None]) -> None:
    """Raises InputError if an output is also an input or another output, by whatever name or link."""
    read = [(option, Path(file)) for option, file in inputs.items() if file is not None and str(file) != "-"]
    written: list[tuple[str, Path]] = []
    for option, file in outputs.items():
        if file is None or _is_device(Path(file)):
            continue
        path = Path(file)
        for other, taken in [*read, *written]:
            if _same(path, taken):
                raise InputError(f"{option} {path}: is the same file as {other}")
        written.append((option, path))


def _same(one: Path, other: Path) -> bool:
    if is_standard_output(one) or is_standard_output(other):
        return is_standard_output(one) and is_standard_output(other)
    with suppress(OSError, ValueError):
        if os.path.realpath(one) == os.path.realpath(other):
            return True
        return one.samefile(other)
    return False


def _is_device(path: Path) -> bool:
    """Whether `path` is a terminal, /dev/null or another thing that takes whatever is written, from any number."""
    with suppress(OSError, ValueError):
        return stat.S_ISCHR(path.stat().st_mode)
    return False


@contextmanager
def _explained(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{what} {path}: cannot be written: {reason}") from None


def _copy_to_standard_output(source: Path) -> None:
    sys.stdout.flush()
    binary = getattr(sys.stdout, "buffer", None)
    if binary is None:  # a stream of text that the caller put in its place
        sys.stdout.write(source.read_text(encoding="utf-8"))
        return
    with source.open("rb") as data:
        shutil.copyfileobj(data, binary)
    binary.flush()


def _mode(target: Path) -> int:
    """The permissions that the file has, or that a new one would get."""
    if target.exists():
        return target.stat().st_mode & 0o7777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
