"""Rows that cannot be sent: a spool that is damaged, a service that fails at them each time."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dar.errors import FencedError
from dar.protocol.worker import EventRow, Fail
from fakes.loopback import LoopbackServer, Request
from worker.api import BROKEN_ANSWERS, ServiceBrokenError, WorkerClient
from worker.cleanup import Leftovers
from worker.folders import AttemptFolder, AttemptRecord, SlotFolder
from worker.spool import SpoolDamagedError, SpoolReader, SpoolWriter, encode
from worker.supervisor.sender import SpoolSender

RECORD = AttemptRecord(lease_id="lease-1", job_id="job-1", attempt=1)


class Service:
    """Answers whatever is asked with the statuses it is given, and repeats the last."""

    def __init__(self, *statuses: int) -> None:
        self.calls = 0
        self.answer = b'{"acked_seq": 2}'
        self._statuses = statuses
        self._server = LoopbackServer(self)
        self.url = self._server.url.rstrip("/")
        self.close = self._server.close

    def __call__(self, request: Request) -> None:
        status = self._statuses[min(self.calls, len(self._statuses) - 1)]
        self.calls += 1
        request.answer(self.answer if status == 200 else b"{}", status)


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[Service, Any]]]:
    monkeypatch.setattr("dar.client.transport.FIRST_BACKOFF_SECONDS", 0.001)
    monkeypatch.setattr("worker.api.LONGEST_PAUSE_SECONDS", 0.01)
    over = threading.Event()
    timer = threading.Timer(5.0, over.set)  # an endless wait fails instead
    timer.start()
    made: list[tuple[Service, WorkerClient]] = []

    def connect(*statuses: int) -> tuple[Service, WorkerClient]:
        service = Service(*statuses)
        client = WorkerClient(service.url, "key", node="test", give_up=over.is_set)
        made.append((service, client))
        return service, client

    yield connect
    timer.cancel()
    for service, client in made:
        client.close()
        service.close()


def said(folder: AttemptFolder, *, is_damaged: bool = False) -> AttemptFolder:
    folder.create(RECORD)
    writer = SpoolWriter(folder.spool)
    for _ in range(2):
        writer.append(
            lambda seq, at: EventRow(type="event", seq=seq, at=at, level="info", message="said")
        )
    writer.close()
    if is_damaged:
        with (folder.spool / "000000000001.jsonl").open("ab") as file:
            file.write(b"deadbeef {}\n")
    return folder


def batch(client: WorkerClient) -> object:
    return client.until_answered(lambda: client.batch("lease-1", 1, [b"{}"]), "batch", longest=0.01)


def test_a_call_that_the_service_fails_at_each_time_is_given_up(connect: Any) -> None:
    service, client = connect(500)
    with pytest.raises(ServiceBrokenError, match="HTTP 500"):
        batch(client)
    assert service.calls == BROKEN_ANSWERS


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_service_that_is_away_is_asked_without_limit(connect: Any, status: int) -> None:
    service, client = connect(*[status] * (2 * BROKEN_ANSWERS), 200)
    batch(client)
    assert service.calls == 2 * BROKEN_ANSWERS + 1


def test_only_failures_in_a_row_count(connect: Any) -> None:
    row = [500] * (BROKEN_ANSWERS - 1)
    service, client = connect(*row, 503, *row, 200)
    batch(client)
    assert service.calls == 2 * BROKEN_ANSWERS


def test_a_sender_ends_at_a_damaged_spool_when_all_before_it_is_sent(
    connect: Any, tmp_path: Path
) -> None:
    service, client = connect(200)
    reader = SpoolReader(said(AttemptFolder(tmp_path), is_damaged=True).spool)
    sender = SpoolSender(reader, client, RECORD, lambda _: None, 0.01)
    with pytest.raises(SpoolDamagedError):
        sender.run()
    assert (service.calls, reader.acked) == (1, 2)


def test_a_sender_of_an_attempt_that_lost_its_job_ends_it_and_the_rows_are_sent_later(
    connect: Any, tmp_path: Path
) -> None:
    service, client = connect(200)
    service.answer = b'{"acked_seq": 2, "is_fenced": true}'
    slot = SlotFolder.of(tmp_path, "0")
    attempt = said(slot.attempt("a"))
    reader = SpoolReader(attempt.spool)
    with pytest.raises(FencedError):
        SpoolSender(reader, client, RECORD, lambda _: None, 0.01).run()
    assert reader.acked == 2
    Leftovers(slot, client, lambda: None, 0.01, 2**20).sweep()
    assert slot.all_attempts() == []


@pytest.mark.parametrize(("status", "is_damaged"), [(200, True), (500, False)])
def test_rows_that_cannot_be_sent_are_kept_and_hold_up_no_others(
    connect: Any, tmp_path: Path, status: int, is_damaged: bool
) -> None:
    service, client = connect(status)
    slot = SlotFolder.of(tmp_path, "0")
    kept = said(slot.attempt("a"), is_damaged=is_damaged)
    behind = slot.attempt("b")
    behind.path.mkdir()
    leftovers = Leftovers(slot, client, lambda: None, 0.01, 2**20)
    leftovers.sweep()
    asked = service.calls
    leftovers.sweep()
    assert service.calls == asked, "they are left alone until the next start"
    assert slot.all_attempts() == [kept]
    assert list(kept.spool.glob("*.jsonl"))
    assert not behind.path.exists()


def test_stopping_ends_the_wait_for_a_service_that_is_away(connect: Any, tmp_path: Path) -> None:
    _, client = connect(503)
    slot = SlotFolder.of(tmp_path, "0")
    kept = said(slot.attempt("a"))
    leftovers = Leftovers(slot, client, lambda: None, 0.01, 2**20)
    thread = threading.Thread(target=leftovers.run)
    thread.start()
    leftovers.stop()
    thread.join(3)
    assert not thread.is_alive()
    assert slot.all_attempts() == [kept]


def test_a_message_is_sent_without_nul() -> None:
    fail = Fail(attempt=1, kind="transient", code="c", message=r"a \u0000 and a" + " \0, \\\0")
    sent = Fail.model_validate_json(encode(fail))
    assert (
        sent.message
        == r"a \u0000 and a" + " \N{REPLACEMENT CHARACTER}, \\\N{REPLACEMENT CHARACTER}"
    )
