"""A whole installation in a folder: real Valkey, real service, real worker, real reward service,
each its own process.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fakes import hostile_manners
from fakes.installation import BrokerLog, Installation, eventually, spilled
from fakes.reward_server import RewardServer, ScoreRequest


@pytest.fixture(scope="session")
def installation(
    tmp_path_factory: pytest.TempPathFactory,
    free_port: Callable[[], int],
    reviews_base: Path,
    end_of_folder: Callable[[Path], contextlib.ExitStack],
) -> Installation:
    """Everything started, with a base model called ``base``."""
    running = Installation(tmp_path_factory.mktemp("home"), free_port)
    end_of_folder(Path(__file__).parent).callback(running.stop)
    running.install_model(reviews_base)
    running.start_broker()
    running.start_service()
    running.start_reward_service()
    running.start_worker()
    return running


@pytest.fixture(scope="session")
def until() -> Callable[[Callable[[], Any], float, str], Any]:
    """`eventually`, for tests."""
    return eventually


@pytest.fixture
def broker_log(installation: Installation) -> Iterator[BrokerLog]:
    """What goes through the broker."""
    log = BrokerLog(installation.valkey_port)
    yield log
    log.close()


@pytest.fixture
def hostile_server() -> Iterator[RewardServer]:
    """A reward service that misbehaves, each path in its own way."""
    with hostile_manners.hostile_server() as running:
        yield running


Answer = Callable[[Mapping[str, str], bytes], tuple[int, Any]]
"""From headers (lower case) and body of a POST to a status and what is sent as JSON."""


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], str]]:
    """Starts reward services that answer as a function says; gives their URL."""
    with contextlib.ExitStack() as stack:

        def start(answer: Answer) -> str:
            def behave(request: ScoreRequest) -> None:
                status, content = answer(request.headers, request.body)
                request.json(content, status)

            return stack.enter_context(RewardServer(behave)).url

        yield start


@pytest.fixture(scope="session")
def find_secrets() -> Callable[[bytes, Sequence[str]], list[bytes]]:
    """`spilled`, for tests."""
    return spilled
