"""A whole installation made of real processes.

Only the training is scripted (`scripted_trainer.py`).
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

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
