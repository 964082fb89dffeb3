"""The supervisor's end of later rewards: it announces a trainer's reward requests to the service, and hands results on."""

import os
from collections.abc import Callable
from datetime import UTC, datetime

import structlog

from dar.protocol.worker import (
    MOST_REWARD_REQUESTS,
    AnnounceRewardRequests,
    Directive,
    NoteRewardProgress,
    RewardAnnouncement,
    RewardProgress,
    RewardRequestStates,
)
from worker.api import WorkerClient
from worker.launch import RewardNews, RewardNote
from worker.supervisor.state import AttemptState

log = structlog.get_logger(__name__)

READ_BYTES = 64 * 1024


class RewardBridge:
    """Carries a trainer's notes to the service, all that lie in the pipe together; `run` is the body of its thread.

    Args:
        tell: Passes news on to the trainer; must not block.
    """

    def __init__(
        self, state: AttemptState, client: WorkerClient, tell: Callable[[RewardNews], None]
    ) -> None:
        self._state = state
        self._client = client
        self._tell = tell

    def run(self, descriptor: int) -> None:
        """Read notes from the pipe until the trainer has ended, then close it.

        Args:
            descriptor: Read end of the pipe.
        """
        rest = b""
        with os.fdopen(descriptor, "rb", buffering=0) as pipe, self._client:
            while chunk := pipe.read(READ_BYTES):
                *lines, rest = (rest + chunk).split(b"\n")
                self._pass_on([RewardNote.model_validate_json(line) for line in lines])

    def take(self, directive: Directive) -> None:
        """Hand a result on to the trainer."""
        assert directive.request_id is not None
        self._tell(RewardNews(request_id=directive.request_id, result=directive.result))

    def _pass_on(self, notes: list[RewardNote]) -> None:
        announced: list[RewardNote] = []
        said: list[RewardProgress] = []
        for note in notes:
            if note.state is not None:
                said.append(
                    RewardProgress(
                        request_id=note.request_id, state=note.state, poll_url=note.poll_url
                    )
                )
            else:
                # What was said of a request before it is announced again is no news about the second announcement.
                if any(one.request_id == note.request_id for one in said):
                    self._send(announced, said)
                announced.append(note)
            if max(len(announced), len(said)) == MOST_REWARD_REQUESTS:
                self._send(announced, said)
        self._send(announced, said)

    def _send(self, announced: list[RewardNote], said: list[RewardProgress]) -> None:
        """Tell the service, and empty both lists. A trainer waits for its announcements, so they go first."""
        if announced:
            self._announce(announced)
        if said:
            self._note(said)
        announced.clear()
        said.clear()

    def _announce(self, notes: list[RewardNote]) -> None:
        lease = self._state.lease

        def announce() -> RewardRequestStates:
            requests = [_as_of_now(note) for note in notes]
            body = AnnounceRewardRequests(attempt=lease.attempt, requests=requests)
            return self._client.announce_rewards(lease.lease_id, body)

        answer = self._client.persist(announce, "announcement", longest=2.0)
        for state in answer.requests:
            self._tell(RewardNews(request_id=state.request_id, state=state))

    def _note(self, said: list[RewardProgress]) -> None:
        lease = self._state.lease
        body = NoteRewardProgress(attempt=lease.attempt, requests=said)
        noted = self._client.persist(
            lambda: self._client.note_rewards(lease.lease_id, body), "reward progress", longest=2.0
        )
        if noted.unknown:
            log.warning("reward requests unknown", requests=noted.unknown)


def _as_of_now(note: RewardNote) -> RewardAnnouncement:
    """The announcement with its deadline put off by what passed since it was made: a service that is away costs no time."""
    assert note.announcement is not None
    now = datetime.now(UTC)
    late = now - (note.said_at or now)
    deadline = note.announcement.deadline + max(0.0, late.total_seconds())
    return note.announcement.model_copy(update={"deadline": deadline})
