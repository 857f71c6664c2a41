"""A user's own nn.Module, named as `package.module:build`.

The contract: `build(**arguments)` returns an nn.Module whose `forward(tokens)`, tokens (batch, seq) int64, returns
logits (batch, seq, vocab), a scalar loss, or an object or dict with `loss` or `logits`. A module that wants other
inputs defines `example_inputs(batch, seq_len)` and returns a tuple (positional) or dict (by name) of tensors; one whose
labels are not a token per position defines `example_labels(batch, seq_len)`. Parameters are made in
`torch.get_default_dtype()`, which the run's precision chooses. The module decides about attention and dropout itself
(`workloads.operators.attention` is one fused node; F.scaled_dot_product_attention works too). Shapes must not depend on
the values of its tensors; where its control flow does, the path that small random tensors take is taken.
"""

import importlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from hwmodels.units import InputError


def load(target: str, arguments: Mapping[str, object] | None = None, directory: Path | None = None) -> nn.Module:
    """The module that `target` ("package.module:build") returns when called with `arguments`.

    The package is looked for in `directory` (default: the current one) first, then where Python finds its own.
    Afterwards sys.path and sys.modules hold nothing of it, so another run may use the same name for another file.
    Raises InputError with one sentence: no such module or attribute, an exception inside, or no nn.Module returned.
    """
    package, _, attribute = target.partition(":")
    if not all(part.isidentifier() for part in (*package.split("."), *attribute.split("."))):
        raise InputError(f"model.python: {target[:100]!r} is not a target; write it like 'package.module:build'")
    where = f"model.python: {target!r}"
    directory = (directory or Path.cwd()).resolve()
    with _importable(directory, package.partition(".")[0]):
        build = _attribute(_import(package, where, directory), attribute, where)
        if not callable(build):
            raise InputError(
                f"{where} is a {type(build).__name__}; it must be a function or class that returns an nn.Module"
            )
        try:
            with warnings.catch_warnings():  # torch.nn.TransformerEncoder copies its layers, which fake tensors allow
                warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
                module = build(**dict(arguments or {}))
        except (Exception, SystemExit) as error:
            raise InputError(f"{where} raised {_one_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise InputError(f"{where} returned a {type(module).__name__}; it must return an nn.Module")
    return module


def _import(package: str, where: str, directory: Path) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is not None and (package == error.name or package.startswith(error.name + ".")):
            raise InputError(f"{where}: no module {error.name!r} in {directory} or among the installed ones") from None
        raise InputError(f"{where}: importing {package} raised {_one_line(error)}") from error
    except (Exception, SystemExit) as error:
        raise InputError(f"{where}: importing {package} raised {_one_line(error)}") from error


def _attribute(module: Any, attribute: str, where: str) -> Any:
    found = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [name for name, value in vars(found).items() if callable(value) and not name.startswith("_")]
            raise InputError(
                f"{where}: there is no {part!r} in it; it has {', '.join(public[:8]) or 'nothing callable'}"
            )
        found = getattr(found, part)
    return found


@contextmanager
def _importable(directory: Path, top: str) -> Iterator[None]:
    """`directory` leads sys.path while inside; modules found there, and a shadowed `top`, are put back as they were."""
    ours = (directory / top).is_dir() or (directory / f"{top}.py").is_file()
    shadowed = {name: sys.modules.pop(name) for name in list(sys.modules) if ours and name.partition(".")[0] == top}
    before = set(sys.modules)
    sys.path.insert(0, str(directory))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if str(directory) in sys.path:
            sys.path.remove(str(directory))
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if (ours and name.partition(".")[0] == top) or (file and _in_source_tree(Path(file), directory)):
                del sys.modules[name]
        sys.modules.update(shadowed)


def _in_source_tree(file: Path, directory: Path) -> bool:
    """Whether `file` is the user's own, not a library of an environment that happens to lie below `directory`."""
    return file.is_relative_to(directory) and "site-packages" not in file.parts


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
