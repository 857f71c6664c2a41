"""Files that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hwmodels.units import InputError


@contextmanager
def whole_file(path: Path, what: str) -> Iterator[Path]:
    """A temporary path beside `path`, which becomes `path` when the block ends well and vanishes when it does not.

    It is made at once, so that a place that cannot be written to is found before the work is done; `what` names the
    option in the error. A device or pipe is written to at the end.

    Raises InputError.
    """
    target = path.resolve()
    try:
        if target.is_dir():
            raise InputError(f"{what} {path}: is a directory; allowed: the name of a file")
        special = target.exists() and not target.is_file()
        descriptor, name = tempfile.mkstemp(
            prefix=f".{target.name[:100]}.", suffix=target.suffix[:20], dir=None if special else target.parent
        )
        os.close(descriptor)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{what} {path}: cannot be written: {reason}") from None
    temporary = Path(name)
    try:
        yield temporary
        if special:
            with temporary.open("rb") as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)
        else:
            temporary.chmod(_mode(target))
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _mode(target: Path) -> int:
    """The permissions that the file has, or that a new one would get."""
    if target.exists():
        return target.stat().st_mode & 0o7777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
