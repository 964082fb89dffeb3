"""Rows of random histories: no processes, but every order of messages: `fakes.histories`."""

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import structlog

from chaos.scoreboard import Result, Row
from chaos.stack import DIALECTS, Dialect
from dar.settings import Settings
from fakes.histories.job_machine import explore
from fakes.postgres import Postgres
from fakes.world import FakeClock
from service import migrate
from service.store.database import Database

HISTORIES, MESSAGES = 300, 50


@contextmanager
def _copies(folder: Path, clock: FakeClock) -> Iterator[Database]:
    """A copy of the migrated SQLite database in ``folder``."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        path = Path(own, "dar.db")
        shutil.copy(folder / "dar.db", path)
        opened = Database(f"sqlite:///{path}", clock=clock)
        try:
            yield opened
        finally:
            opened.close()


@contextmanager
def _emptied(server: Postgres, name: str, clock: FakeClock) -> Iterator[Database]:
    """A migrated PostgreSQL database, which is emptied afterwards."""
    opened = Database(server.url(name), clock=clock)
    try:
        yield opened
    finally:
        opened.close()
        server.empty(name)


def run_histories(
    dialect: Dialect, *, histories: int = HISTORIES, messages: int = MESSAGES
) -> Result:
    """Let random messages arrive, and compare what comes of it with a model after each."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    problems: list[str] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dar-chaos-")))
        folder.chmod(0o755)
        url = None
        if dialect == "postgresql":
            server = Postgres(folder)
            stack.callback(server.stop)
            server.wait()
            name = server.create()
            url, opening = server.url(name), partial(_emptied, server, name)
        else:
            opening = partial(_copies, folder)
        settings = Settings(home=folder / "home")
        database = Database(url or f"sqlite:///{folder / 'dar.db'}")
        migrate.upgrade(settings, database)
        database.close()
        try:
            explore(opening, histories, messages, is_random=True)
        except AssertionError as error:
            problems.append("\n".join([str(error), *getattr(error, "__notes__", ())]))
    figures = {"histories": histories, "messages each, at most": messages}
    return Result(not problems, figures, problems)


def rows() -> list[Row]:
    """One row for each database."""
    return [
        Row(
            f"histories-{dialect}",
            f"{HISTORIES} random histories of messages, losses, repeats, crashes and clocks, {dialect}",
            "after each message the service has what a model of it has, and every job can end",
            partial(run_histories, dialect),
        )
        for dialect in DIALECTS
    ]
