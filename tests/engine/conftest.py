"""What is claimed of timelines is claimed of both engines."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", params=["native", "simpy"])
def each_engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Plays the whole module once with each engine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COSIM_ENGINE", request.param)
        yield request.param
