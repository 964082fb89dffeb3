"""A trainer's notes about reward requests: its supervisor's bridge makes few calls of them, and the
service loses none.
"""

import os
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from dar.protocol.worker import (
    AnnounceRewardRequests,
    Lease,
    NoteRewardProgress,
    RewardAnnouncement,
    RewardProgressNoted,
    RewardRequestStates,
)
from fakes.live_service import Live
from service.store.tables import RewardRequestRow
from worker.api import WorkerClient
from worker.folders import AttemptFolder
from worker.launch import RewardNews, RewardNote
from worker.supervisor.reward_bridge import RewardBridge
from worker.supervisor.state import AttemptState


class CountingClient(WorkerClient):
    """Remembers how many requests each call was about."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.calls: list[tuple[str, int]] = []

    def announce_rewards(
        self, lease_id: str, announced: AnnounceRewardRequests
    ) -> RewardRequestStates:
        self.calls.append(("announce", len(announced.requests)))
        return super().announce_rewards(lease_id, announced)

    def note_rewards(self, lease_id: str, progress: NoteRewardProgress) -> RewardProgressNoted:
        self.calls.append(("note", len(progress.requests)))
        return super().note_rewards(lease_id, progress)


Carry = Callable[[Sequence[RewardNote]], tuple[list[tuple[str, int]], list[RewardNews]]]


@pytest.fixture
def carry(live: Live, tmp_path: Path) -> Carry:
    """Have a bridge carry notes that lie in the pipe together; gives its calls and its news."""
    _, held = live.running()
    lease = Lease.model_validate(held.body)
    state = AttemptState(lease, AttemptFolder(tmp_path / "attempt"), threading.Event())

    def run(notes: Sequence[RewardNote]) -> tuple[list[tuple[str, int]], list[RewardNews]]:
        news: list[RewardNews] = []
        client = CountingClient(live.url, lease.token, node="n1")
        read_end, write_end = os.pipe()
        os.write(write_end, "".join(f"{note.model_dump_json()}\n" for note in notes).encode())
        os.close(write_end)
        RewardBridge(state, client, news.append).run(read_end)
        return client.calls, news

    return run


def announced(
    name: str, *, ago: float = 0.0, seconds: float = 60.0, token: str = "a"
) -> RewardNote:
    said_at = datetime.now(UTC) - timedelta(seconds=ago)
    wanted = RewardAnnouncement(
        request_id=name,
        component="letters",
        step=1,
        sample_ids=["s0"],
        token_sha256=token * 64,
        deadline=said_at.timestamp() + seconds,
    )
    return RewardNote(request_id=name, announcement=wanted, said_at=said_at)


def closed(name: str) -> RewardNote:
    return RewardNote(request_id=name, state="closed")


def accepted(name: str) -> RewardNote:
    return RewardNote(request_id=name, state="accepted", poll_url=f"/results/{name}")


def stored(live: Live, name: str) -> tuple[str, bool]:
    with live.runtime.database.read() as transaction:
        row = transaction.get_one(RewardRequestRow, name)
        return row.state, row.is_accepted


def test_notes_go_in_few_calls_and_announcements_before_what_became_of_others(
    live: Live, carry: Carry
) -> None:
    old = [f"rwq_{number}" for number in range(70)]
    calls, news = carry([announced(name) for name in old])
    assert calls == [("announce", 64), ("announce", 6)]
    assert [one.request_id for one in news] == old
    mixed = [note for name in old for note in (closed(name), announced(f"{name}_next"))]
    calls, news = carry(mixed)
    assert calls == [("announce", 63), ("note", 64), ("announce", 7), ("note", 6)]
    assert {stored(live, name) for name in old} == {("closed", False)}
    assert len(news) == 70


def test_what_concerns_one_request_stays_in_its_order(live: Live, carry: Carry) -> None:
    calls, news = carry(
        [
            announced("rwq_1"),
            accepted("rwq_1"),
            closed("rwq_1"),
            announced("rwq_2"),
            closed("rwq_2"),
        ]
    )
    assert calls == [("announce", 2), ("note", 3)]
    assert stored(live, "rwq_1") == ("closed", True)
    calls, news = carry([accepted("rwq_2"), announced("rwq_2", token="b")])
    assert calls == [("note", 1), ("announce", 1)]
    assert stored(live, "rwq_2") == ("waiting", True)
    assert news[0].state is not None
    assert news[0].state.is_accepted


def test_a_request_that_nobody_knows_holds_up_no_other(live: Live, carry: Carry) -> None:
    carry([announced("rwq_1"), announced("rwq_2")])
    carry([closed("rwq_1"), closed("rwq_none"), closed("rwq_2")])
    assert stored(live, "rwq_1") == stored(live, "rwq_2") == ("closed", False)


def test_an_announcement_that_was_long_on_its_way_has_all_its_time_left(carry: Carry) -> None:
    _, [news] = carry([announced("rwq_1", ago=1000.0, seconds=600.0)])
    assert news.state is not None
    assert news.state.deadline > datetime.now(UTC).timestamp() + 300


def test_the_service_takes_many_notes_in_their_order_and_names_unknown_requests(live: Live) -> None:
    _, lease = live.running()
    wanted = [announced(name).announcement for name in ("rwq_1", "rwq_2")]
    requests = [one.model_dump(mode="json") for one in wanted if one is not None]
    assert lease.post("/reward_requests", requests=requests).status_code == 200
    said = [("rwq_x", "closed"), ("rwq_1", "accepted"), ("rwq_2", "closed"), ("rwq_x", "closed")]
    notes = [{"request_id": name, "state": state} for name, state in said]
    answer = lease.post("/reward_requests/progress", requests=notes)
    assert (answer.status_code, answer.json()) == (200, {"unknown": ["rwq_x"]})
    assert (stored(live, "rwq_1"), stored(live, "rwq_2")) == (("waiting", True), ("closed", False))
    for refused in ([], notes[1:2] * 65):
        assert lease.post("/reward_requests/progress", requests=refused).status_code == 400


def test_one_job_cannot_take_over_the_request_of_another(
    live: Live, error_of: Callable[..., Any]
) -> None:
    _, lease = live.running()
    wanted = announced("rwq_1").announcement
    assert wanted is not None
    requests = [wanted.model_dump(mode="json")]
    assert lease.post("/reward_requests", requests=requests).status_code == 200
    live.submit()
    other = live.claim(slot="1")
    answer = other.post("/reward_requests", requests=requests)
    assert (answer.status_code, error_of(answer)["param"]) == (400, "request_id")
    notes = [{"request_id": "rwq_1", "state": "closed"}]
    noted = other.post("/reward_requests/progress", requests=notes)
    assert noted.json() == {"unknown": ["rwq_1"]}
    assert stored(live, "rwq_1") == ("waiting", False)
