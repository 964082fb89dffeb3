"""The upgrade that docs/operations.md describes: first the service, then its workers.

The version before is the commit before, with all that its worker and its trainers load.
``CONTINUITY_BEFORE`` names another commit.
"""

import io
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from dar.settings import environment
from fakes.scripted_installation import ScriptedInstallation

ROOT = Path(__file__).parents[2]
BEFORE = environment().get("CONTINUITY_BEFORE") or "HEAD~1"
PARTS = ("dar", "service", "worker", "migrations", "tests/worker", "tests/fakes")


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code of the version before."""
    command = ["git", "-C", str(ROOT), "archive", BEFORE, *PARTS]
    try:
        packed = subprocess.run(command, check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"git has no commit {BEFORE} here, as in a copy without history")
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def installation(tmp_path: Path) -> Iterator[ScriptedInstallation]:
    made = ScriptedInstallation(tmp_path / "home")
    with ExitStack() as stack:
        stack.callback(made.close)
        yield made


@pytest.mark.slow  # a service and workers of two versions
def test_a_worker_of_the_version_before_goes_on_under_a_new_service_until_it_is_replaced(
    installation: ScriptedInstallation, before: Path
) -> None:
    own = installation
    own.tree = before
    own.start_service()
    old = own.start_worker()
    upgraded = own.submit(steps=400, every=20, seconds=0.02)
    own.wait_step(upgraded, 3)
    assert own.service is not None
    own.service.terminate()
    own.service.wait(20)

    own.tree = None
    own.start_service()
    done = len(own.steps(upgraded))
    own.wait_step(upgraded, done + 5)
    assert own.job(upgraded)["attempt"] == 1, "the upgrade ends no attempt"
    own.ask(upgraded, "pause")
    own.wait(upgraded, "paused")

    ended = own.submit(steps=4)
    assert own.wait(ended, "succeeded", "failed")["attempt"] == 1
    crashed = own.submit(steps=4, crash_at=3)
    assert own.wait(crashed, "succeeded", "failed")["attempt"] == 2
    cancelled, stopped = (own.submit(steps=500, every=50, seconds=0.02) for _ in range(2))
    own.wait_step(cancelled, 1)
    own.cancel(cancelled)
    own.wait(cancelled, "cancelled")
    own.wait_step(stopped, 1)
    own.ask(stopped, "stop")
    own.wait(stopped, "succeeded")
    own.ask(upgraded, "resume")
    own.until(lambda: own.job(upgraded)["attempt"] == 2)
    own.until(own.trainers)
    assert own.stop_worker(old) < 15
    assert own.job(upgraded)["status"] == "queued"

    own.start_worker()
    assert own.wait(upgraded, "succeeded", "failed", seconds=60)["attempt"] == 3
    for job_id in (upgraded, ended, crashed):
        assert own.is_undisturbed(job_id)
        assert own.row_problems(job_id) == []
    assert own.findings() == []
