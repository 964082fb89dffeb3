"""Fixtures that several concerns share."""

import gc
import logging
import os
import socket
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pytest
from execnet import XSpec
from filelock import FileLock
from forked_workers import fork_test_processes
from hypothesis import HealthCheck, settings
from sqlalchemy import Engine, event
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from dar.settings import load_settings
from fakes.smollm2 import smollm2_folder
from service.store import database

if TYPE_CHECKING:
    from fakes.seaweed import SeaweedFS

LONGEST_FIRST = (
    "chaos",
    "e2e",
    "docker",
    "parallel",
    "worker",
    "store",
    "demo",
    "storage",
    "project",
    "cli",
    "client",
)
"""Slow folders, slowest first: their tests start before all others."""
TOGETHER = ("e2e", "worker", "store", "storage", "client", "project")
"""Folders whose tests share something expensive: an installation, a database, a parsed tree."""
RUNNING = {"installation", "shared", "service"}
"""Fixtures of these folders that keep processes running, which poll all the time."""
COMPUTING = ("training", "continuity")
"""Folders whose tests compute. Those of the others wait for sockets and processes."""
_ENDS: defaultdict[Path, ExitStack] = defaultdict(ExitStack)


class ByFile(LoadScopeScheduling):
    """Run all tests of a file in one test process.

    The folders in `TOGETHER` run in one process as a whole, with the folders in them, because their
    tests share a fixture.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = PurePosixPath(nodeid.partition("::")[0])
        return str(next((one for one in file.parents if one.name in TOGETHER), file))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    return ByFile(config, log)


def pytest_xdist_setupnodes(config: pytest.Config, specs: Sequence[XSpec]) -> None:
    """Fork the test processes if all tests run; a part of them may need none of the imports."""
    is_all = [Path(name).resolve() for name in config.args] == [Path(__file__).parent]
    # A fork cannot use a GPU that the process before it has looked at.
    if is_all and sys.platform == "linux" and not Path("/dev/nvidiactl").exists():
        config.add_cleanup(fork_test_processes(specs))


def needs_processes(item: pytest.Item) -> bool:
    """Whether a test uses processes that other tests of its folder use too."""
    names: Sequence[str] = getattr(item, "fixturenames", ())
    return not RUNNING.isdisjoint(names)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with what takes longest; then mix files that compute with files that wait.

    Several files that wait at the same time would leave a core idle. Of a folder, the tests that
    share running processes come first, so that these end early.
    """
    first: dict[int, list[pytest.Item]] = defaultdict(list)
    files: dict[bool, dict[Path, list[pytest.Item]]] = {True: {}, False: {}}
    for item in items:
        folders = item.path.relative_to(Path(__file__).parent).parts
        places = [LONGEST_FIRST.index(name) for name in folders if name in LONGEST_FIRST]
        if places:
            first[min(places)].append(item)
        else:
            files[folders[0] in COMPUTING].setdefault(item.path, []).append(item)
    mixed = sorted(
        (
            ((number + 0.5) / len(group), of_file)
            for group in files.values()
            for number, of_file in enumerate(group.values())
        ),
        key=lambda placed: placed[0],
    )
    for place, group in first.items():
        if LONGEST_FIRST[place] in TOGETHER:
            group.sort(key=lambda item: not needs_processes(item))
    items[:] = [item for place in sorted(first) for item in first[place]]
    items += [item for _, of_file in mixed for item in of_file]


def pytest_configure() -> None:
    """Keep compiled modules, also those of the processes that tests start.

    Tests start some hundred processes, which would compile the product anew each time.
    """
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # noqa: TID251 - Python's own, no setting of ours
    # A busy machine makes the first examples slow, which says nothing about the code.
    patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.register_profile("patient", patient)
    settings.load_profile("patient")


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
    """End what the tests of a folder, and of those in it, share after the last one of them."""
    for folder in item.path.parents:
        if nextitem is None or not nextitem.path.is_relative_to(folder):
            _ENDS.pop(folder, ExitStack()).close()
    if needs_processes(item) and not (nextitem and needs_processes(nextitem)):
        _ENDS.pop(item.path.parent, ExitStack()).close()


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


_COMPILED: dict[str, Engine] = {}
"""Name of a dialect -> the first engine that has connected with it."""


@pytest.fixture(autouse=True, scope="session")
def _statements_compiled_once() -> Iterator[None]:
    """Let the engines of all databases share the statements that one of their kind has compiled.

    Most tests have a database of their own, and compiling takes longer than executing.
    """
    make = database._engine

    def engine_of(url: str) -> Engine:
        engine = make(url)
        name = engine.dialect.name
        first = _COMPILED.get(name)
        if first is None:  # a dialect knows its server only after it has connected
            event.listen(engine, "connect", lambda *_: _COMPILED.setdefault(name, engine))
        else:
            engine.dialect, engine._compiled_cache = first.dialect, first._compiled_cache
        return engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "_engine", engine_of)
        yield


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all test processes of this run share, for expensive files."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator["SeaweedFS"]:
    """A real S3 server of this test process; each test has a prefix of its bucket."""
    from fakes.seaweed import SeaweedFS  # noqa: PLC0415 - importing botocore takes a third of a second

    server = SeaweedFS(tmp_path_factory.mktemp("seaweed"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def reviews_base(shared_folder: Path) -> Path:
    """``model/`` and ``prompts.jsonl`` of the demo.

    After its 12 steps the model writes letters of its language, but no words.
    """
    folder = shared_folder / "reviews-base"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            import torch  # noqa: PLC0415 - at the top it would slow each run of a few tests

            from dar.training.demo.base import train_base  # noqa: PLC0415 - it imports torch

            torch.set_num_threads(1)
            train_base(folder, steps=12, seed=0)
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
