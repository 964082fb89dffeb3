"""Random histories of messages and crashes leave what the model has: `fakes.histories`."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fakes.histories.job_machine import explore
from fakes.world import FakeClock
from service.store import fence, outcomes, poison
from service.store.database import Database

OpenDatabase = Callable[[FakeClock], Any]


@pytest.fixture
def open_database(dialect: str, request: pytest.FixtureRequest) -> OpenDatabase:
    """Opens a migrated database without any row, as often as it is called."""

    @contextmanager
    def sqlite(clock: FakeClock) -> Iterator[Database]:
        with tempfile.TemporaryDirectory(prefix="dar-jobs-") as folder:
            path = Path(folder, "dar.db")
            shutil.copy(request.getfixturevalue("sqlite_template"), path)
            opened = Database(f"sqlite:///{path}", clock=clock)
            try:
                yield opened
            finally:
                opened.close()

    @contextmanager
    def postgresql(clock: FakeClock) -> Iterator[Database]:
        server = request.getfixturevalue("postgres")
        name = request.getfixturevalue("postgres_database")
        opened = Database(server.url(name), clock=clock)
        try:
            yield opened
        finally:
            opened.close()
            server.empty(name)

    return sqlite if dialect == "sqlite" else postgresql


def test_a_few_histories_of_messages_and_crashes_leave_what_the_model_has(
    open_database: OpenDatabase,
) -> None:
    explore(open_database, 3, 20, is_random=False)


@pytest.mark.slow  # 30 histories of 50 messages
@pytest.mark.timeout(600)
def test_many_histories_of_messages_and_crashes_leave_what_the_model_has(
    open_database: OpenDatabase,
) -> None:
    explore(open_database, 30, 50, is_random=True)


def no_fence(_held: fence.Held, _number: int) -> None:
    """Lets every attempt write."""


MISTAKES = {
    "the fence is off": (fence, "check_fence", no_fence),
    "the fence of ends is off": (outcomes, "check_fence", no_fence),
    "a job is given up one failure too late": (poison, "MAX_OWN_FAILURES", 4),
}


@pytest.mark.slow  # each mistake takes up to 40 histories
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dialect", ["sqlite"], indirect=True)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_the_store_is_found(
    open_database: OpenDatabase, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    monkeypatch.setattr(*MISTAKES[mistake])
    with pytest.raises(AssertionError):
        explore(open_database, 40, 50, is_random=False, is_shortened=False)
