"""Fixtures that several concerns share."""

import gc
import logging
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest
from filelock import FileLock
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

LONGEST_FIRST = ("e2e", "parallel", "demo", "worker", "cli", "store", "api")
"""Folders that take longest come first: their tests must not be the last to start."""
TOGETHER = ("e2e", "store", "client")
"""Folders whose tests share what is expensive to start: an installation, a PostgreSQL, a
service."""


class ByFile(LoadScopeScheduling):
    """Gives whole files to one test process, and whole folders where their tests share
    processes.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = PurePosixPath(nodeid.partition("::")[0])
        return str(file.parent if file.parent.name in TOGETHER else file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        folder = item.path.parent.name
        return LONGEST_FIRST.index(folder) if folder in LONGEST_FIRST else len(LONGEST_FIRST)

    items.sort(key=place)


def pytest_collection() -> None:
    """Collect no garbage while modules are imported: there is none, and it takes a quarter of the
    time.
    """
    gc.disable()


def pytest_collection_finish() -> None:
    """From now on there is some."""
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def _garbage_of_this_module_alone() -> None:
    """Keep from collectors what is there already, and stays: every training run looks through all
    the rest more than once.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _logs_of_this_test_alone() -> None:
    """Libraries call `logging.basicConfig` when they are imported, with the captured stream of
    whichever test did that.
    """
    root = logging.getLogger()
    for handler in [one for one in root.handlers if type(one) is logging.StreamHandler]:
        root.removeHandler(handler)
    root.setLevel(logging.WARNING)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all test processes of this run share, for what is dear to make."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session")
def reviews_base(shared_folder: Path) -> Path:
    """``model/`` and ``prompts.jsonl`` of the demo, after so few steps that it babbles in letters
    of its language.
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
def free_port() -> Callable[[], int]:
    """Gives TCP ports on 127.0.0.1 that nobody listens on."""

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
            return port

    return find


@pytest.fixture
def black_hole() -> Iterator[str]:
    """URL of a listener whose queue is full: like a firewall, it drops what arrives."""
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for filler in (first, second):
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        yield f"http://127.0.0.1:{full.getsockname()[1]}/"
