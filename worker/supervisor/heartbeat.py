"""The two threads that hold a lease: one sends heartbeats, one receives directives."""

import contextlib
import time
from collections.abc import Callable

import structlog
from pydantic import ValidationError

from dar.client.transport import Backoff
from dar.disk import read_if_there
from dar.errors import DARError
from dar.protocol.worker import AttemptProgress, Directive, Heartbeat, ModelInventory
from worker.api import WorkerClient
from worker.folders import SlotFolder
from worker.supervisor.state import LOST, AttemptState, seconds_since_boot

log = structlog.get_logger(__name__)

LOOK_SECONDS = 0.2
"""How often the trainer's progress is read."""
NEWS_SECONDS = 1.0
"""Shortest pause before a heartbeat that a change of phase causes."""


class Heartbeats:
    """Renews a lease until the attempt is over; `run` is the body of its thread.

    A change of phase or message is sent within a second, so that a user sees at once that a job
    waits for rewards.

    Args:
        interval_seconds: Longest pause; at most a quarter of the lease's time to live.
        models: Lists the models of this host, which are sent when they have changed.
    """

    def __init__(
        self,
        state: AttemptState,
        client: WorkerClient,
        interval_seconds: float,
        models: Callable[[], ModelInventory | None] = lambda: None,
    ) -> None:
        self._state = state
        self._models = models
        self._sent_models: ModelInventory | None = None
        self._client = client
        self._interval = min(interval_seconds, state.lease.ttl_seconds / 4)

    def run(self) -> None:
        while not self._state.over.is_set():
            sent = self._send()
            self._await_next(sent)

    def _send(self) -> AttemptProgress:
        """Send one heartbeat, repeated until it succeeds, each time with the newest progress."""
        lease, sent = self._state.lease, [self.progress()]
        slot = SlotFolder(self._state.folder.path.parents[1])

        def beat() -> None:
            slot.mark_alive()
            sent[0] = self.progress()
            models = self._models()
            news = None if models == self._sent_models else models
            heartbeat = Heartbeat(attempt=lease.attempt, progress=sent[0], models=news)
            began = seconds_since_boot()
            self._state.is_service_away = True
            self._client.heartbeat(lease.lease_id, heartbeat)
            self._state.is_service_away = False
            self._state.renewed_at = began
            self._sent_models = models

        self._client.until_answered(beat, "heartbeat", longest=self._interval)
        return sent[0]

    def _await_next(self, sent: AttemptProgress) -> None:
        start = time.monotonic()
        while not self._state.over.wait(LOOK_SECONDS):
            waited = time.monotonic() - start
            if waited >= self._interval:
                return
            if waited >= NEWS_SECONDS:
                now = self.progress()
                if (now.phase, now.message) != (sent.phase, sent.message):
                    return

    def progress(self) -> AttemptProgress:
        """What the attempt does now; if it waits for room in the artifact store, that."""
        found, blocked = self.reported(), self._state.blocked
        if blocked is None:
            return found
        return found.model_copy(update={"phase": "blocked: disk", "message": blocked[:2000]})

    def reported(self) -> AttemptProgress:
        """What the trainer says that it does now."""
        content = read_if_there(self._state.folder.progress)
        if content is None:
            return self._state.first_progress
        try:
            return AttemptProgress.model_validate_json(content)
        except ValidationError as error:
            log.warning("progress cannot be read", error=str(error))
            return self._state.first_progress


class DirectiveListener:
    """Polls the service for directives to an attempt; `run` is the body of its thread.

    Args:
        client: A client of its own, closed at the end. A long poll may outlast the attempt.
        take_result: Called with each result of a reward request.
    """

    def __init__(
        self, state: AttemptState, client: WorkerClient, take_result: Callable[[Directive], None]
    ) -> None:
        self._state = state
        self._client = client
        self._take_result = take_result

    def run(self) -> None:
        """Poll until the attempt is over; after an outage, again within two seconds."""
        with contextlib.closing(self._client):
            self._listen()

    def _listen(self) -> None:
        cursor, backoff = "", Backoff(longest=2.0)
        while not self._state.over.is_set():
            try:
                answer = self._client.directives(self._state.lease.lease_id, cursor)
            except LOST:
                raise
            except DARError as error:
                self._state.over.wait(backoff.next(error.retry_after_seconds))
                continue
            backoff = Backoff(longest=2.0)
            cursor = answer.cursor
            for directive in answer.directives:
                self._obey(directive)

    def _obey(self, directive: Directive) -> None:
        if directive.type == "reward_result":
            self._take_result(directive)
            return
        log.info("directive received", type=directive.type, lease=self._state.lease.lease_id)
        orders = {
            "cancel": self._state.cancel,
            "pause": self._state.pause,
            "drain": self._state.leave,
            "stop": self._state.stop,
        }
        orders[directive.type].set()
