"""Fixtures that several concerns share."""

import gc
import logging
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path, PurePosixPath

import pytest
from filelock import FileLock
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from dar.settings import load_settings
from fakes.smollm2 import smollm2_folder

LONGEST_FIRST = ("e2e", "parallel", "demo", "worker", "cli", "store", "api")
"""Slow folders, slowest first: their tests start before all others."""
TOGETHER = ("e2e", "worker", "store", "client")
"""Folders whose tests share an expensive fixture: an installation, a PostgreSQL or a service."""
_ENDS: defaultdict[Path, ExitStack] = defaultdict(ExitStack)


class ByFile(LoadScopeScheduling):
    """Run all tests of a file in one test process.

    The folders in `TOGETHER` run in one process as a whole, because their tests share a fixture.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = PurePosixPath(nodeid.partition("::")[0])
        return str(file.parent if file.parent.name in TOGETHER else file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        folders = item.path.relative_to(Path(__file__).parent).parts
        places = [LONGEST_FIRST.index(name) for name in folders if name in LONGEST_FIRST]
        return min(places, default=len(LONGEST_FIRST))

    items.sort(key=place)


def pytest_collection() -> None:
    """Switch the garbage collector off during imports.

    Imports leave no garbage, and collections would take a quarter of their time.
    """
    gc.disable()


def pytest_collection_finish() -> None:
    """Switch the garbage collector on again for the tests.

    What the imports have made stays, so that no collection visits it.
    """
    gc.freeze()
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End what the tests of a folder share after the last one of them."""
    folder = item.path.parent
    if nextitem is None or nextitem.path.parent != folder:
        _ENDS.pop(folder, ExitStack()).close()


@pytest.fixture(scope="session")
def end_of_folder() -> Callable[[Path], ExitStack]:
    """For a folder: what is to be closed after its last test.

    Processes that wait would use the processor until the end of the run.
    """
    return _ENDS.__getitem__


@pytest.fixture(autouse=True, scope="module")
def _garbage_of_this_module_alone() -> None:
    """Exclude the objects that exist before this module from garbage collection.

    A training run collects garbage several times, and each collection visits every other object.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _logs_of_this_test_alone() -> None:
    """Remove the log handlers that libraries have added to the root logger.

    A library that calls `logging.basicConfig` on import binds the captured output of the test that
    imports it. Later tests would log into a closed stream.
    """
    root = logging.getLogger()
    for handler in [one for one in root.handlers if type(one) is logging.StreamHandler]:
        root.removeHandler(handler)
    root.setLevel(logging.WARNING)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all test processes of this run share, for expensive files."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session")
def reviews_base(shared_folder: Path) -> Path:
    """``model/`` and ``prompts.jsonl`` of the demo.

    After its 12 steps the model writes letters of its language, but no words.
    """
    folder = shared_folder / "reviews-base"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            command = [sys.executable, "-m", "dar.training.demo", "base", "--steps", "12"]
            subprocess.run(
                [*command, "--folder", str(folder)], check=True, stdout=subprocess.DEVNULL
            )
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct; made before the first time, then kept."""
    return smollm2_folder(load_settings().cache_home / "dar" / "tests")


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """A function that returns an unused TCP port on 127.0.0.1."""

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
            return port

    return find


@pytest.fixture
def black_hole() -> Iterator[str]:
    """The URL of a listener with a full queue; like a firewall, it drops new connections."""
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for filler in (first, second):
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        yield f"http://127.0.0.1:{full.getsockname()[1]}/"
