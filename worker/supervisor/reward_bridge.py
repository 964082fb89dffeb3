"""Asynchronous rewards in the supervisor: announces requests to the service, forwards results."""

import contextlib
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
    """Sends a trainer's notes to the service, in batches; `run` is the body of its thread.

    Args:
        send_news: Sends news to the trainer; must not block.
    """

    def __init__(
        self, state: AttemptState, client: WorkerClient, send_news: Callable[[RewardNews], None]
    ) -> None:
        self._state = state
        self._client = client
        self._send_news = send_news

    def run(self, descriptor: int) -> None:
        """Read notes from the pipe until the trainer has ended, then close it.

        Args:
            descriptor: Read end of the pipe.
        """
        rest = b""
        client = contextlib.closing(self._client)
        with os.fdopen(descriptor, "rb", buffering=0) as pipe, client:
            while chunk := pipe.read(READ_BYTES):
                *lines, rest = (rest + chunk).split(b"\n")
                self._pass_on([RewardNote.model_validate_json(line) for line in lines])

    def take(self, directive: Directive) -> None:
        """Forward a result to the trainer."""
        assert directive.request_id is not None
        self._send_news(RewardNews(request_id=directive.request_id, result=directive.result))

    def _pass_on(self, notes: list[RewardNote]) -> None:
        announced: list[RewardNote] = []
        progress: list[RewardProgress] = []
        for note in notes:
            if note.state is not None:
                progress.append(
                    RewardProgress(
                        request_id=note.request_id, state=note.state, poll_url=note.poll_url
                    )
                )
            else:
                # A note about an earlier announcement does not apply to the repeated one.
                if any(one.request_id == note.request_id for one in progress):
                    self._send(announced, progress)
                announced.append(note)
            if max(len(announced), len(progress)) == MOST_REWARD_REQUESTS:
                self._send(announced, progress)
        self._send(announced, progress)

    def _send(self, announced: list[RewardNote], progress: list[RewardProgress]) -> None:
        """Send and clear both lists; announcements first, because the trainer waits for them."""
        if announced:
            self._announce(announced)
        if progress:
            self._note(progress)
        announced.clear()
        progress.clear()

    def _announce(self, notes: list[RewardNote]) -> None:
        lease = self._state.lease

        def announce() -> RewardRequestStates:
            requests = [_as_of_now(note) for note in notes]
            body = AnnounceRewardRequests(attempt=lease.attempt, requests=requests)
            return self._client.announce_rewards(lease.lease_id, body)

        answer = self._client.until_answered(announce, "announcement", longest=2.0)
        for state in answer.requests:
            self._send_news(RewardNews(request_id=state.request_id, state=state))

    def _note(self, progress: list[RewardProgress]) -> None:
        lease = self._state.lease
        body = NoteRewardProgress(attempt=lease.attempt, requests=progress)
        noted = self._client.until_answered(
            lambda: self._client.note_rewards(lease.lease_id, body), "reward progress", longest=2.0
        )
        if noted.unknown:
            log.warning("reward requests unknown", requests=noted.unknown)


def _as_of_now(note: RewardNote) -> RewardAnnouncement:
    """The announcement with its deadline extended by the time since it was made.

    So an unreachable service does not shorten the time for the reward.
    """
    assert note.announcement is not None
    now = datetime.now(UTC)
    late = now - (note.said_at or now)
    deadline = note.announcement.deadline + max(0.0, late.total_seconds())
    return note.announcement.model_copy(update={"deadline": deadline})
