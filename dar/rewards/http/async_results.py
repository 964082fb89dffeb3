"""Results that arrive after a 202: by callback or by polling.

In a job, the DAR service receives callbacks for the trainer (`Inbox`). Each request is announced
there before it is sent, with the hash of a fresh token, so that its result is kept even if the
trainer dies. A plain script has no inbox; its requests still offer ``async``, and the service may
give a ``poll_url``.

The deadline is fixed once the request is announced; time spent on announcing does not count. If
both a callback and polling deliver, the first valid result is used.
"""

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

import httpx2

from dar.errors import RewardContractError
from dar.protocol.rewards import (
    TOKEN_PREFIX,
    Callback,
    Reply,
    SampleResult,
    decode_accepted,
    decode_response,
)
from dar.protocol.worker import RewardAnnouncement
from dar.rewards.http.egress import DEFAULT_PORTS
from dar.rewards.http.responses import decoded
from dar.rewards.http.retry import JITTER, AttemptFailedError

FIRST_POLL_SECONDS, LONGEST_POLL_SECONDS, POLL_GROWTH = 1.0, 15.0, 1.5
SHORTEST_POLL_SECONDS = 0.1
"""Shortest wait between polls, also for ``Retry-After: 0``."""
POLL_JITTER = 0.2
"""Largest relative change of a wait, in either direction."""
PROBLEM_SECONDS = 2.0
"""Time limit of asking, after the deadline, why no callback was accepted."""
TOKEN_BYTES = 32
ANNOUNCEMENTS = 2
"""A request is announced again if an earlier announcement has a deadline in the past."""


@dataclass(frozen=True, slots=True)
class Stored:
    """An announced request, as the DAR service has stored it."""

    callback_url: str
    deadline: datetime
    """The deadline of the first announcement, possibly by an earlier process."""
    is_accepted: bool = False
    """The reward service has answered 202; the request is not sent again."""
    poll_url: str | None = None
    result: bytes | None = None
    """The result, if it has arrived."""
    problem: str | None = None
    """Why the latest callback was not accepted; None: none was refused."""
    seconds: float | None = None
    """Time until the deadline when it was stored; None: unknown, so that ``deadline`` is compared
    with this machine's clock."""


class Inbox(Protocol):
    """Receives callbacks on behalf of this process."""

    async def announce(self, request: RewardAnnouncement) -> Stored:
        """Store a request before it is sent; waits until it is stored."""
        ...

    async def wait(self, request_id: str) -> bytes:
        """Wait for the result of a request, without a time limit."""
        ...

    async def problem(self, request: RewardAnnouncement) -> str | None:
        """Why the latest callback of an announced request was not accepted; None: unknown."""
        ...

    def accepted(self, request_id: str, poll_url: str | None) -> None:
        """Report that the reward service has answered 202."""
        ...

    def close(self, request_id: str) -> None:
        """Report that the request needs no callback any more."""
        ...


@dataclass(frozen=True, slots=True)
class Polled:
    """The answer to a GET of a ``poll_url``."""

    body: bytes | None
    """The body of a 200; None: a 202."""
    retry_after_seconds: float | None = None


Poll = Callable[[str, float], Awaitable[Polled]]
"""GETs a URL within so many seconds, with the guard and credentials of the reward service."""


class LaterReply:
    """One request whose result may come later: what it offers the service, and the wait.

    Args:
        url: URL of the reward service; a ``poll_url`` must have the same origin.
        request_id: Id of the request.
        ids: Ids of its samples.
        seconds: From the announcement to the deadline; later answers are ignored.
        inbox: Receives callbacks; None: only polling is possible.
    """

    def __init__(
        self, url: str, request_id: str, ids: Sequence[str], seconds: float, inbox: Inbox | None
    ) -> None:
        self._url = url
        self._request_id = request_id
        self._ids = list(ids)
        self._inbox = inbox
        self._poll_url: str | None = None
        self._callback: Callback | None = None
        self._time = timedelta(seconds=seconds)
        self.deadline = datetime.now(UTC) + self._time
        """Deadline of the request, possibly set by an earlier process."""
        self._ends_at = time.monotonic() + seconds
        self.is_accepted = False
        """Whether the reward service has answered 202, so that only the result is missing."""
        self._result: bytes | None = None
        self._announced: RewardAnnouncement | None = None
        self._poll_problem = ""
        """Why polling ended, or why the latest poll failed."""

    async def open(self, component: str, step: int) -> None:
        """Announce the request before it is sent. Waits while the DAR service is unavailable.

        Raises:
            AttemptFailedError: The stored ``poll_url`` breaks the contract.
        """
        if self._inbox is None:
            return
        for _ in range(ANNOUNCEMENTS):
            token = f"{TOKEN_PREFIX}{secrets.token_urlsafe(TOKEN_BYTES)}"
            sha256 = hashlib.sha256(token.encode()).hexdigest()
            request = RewardAnnouncement(
                request_id=self._request_id,
                component=component,
                step=step,
                sample_ids=self._ids,
                token_sha256=sha256,
                deadline=(datetime.now(UTC) + self._time).timestamp(),
                seconds=self._time.total_seconds(),
            )
            stored = await self._inbox.announce(request)
            self._announced = request
            self.deadline = stored.deadline
            left = stored.seconds
            if left is None:
                left = (stored.deadline - datetime.now(UTC)).total_seconds()
            else:  # the reward service compares it with `created_at`, by this machine's clock
                self.deadline = datetime.now(UTC) + timedelta(seconds=left)
            self._ends_at = time.monotonic() + left
            if stored.result is not None or self.remaining_seconds > 0:
                break
        self.is_accepted = stored.is_accepted or stored.result is not None
        self._result = stored.result
        self._callback = Callback(url=stored.callback_url, token=token)
        if stored.poll_url is not None:
            self._poll_url = self._checked(stored.poll_url)

    @property
    def token(self) -> str:
        """The secret part of the callback's token; empty without a callback."""
        return "" if self._callback is None else self._callback.token.removeprefix(TOKEN_PREFIX)

    @property
    def reply(self) -> Reply:
        """The ``reply`` field of the request."""
        return Reply(modes=["sync", "async"], deadline=self.deadline, callback=self._callback)

    def accept(self, body: bytes) -> None:
        """Handle a 202.

        Raises:
            AttemptFailedError: Its body breaks the contract, or there is no way to get the result.
        """
        try:
            accepted = decode_accepted(body, request_id=self._request_id)
        except RewardContractError as error:
            raise AttemptFailedError("contract", error.error_code, error.message) from None
        if accepted.poll_url is not None:
            self._poll_url = self._checked(accepted.poll_url)
        elif self._callback is None:
            raise _contract("poll_url", "a 202 without poll_url, though no callback was offered")
        self.is_accepted = True
        if self._inbox is not None:
            self._inbox.accepted(self._request_id, accepted.poll_url)

    def close(self) -> None:
        """Report that the request was answered at once."""
        if self._inbox is not None:
            self._inbox.close(self._request_id)

    async def result(
        self, poll: Poll, on_end: Callable[[AttemptFailedError], None]
    ) -> list[SampleResult]:
        """Wait for the result.

        Args:
            poll: GETs the ``poll_url``.
            on_end: Called if polling has failed and only a callback can still bring the result.

        Raises:
            AttemptFailedError: None arrived before the deadline, or it breaks the contract.
        """
        self.is_accepted = False  # after a failure the next attempt sends the request again
        if self._result is not None:
            result, self._result = self._result, None
            return await self._decode(result)
        ways: list[Coroutine[Any, Any, list[SampleResult]]] = []
        if self._inbox is not None:
            ways.append(self._called_back(self._inbox))
        if self._poll_url is not None:
            ways.append(self._polled(self._poll_url, poll))
        try:
            async with asyncio.timeout(self.remaining_seconds):
                return await _first(ways, on_end)
        except TimeoutError:
            reason = "it accepted the request, but its result did not come before the deadline"
            why = "; ".join(filter(None, [await self._callback_problem(), self._poll_problem]))
            raise AttemptFailedError("transient", "callback_late", reason, quote=why) from None

    async def _callback_problem(self) -> str:
        """What was wrong with the latest callback; empty: nothing, or unknown."""
        if self._inbox is None or self._announced is None:
            return ""
        problem: str | None = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PROBLEM_SECONDS):
                problem = await self._inbox.problem(self._announced)
        return "" if problem is None else f"a callback was refused with {problem}"

    async def _called_back(self, inbox: Inbox) -> list[SampleResult]:
        return await self._decode(await inbox.wait(self._request_id))

    async def _polled(self, url: str, poll: Poll) -> list[SampleResult]:
        wait = FIRST_POLL_SECONDS
        requested: float | None = None
        while True:
            if requested is None:
                requested = wait * JITTER.uniform(1 - POLL_JITTER, 1 + POLL_JITTER)
                wait = min(wait * POLL_GROWTH, LONGEST_POLL_SECONDS)
            await asyncio.sleep(max(requested, SHORTEST_POLL_SECONDS))
            try:
                polled = await poll(url, self.remaining_seconds)
                if polled.body is not None:
                    results = await self._decode(polled.body)
                    self.close()
                    return results
            except AttemptFailedError as error:
                if error.kind not in {"transient", "name"}:
                    self._poll_problem = f"polling ended with {error.code}: {error.full_reason}"
                    raise
                self._poll_problem = f"the latest poll failed: {error.full_reason}"
                requested = error.retry_after_seconds
                continue
            self._poll_problem = ""
            requested = polled.retry_after_seconds

    async def _decode(self, body: bytes) -> list[SampleResult]:
        def decode(received: bytes) -> list[SampleResult]:
            return decode_response(received, request_id=self._request_id, ids=self._ids)

        try:
            return await decoded(decode, body)
        except RewardContractError as error:
            raise AttemptFailedError("contract", error.error_code, error.message) from None

    @property
    def remaining_seconds(self) -> float:
        """Time until the deadline, at least 0."""
        return max(0.0, self._ends_at - time.monotonic())

    def _checked(self, given: str) -> str:
        """Make a ``poll_url`` absolute.

        Raises:
            AttemptFailedError: It is not on the origin of the reward service.
        """
        try:
            base = httpx2.URL(self._url)
            url = base.join(given)
            is_own = _origin(url) == _origin(base)
        except (httpx2.InvalidURL, ValueError):  # a host may be no name, which is found out late
            raise _contract("poll_url", "a poll_url that is not a URL") from None
        if not is_own:
            raise _contract("poll_url", "a poll_url on another origin than the reward service's")
        if url.userinfo or url.fragment:
            raise _contract("poll_url", "a poll_url with a user name, a password or a fragment")
        return str(url)


def _origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    """Scheme, host and port.

    Raises:
        ValueError: The host is not a name.
    """
    return url.scheme, url.host, url.port or DEFAULT_PORTS.get(url.scheme)


def _contract(code: str, reason: str) -> AttemptFailedError:
    return AttemptFailedError("contract", f"contract.{code}", reason)


async def _first(
    ways: Sequence[Coroutine[Any, Any, list[SampleResult]]],
    on_end: Callable[[AttemptFailedError], None],
) -> list[SampleResult]:
    """The first result. A failure counts only if every other way has failed too."""
    waiting = {asyncio.create_task(way) for way in ways}
    try:
        while True:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            failed = [task for task in done if task.exception() is not None]
            for task in done:
                if task not in failed:
                    return task.result()
            if not waiting:
                return failed[0].result()
            for task in failed:
                error = task.exception()
                if isinstance(error, AttemptFailedError):
                    on_end(error)
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
