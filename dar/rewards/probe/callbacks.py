"""Takes the callbacks of a probe's requests, in memory: they live for seconds, and nobody else waits for them."""

import asyncio
import hashlib
import hmac
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from dar.errors import RewardContractError
from dar.protocol.rewards import decode_result
from dar.rewards.http.async_results import Stored

InboxOutcome = Literal["refused", "accepted", "duplicate", "conflict", "late", "closed", "invalid"]
"""What becomes of a callback."""


@dataclass(slots=True)
class _Awaited:
    token_sha256: str
    deadline: datetime
    ids: tuple[str, ...]
    loop: asyncio.AbstractEventLoop
    came: asyncio.Event
    result: bytes | None = None
    is_closed: bool = False
    last: tuple[str, bytes] = field(default=("", b""), repr=False)
    """Token and body of the callback that counted."""


class ProbeInbox:
    """An inbox of `dar.rewards.http.async_results` for one process; callbacks may come in from any thread.

    Args:
        callback_url: URL below which callbacks arrive, without a slash at its end.
    """

    def __init__(self, callback_url: str) -> None:
        self._callback_url = callback_url
        self._lock = threading.Lock()
        self._awaited: dict[str, _Awaited] = {}

    async def announce(
        self,
        request_id: str,
        component: str,
        step: int,
        token_sha256: str,
        deadline: datetime,
        sample_ids: Sequence[str],
    ) -> Stored:
        """See `Inbox`."""
        del component, step
        loop = asyncio.get_running_loop()
        awaited = _Awaited(token_sha256, deadline, tuple(sample_ids), loop, asyncio.Event())
        with self._lock:
            now = datetime.now(UTC)
            self._awaited = {name: one for name, one in self._awaited.items() if one.deadline > now}
            self._awaited[request_id] = awaited
        return Stored(f"{self._callback_url}/{request_id}", deadline)

    async def wait(self, request_id: str) -> bytes:
        """See `Inbox`."""
        awaited = self._awaited[request_id]
        await awaited.came.wait()
        assert awaited.result is not None
        return awaited.result

    def accepted(self, request_id: str, poll_url: str | None) -> None:
        """See `Inbox`; nothing is kept."""

    def close(self, request_id: str) -> None:
        """See `Inbox`."""
        with self._lock:
            if request_id in self._awaited:
                self._awaited[request_id].is_closed = True

    def knows(self, request_id: str) -> bool:
        """Whether this is a request of a probe in this process."""
        with self._lock:
            return request_id in self._awaited

    def has_received(self, request_id: str) -> bool:
        """Whether its result came by callback."""
        with self._lock:
            awaited = self._awaited.get(request_id)
            return awaited is not None and awaited.result is not None

    def opens(self, request_id: str, token: str) -> bool:
        """Whether ``token`` is that of the request."""
        sha256 = hashlib.sha256(token.encode()).hexdigest()
        with self._lock:
            awaited = self._awaited.get(request_id)
        return awaited is not None and hmac.compare_digest(sha256, awaited.token_sha256)

    def receive(
        self, request_id: str, token: str, body: bytes
    ) -> tuple[InboxOutcome, RewardContractError | None]:
        """Take what was posted to a callback.

        Args:
            request_id: From the URL.
            token: From the ``Authorization`` header, without ``Bearer``.
            body: As it came.

        Returns:
            What becomes of it, and why it is invalid if it is.
        """
        if not self.opens(request_id, token):
            return "refused", None
        error: RewardContractError | None = None
        try:  # before the lock, as it takes its time
            decode_result(body, request_id=request_id, ids=self._awaited[request_id].ids)
        except RewardContractError as found:
            error = found
        with self._lock:
            awaited = self._awaited[request_id]
            if awaited.result is not None:
                return "duplicate" if awaited.result == body else "conflict", None
            if awaited.is_closed:
                return "closed", None
            if datetime.now(UTC) > awaited.deadline:
                return "late", None
            if error is not None:
                return "invalid", error
            awaited.result, awaited.last = body, (token, body)
            awaited.loop.call_soon_threadsafe(awaited.came.set)
        return "accepted", None

    def repeat(self, request_id: str) -> InboxOutcome:
        """Take the callback that counted once more."""
        return self.receive(request_id, *self._awaited[request_id].last)[0]
