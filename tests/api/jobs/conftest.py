"""The SDK, connected to the live service."""

from collections.abc import Iterator

import pytest

from dar.client import Client
from fakes.live_service import Live


@pytest.fixture
def sdk(live: Live) -> Iterator[Client]:
    with Client(live.key("api_key"), live.url) as client:
        yield client
