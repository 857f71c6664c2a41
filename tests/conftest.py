"""What holds for all tests: nothing is fetched, nothing outside a temporary folder is written, threads do not fight."""

import os
import shutil
import tempfile

import hypothesis
import pytest

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("developer", deadline=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "developer")

_cache_of_controller = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment once; the workers of pytest-xdist inherit it and share one cache of traces."""
    if hasattr(config, "workerinput"):
        return
    config.stash[_cache_of_controller] = os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cosim-tests-")
    os.environ["HF_HUB_OFFLINE"] = "1"
    if config.getoption("numprocesses", default=None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the cache."""
    if folder := config.stash.get(_cache_of_controller, None):
        shutil.rmtree(folder, ignore_errors=True)
