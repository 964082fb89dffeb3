"""The supervisor's end of later rewards: it announces a trainer's reward requests to the service, and hands results on."""

import os
from collections.abc import Callable

import structlog

from dar.errors import NotFoundError
from dar.protocol.worker import (
    AnnounceRewardRequests,
    Directive,
    RewardAnnouncement,
    RewardProgress,
)
from worker.api import MissingError, WorkerClient
from worker.launch import RewardNews, RewardNote
from worker.state import AttemptState

log = structlog.get_logger(__name__)

READ_BYTES = 64 * 1024
MOST_AT_ONCE = 64
"""Announcements in one call; all that lie in the pipe go together."""


class RewardBridge:
    """Carries a trainer's notes to the service; `run` is the body of its thread.

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
        waiting: list[RewardAnnouncement] = []
        for note in notes:
            if note.announcement is not None:
                waiting.append(note.announcement)
                if len(waiting) == MOST_AT_ONCE:
                    self._announce(waiting)
                    waiting = []
                continue
            # In their order: a request may be announced again after it was closed.
            self._announce(waiting)
            waiting = []
            self._note(note)
        self._announce(waiting)

    def _announce(self, requests: list[RewardAnnouncement]) -> None:
        if not requests:
            return
        lease = self._state.lease
        body = AnnounceRewardRequests(attempt=lease.attempt, requests=requests)
        answer = self._client.persist(
            lambda: self._client.announce_rewards(lease.lease_id, body),
            "announcement",
            longest=2.0,
        )
        for state in answer.requests:
            self._tell(RewardNews(request_id=state.request_id, state=state))

    def _note(self, note: RewardNote) -> None:
        assert note.state is not None
        lease = self._state.lease
        said = RewardProgress(attempt=lease.attempt, state=note.state, poll_url=note.poll_url)
        try:
            self._client.persist(
                lambda: self._client.note_reward(lease.lease_id, note.request_id, said),
                "reward progress",
                longest=2.0,
            )
        except (MissingError, NotFoundError) as error:
            log.warning("reward request unknown", request=note.request_id, error=error.message)
