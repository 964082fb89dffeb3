"""A whole installation made of real processes.

Only the training is scripted (`scripted_trainer.py`).
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from dar.protocol.worker import Lease
from dar.rewards.server import reward_server
from dar.settings import Settings
from fakes import loopback
from fakes.scripted_installation import ScriptedInstallation, Valkey, free_port
from worker.api import WorkerClient
from worker.folders import SlotFolder
from worker.models.fetching import ModelFetcher
from worker.supervisor.inputs import InputFetcher, LocalInputs
from worker.supervisor.state import AttemptState
from worker.supervisor.supervisor import Supervisor

SPEC = {
    "model": "tiny",
    "training_file": "file-1",
    "method": {
        "type": "dar",
        "dar": {"rewards": {"components": [{"name": "r", "url": "http://127.0.0.1:1/score"}]}},
    },
}
LEASE = {
    "lease_id": "lease-1",
    "job_id": "ftjob-1",
    "attempt": 1,
    "token": "token",
    "ttl_seconds": 60.0,
    "spec": SPEC,
    "seed": 7,
    "total_steps": 4,
    "model": {"kind": "folder", "name": "tiny", "checkpoint_id": None, "adapter_ids": []},
    "resume_checkpoint_id": None,
    "reward_secret": None,
}


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


@pytest.fixture
def fetch() -> Iterator[Callable[..., LocalInputs]]:
    """Fetches the inputs of an attempt on a host with a folder of models and an empty cache."""
    with ExitStack() as held:

        def run(
            state: AttemptState,
            client: WorkerClient,
            models: Path,
            note: Callable[[str], None] = lambda _: None,
            **changes: Any,
        ) -> LocalInputs:
            work = state.folder.path.parent
            given = {"models_dir": models, "work_dir": work, "is_offline": True}
            settings = Settings(**(given | changes))
            fetcher = ModelFetcher(
                state.lease,
                client,
                settings,
                state.folder.inputs,
                state.must_stop,
                note,
                held,
            )
            return InputFetcher(state, client, fetcher).fetch()

        yield run


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    """Of an attempt that has a folder, but no trainer and no service."""
    settings = Settings(
        home=tmp_path, base_url="http://127.0.0.1:9", drain_seconds=0.1, stall_seconds=60.0
    )
    lease = Lease.model_validate(LEASE)
    made = Supervisor(settings, lease, SlotFolder.of(tmp_path, "0"), threading.Event())
    made._folder.create(made._record)
    yield made
    made._state.over.set()
    made._client.close()
