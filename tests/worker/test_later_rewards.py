"""How reward requests and their results pass between a trainer and its supervisor."""

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from dar.protocol.spec import JobSpec
from dar.protocol.worker import RewardAnnouncement, RewardRequestState
from dar.rewards.http.async_results import Stored
from worker.attempt.inbox import PipeInbox
from worker.folders import AttemptFolder, AttemptRecord
from worker.launch import Launch, Order, RewardNews
from worker.supervisor.child_process import TrainerProcess, trainer_environment

DEADLINE = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
REPLAYING = """
import json, os, sys
launch = json.loads(sys.stdin.readline())
os.write(launch["outbox"], b'{"request_id": "rwq_1", "state": "closed"}\\n')
for line in sys.stdin:
    print(len(line), flush=True)
    if json.loads(line)["type"] == "cancel":
        break
"""


@pytest.fixture
def pipe() -> Iterator[tuple[PipeInbox, Any]]:
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb") as notes:
        yield PipeInbox(write_end), notes
    os.close(write_end)


def state(request_id: str, **values: Any) -> RewardRequestState:
    known = {
        "request_id": request_id,
        "callback_url": "http://dar.test/cb",
        "deadline": DEADLINE.timestamp(),
        "is_accepted": False,
        "poll_url": None,
        "result": None,
    }
    return RewardRequestState.model_validate(known | values)


async def heard(notes: Any) -> dict[str, Any]:
    return dict(json.loads(await asyncio.to_thread(notes.readline)))


def announcement(
    request_id: str, digit: str = "a", ids: Sequence[str] = ("s0",)
) -> RewardAnnouncement:
    return RewardAnnouncement(
        request_id=request_id,
        component="letters",
        step=3,
        sample_ids=list(ids),
        token_sha256=digit * 64,
        deadline=DEADLINE.timestamp(),
    )


async def announced(inbox: PipeInbox, notes: Any, request_id: str, **values: Any) -> Stored:
    asked = asyncio.create_task(inbox.announce(announcement(request_id, ids=["s0", "s1"])))
    said = await heard(notes)
    assert said["announcement"]["sample_ids"] == ["s0", "s1"]
    assert not asked.done()
    inbox.deliver(RewardNews(request_id=request_id, state=state(request_id, **values)))
    return await asked


async def test_an_announcement_waits_until_the_service_has_it(pipe: Any) -> None:
    inbox, notes = pipe
    assert await announced(inbox, notes, "rwq_1") == Stored("http://dar.test/cb", DEADLINE)
    known = await announced(inbox, notes, "rwq_2", is_accepted=True, poll_url="/r", result="{}")
    assert known == Stored("http://dar.test/cb", DEADLINE, True, "/r", b"{}")


async def test_results_find_those_who_wait_whichever_comes_first(pipe: Any) -> None:
    inbox, notes = pipe
    await announced(inbox, notes, "rwq_1")
    await announced(inbox, notes, "rwq_2")
    inbox.deliver(RewardNews(request_id="rwq_1", result="early"))
    assert await inbox.wait("rwq_1") == b"early"
    waiting = asyncio.create_task(inbox.wait("rwq_2"))
    await asyncio.sleep(0.05)
    news = RewardNews(request_id="rwq_2", result="läte")
    threading.Thread(target=inbox.deliver, args=(news,)).start()
    assert await waiting == "läte".encode()


async def test_what_became_of_a_request_is_said_in_order(pipe: Any) -> None:
    inbox, notes = pipe
    inbox.accepted("rwq_1", "/r")
    inbox.close("rwq_1")
    said = [await heard(notes), await heard(notes)]
    assert [note["state"] for note in said] == ["accepted", "closed"]
    assert said[0]["poll_url"] == "/r"


async def test_nothing_is_kept_of_results_that_nobody_wants(pipe: Any) -> None:
    inbox, notes = pipe
    await announced(inbox, notes, "rwq_1")
    inbox.close("rwq_1")
    inbox.deliver(RewardNews(request_id="rwq_1", result="late"))
    inbox.deliver(RewardNews(request_id="rwq_unknown", result="x"))
    assert inbox._results == {}
    assert inbox._open == set()


async def test_an_announcement_that_was_given_up_is_not_answered_by_its_late_answer(
    pipe: Any,
) -> None:
    inbox, notes = pipe
    given_up = asyncio.create_task(inbox.announce(announcement("rwq_1")))
    await heard(notes)
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    assert (inbox._open, inbox._stored) == (set(), {})
    again = asyncio.create_task(inbox.announce(announcement("rwq_1", "b")))
    await heard(notes)
    inbox.deliver(RewardNews(request_id="rwq_1", state=state("rwq_1", poll_url="/stale")))
    await asyncio.sleep(0.05)
    assert not again.done()
    inbox.deliver(RewardNews(request_id="rwq_1", state=state("rwq_1", poll_url="/new")))
    assert (await again).poll_url == "/new"


async def test_a_late_answer_to_an_announcement_that_was_given_up_is_dropped(pipe: Any) -> None:
    inbox, notes = pipe
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await inbox.announce(announcement("rwq_1"))
    await heard(notes)
    inbox.deliver(RewardNews(request_id="rwq_1", state=state("rwq_1", poll_url="/stale")))
    inbox.deliver(RewardNews(request_id="rwq_1", result="late"))
    assert (inbox._open, inbox._stored, inbox._results) == (set(), {}, {})
    assert (await announced(inbox, notes, "rwq_1", poll_url="/new")).poll_url == "/new"


async def test_a_result_that_comes_after_its_wait_was_cut_off_is_not_kept(pipe: Any) -> None:
    inbox, notes = pipe
    await announced(inbox, notes, "rwq_1")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await inbox.wait("rwq_1")
    inbox.deliver(RewardNews(request_id="rwq_1", result="late"))
    assert (inbox._open, inbox._results) == (set(), {})


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[TrainerProcess]:
    folder = AttemptFolder(tmp_path / "attempt")
    folder.create(AttemptRecord(lease_id="lease-1", job_id="ftjob-1", attempt=1))
    component = {"name": "letters", "url": "http://127.0.0.1:61999/score"}
    dar = {"hyperparameters": {"max_steps": 1}, "rewards": {"components": [component]}}
    method = {"type": "dar", "dar": dar}
    spec = JobSpec.model_validate({"model": "m", "training_file": "file-1", "method": method})
    launch = Launch(
        folder=folder.path,
        job_id="ftjob-1",
        spec=spec,
        seed=1,
        total_steps=1,
        model_folder=None,
        hub_model="m",
        adapters=(),
        training_file=None,
        resume_from=None,
        reward_secret=None,
        threads=1,
    )
    environment = trainer_environment(None, 1, is_offline=True)
    process = TrainerProcess([sys.executable, "-c", REPLAYING], folder, launch, environment)
    yield process
    process.kill()


def test_a_trainer_speaks_on_a_pipe_of_its_own_and_hears_large_results(
    trainer: TrainerProcess,
) -> None:
    with os.fdopen(trainer.notes, "rb") as notes:
        assert json.loads(notes.readline()) == {"request_id": "rwq_1", "state": "closed"}
        trainer.send_news(RewardNews(request_id="rwq_1", result="x" * 8 * 1024**2))
        trainer.order(Order(type="cancel"))
        until = time.monotonic() + 30
        while (ended := trainer.poll()) is None:
            assert time.monotonic() < until
            time.sleep(0.02)
        assert notes.read() == b""  # the pipe ends with the trainer
    assert ended.code == 0
    assert int(ended.log_tail.split()[0]) > 8 * 1024**2


def test_a_trainer_that_does_not_listen_holds_up_nobody(trainer: TrainerProcess) -> None:
    with os.fdopen(trainer.notes, "rb") as notes:
        notes.readline()
        os.kill(trainer.pid, 19)  # SIGSTOP: it reads nothing any more
        started = time.monotonic()
        for _ in range(4):
            trainer.send_news(RewardNews(request_id="rwq_1", result="x" * 1024**2))
        trainer.order(Order(type="cancel"))
        assert trainer.kill().signal_name == "SIGKILL"
        assert time.monotonic() - started < 20
