"""The in-memory inbox for callbacks of probe requests, which live for seconds in one process."""

import asyncio
import hashlib
import hmac
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from dar.errors import RewardContractError
from dar.protocol.rewards import decode_result
from dar.protocol.worker import RewardAnnouncement
from dar.rewards.http.async_results import Inbox, Stored

InboxOutcome = Literal["refused", "accepted", "duplicate", "conflict", "late", "closed", "invalid"]
"""What `ProbeInbox.receive` did with a callback."""


@dataclass(slots=True)
class _Awaited:
    request: RewardAnnouncement
    ends_at: float
    """Its deadline, on the monotonic clock."""
    loop: asyncio.AbstractEventLoop
    came: asyncio.Event = field(default_factory=asyncio.Event)
    result: bytes | None = None
    is_closed: bool = False
    problem: str | None = None
    """Why the latest callback was not accepted."""
    last: tuple[str, bytes] = field(default=("", b""), repr=False)
    """Token and body of the accepted callback."""


class ProbeInbox:
    """An `Inbox` for one process; callbacks may arrive in any thread.

    Args:
        callback_url: Base URL of callbacks, without a slash at its end.
    """

    def __init__(self, callback_url: str) -> None:
        self._callback_url = callback_url
        self._lock = threading.Lock()
        self._awaited: dict[str, _Awaited] = {}

    async def announce(self, request: RewardAnnouncement) -> Stored:
        """See `Inbox`."""
        deadline = datetime.fromtimestamp(request.deadline, UTC)
        seconds = request.seconds
        if seconds is None:
            seconds = (deadline - datetime.now(UTC)).total_seconds()
        now = time.monotonic()
        awaited = _Awaited(request, now + seconds, asyncio.get_running_loop())
        with self._lock:
            self._awaited = {name: one for name, one in self._awaited.items() if one.ends_at > now}
            self._awaited[request.request_id] = awaited
        url = f"{self._callback_url}/{request.request_id}"
        return Stored(url, deadline, seconds=seconds)

    async def wait(self, request_id: str) -> bytes:
        """See `Inbox`."""
        awaited = self._awaited[request_id]
        await awaited.came.wait()
        assert awaited.result is not None
        return awaited.result

    async def problem(self, request: RewardAnnouncement) -> str | None:
        """See `Inbox`."""
        with self._lock:
            awaited = self._awaited.get(request.request_id)
        return None if awaited is None else awaited.problem

    def accepted(self, request_id: str, poll_url: str | None) -> None:
        """See `Inbox`; nothing is kept."""

    def close(self, request_id: str) -> None:
        """See `Inbox`."""
        with self._lock:
            if request_id in self._awaited:
                self._awaited[request_id].is_closed = True

    def has_received(self, request_id: str) -> bool:
        """Whether a callback brought its result."""
        with self._lock:
            awaited = self._awaited.get(request_id)
            return awaited is not None and awaited.result is not None

    def opens(self, request_id: str, token: str) -> bool:
        """Whether ``token`` is the request's token."""
        sha256 = hashlib.sha256(token.encode()).hexdigest()
        with self._lock:
            awaited = self._awaited.get(request_id)
        if awaited is None:
            return False
        if not hmac.compare_digest(sha256, awaited.request.token_sha256):
            awaited.problem = "401: its token is missing or wrong"
            return False
        return True

    def receive(
        self, request_id: str, token: str, body: bytes
    ) -> tuple[InboxOutcome, RewardContractError | None]:
        """Take a callback.

        Args:
            request_id: From the URL.
            token: From the ``Authorization`` header, without ``Bearer``.
            body: The unparsed body.

        Returns:
            The outcome, and the error of an invalid body.
        """
        if not self.opens(request_id, token):
            return "refused", None
        error: RewardContractError | None = None
        ids = self._awaited[request_id].request.sample_ids
        try:  # outside the lock, as it is slow
            decode_result(body, request_id=request_id, ids=ids)
        except RewardContractError as found:
            error = found
        with self._lock:
            awaited = self._awaited[request_id]
            if awaited.result is not None:
                return "duplicate" if awaited.result == body else "conflict", None
            if awaited.is_closed:
                return "closed", None
            if time.monotonic() > awaited.ends_at:
                return "late", None
            if error is not None:
                awaited.problem = f"422: {error.error_code}: {error.message}"
                return "invalid", error
            awaited.result, awaited.last = body, (token, body)
            awaited.loop.call_soon_threadsafe(awaited.came.set)
        return "accepted", None

    def repeat(self, request_id: str) -> InboxOutcome:
        """Take the accepted callback a second time."""
        return self.receive(request_id, *self._awaited[request_id].last)[0]


class AcceptanceInbox:
    """Passes everything on to ``inbox``, and notes when a request was accepted with a 202."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._announced: set[str] = set()
        self.is_accepted = asyncio.Event()

    async def announce(self, request: RewardAnnouncement) -> Stored:
        """See `Inbox`."""
        self._announced.add(request.request_id)
        return await self._inbox.announce(request)

    async def wait(self, request_id: str) -> bytes:
        """See `Inbox`."""
        return await self._inbox.wait(request_id)

    async def problem(self, request: RewardAnnouncement) -> str | None:
        """See `Inbox`."""
        return await self._inbox.problem(request)

    def accepted(self, request_id: str, poll_url: str | None) -> None:
        """See `Inbox`."""
        self._inbox.accepted(request_id, poll_url)
        self.is_accepted.set()

    def close(self, request_id: str) -> None:
        """See `Inbox`."""
        self._inbox.close(request_id)

    def close_all(self) -> None:
        """Close every announced request."""
        for request_id in self._announced:
            self.close(request_id)
