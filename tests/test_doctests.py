"""The examples in docstrings run, and answer what they show."""

import doctest
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

import pytest

import cosim
import hwmodels
import workloads


def with_examples() -> list[str]:
    """Modules whose text has examples; only those are imported."""
    names = [package.__name__ for package in (cosim, hwmodels, workloads)]
    for package in (cosim, hwmodels, workloads):
        names += [found.name for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    root = Path(cosim.__file__).parents[1]
    paths = {name: root.joinpath(*name.split(".")) for name in names}
    files = {name: path / "__init__.py" if path.is_dir() else path.with_suffix(".py") for name, path in paths.items()}
    return [name for name, file in files.items() if file.is_file() and "\n>>> " in file.read_text().replace("    ", "")]


@pytest.mark.parametrize("name", with_examples())
def test_examples_answer_what_they_show(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(name)
    assert isinstance(module, ModuleType)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # what an example writes goes with the test
    ran = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert ran.attempted
    assert not ran.failed


def test_the_front_door_has_examples() -> None:
    assert "cosim" in with_examples()
