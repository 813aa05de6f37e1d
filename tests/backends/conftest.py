"""What tests of frameworks need around them."""

from collections.abc import Iterator

import pytest

from edgebuild.step import ENVIRONMENT


@pytest.fixture(scope="module")
def as_in_a_worker() -> Iterator[None]:
    """Without these variables openvino-telemetry starts a process for each event, which waits for a network."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield
