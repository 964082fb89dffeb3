"""The service on a PostgreSQL that stalls or freezes: every request ends, none is done twice."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from fakes.live_service import Live
from fakes.postgres import Postgres
from service.background import bounded_checks
from service.store import postgresql
from service.store.database import Database, is_outage

PATH = "/v1/fine_tuning/jobs"


@contextlib.contextmanager
def frozen(postgres: Postgres) -> Iterator[None]:
    """While the block runs, PostgreSQL takes connections and bytes, and answers nothing."""
    leader = psutil.Process(postgres.process.pid)
    stopped = [leader]
    try:
        leader.send_signal(signal.SIGSTOP)
        for process in leader.children(recursive=True):
            process.send_signal(signal.SIGSTOP)
            stopped.append(process)
        yield
    finally:
        for process in stopped:
            process.send_signal(signal.SIGCONT)


def test_a_stall_and_a_frozen_database_end_every_request_and_double_no_job(
    serve: Callable[..., Live], postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql, "PING_SECONDS", 0.5)
    monkeypatch.setattr(postgresql, "REPLY_SECONDS", 5.0)
    monkeypatch.setattr(postgresql, "CONNECT_SECONDS", 2)
    monkeypatch.setattr(bounded_checks, "CHECK_SECONDS", 1.0)
    name = postgres.create()
    live = serve(database_url=postgres.url(name))
    spec = live.spec()
    statuses = one_call_in_three_tries(live, postgres.url(name), spec)
    assert statuses == [200] * 3
    assert len(live.http.get(PATH).json()["data"]) == 1

    with frozen(postgres), ThreadPoolExecutor(70) as clients:
        began = time.monotonic()
        calls = [clients.submit(live.http.get, PATH) for _ in range(60)]
        assert live.http.get("/healthz").status_code == 200
        ready = live.http.get("/readyz")
        assert (ready.status_code, ready.json()["checks"]["database"]) == (503, "does not answer")
        assert time.monotonic() - began < 8
        assert {call.result().status_code for call in calls} == {503}
        assert time.monotonic() - began < 20, "more calls than threads, and one at a time tries"
        began = time.monotonic()
        assert live.http.post(PATH, json=spec).status_code == 503
        assert time.monotonic() - began < 5
    until(lambda: live.http.get("/readyz").status_code == 200)
    until(lambda: live.http.get(PATH).status_code == 200)
    assert live.claim() is not None


def one_call_in_three_tries(live: Live, url: str, spec: dict[str, Any]) -> list[int]:
    """Statuses of three tries of one call that all arrive while a lock stalls the database."""
    statuses: list[int] = []

    def post(number: int) -> None:
        headers = {"x-stainless-retry-count": str(number)}
        statuses.append(live.http.post(PATH, json=spec, headers=headers).status_code)

    address = url.replace("+psycopg", "")
    with psycopg.connect(address) as stalling:
        stalling.execute("LOCK TABLE job_events IN ACCESS EXCLUSIVE MODE")
        threads = [threading.Thread(target=post, args=(number,)) for number in (2, 0, 1)]
        for thread in threads:
            thread.start()
            time.sleep(0.2)  # each has got as far as it can
        stalling.rollback()
    for thread in threads:
        thread.join()
    return statuses


def until(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 15
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_server_that_freezes_within_a_transaction_is_given_up(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql, "REPLY_SECONDS", 1.0)
    database = Database(postgres.url(postgres.create()))

    def freeze_within() -> None:
        with database.read() as transaction:
            transaction.execute(text("SELECT 1"))
            with frozen(postgres):
                transaction.execute(text("SELECT 2"))

    with pytest.raises(DBAPIError) as caught:
        freeze_within()
    assert is_outage(caught.value)
    database.ping()
    database.close()
