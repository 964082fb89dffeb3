"""A whole installation made of real processes.

Only the training is scripted (`scripted_trainer.py`).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from dar.rewards.server import reward_server
from fakes import loopback
from fakes.scripted_installation import ScriptedInstallation, Valkey, free_port


@pytest.fixture
def unused_port() -> Callable[[], int]:
    """Gives ports that nobody listens on."""
    return free_port


@pytest.fixture(scope="session")
def shared(
    tmp_path_factory: pytest.TempPathFactory, end_of_folder: Callable[[Path], ExitStack]
) -> ScriptedInstallation:
    """A service for tests that leave it alone."""
    installation = ScriptedInstallation(tmp_path_factory.mktemp("home"))
    end_of_folder(Path(__file__).parent).callback(installation.close)
    installation.start_service()
    return installation


@pytest.fixture
def installation(shared: ScriptedInstallation) -> Iterator[ScriptedInstallation]:
    """The shared service without workers."""
    yield shared
    for worker in shared.workers:
        if worker.poll() is None:
            worker.kill()
            worker.wait()
    shared.workers.clear()


@pytest.fixture
def reward_url(installation: ScriptedInstallation) -> Iterator[str]:
    """A signed reward service that takes its time."""
    secret = (installation.home / "reward_secret").read_text().strip()

    @reward_server(secret=secret)
    def app(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
        time.sleep(0.1)
        return [text.count("w4") / 8 for text in completions]

    with loopback.serving(app) as url:
        yield f"{url}/score"


@pytest.fixture
def own(tmp_path: Path) -> Iterator[ScriptedInstallation]:
    """An installation of the test's own, not started."""
    installation = ScriptedInstallation(tmp_path)
    with ExitStack() as stack:
        stack.callback(installation.close)
        yield installation


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[Valkey]:
    """A broker, not started."""
    broker = Valkey(tmp_path)
    with ExitStack() as stack:
        stack.callback(broker.stop)
        yield broker
