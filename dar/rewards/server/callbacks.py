"""Callbacks of a reward server: a result is posted until it is taken, refused for good, or too late."""

import asyncio
import hashlib
import logging
import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from urllib.parse import urlsplit

import httpx2

from dar.protocol.rewards import Callback, Reply
from dar.rewards.http.retry import parse_retry_after
from dar.rewards.http.signing import signed_headers
from dar.version import __version__

logger = logging.getLogger(__name__)
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0
LONGEST_RETRY_AFTER_SECONDS = 60.0
ATTEMPT_SECONDS = 30.0
"""For one POST, from its connection to the end of its answer."""
QUOTED_BYTES = 1024
"""Of a refusal, for the log."""
RETRIED = {408, 425, 429}
"""Statuses below 500 that pass."""
_ID_CHARACTERS = 32
# Not the module's functions: the user's function may have seeded those, and count on what they draw next.
_JITTER = random.SystemRandom()


def own_id(request_id: str, body: bytes) -> str:
    """The ``webhook-id`` of an answer: the same for the same answer, another for any other."""
    digest = hashlib.sha256(request_id.encode() + b"\0" + body).hexdigest()
    return f"rwr_{digest[:_ID_CHARACTERS]}"


def signed(keys: Sequence[bytes], request_id: str, body: bytes) -> dict[str, str]:
    """The three headers of a signed answer; none without keys."""
    if not keys:
        return {}
    return signed_headers(keys, own_id(request_id, body), int(datetime.now(UTC).timestamp()), body)


class CallbackSender:
    """Posts results to where their requests want them.

    Args:
        keys: Secrets that results are signed with.
    """

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys = tuple(keys)
        self._client: httpx2.AsyncClient | None = None

    async def deliver(self, request_id: str, reply: Callable[[], Reply], body: bytes) -> None:
        """Post a result; returns when it was taken, when it is refused for good, or at the deadline.

        Args:
            request_id: Id of the request.
            reply: Where to and until when; asked before each attempt, as a newer request may have come.
            body: The result.
        """
        pause = FIRST_PAUSE_SECONDS
        while True:
            now = reply()
            remaining = (now.deadline - datetime.now(UTC)).total_seconds()
            if now.callback is None or remaining <= 0:
                logger.error("the result of %s could not be delivered before its deadline", request_id)  # fmt: skip
                return
            reason, wait = await self._attempt(request_id, now.callback, body, remaining)
            if reason is None:
                return
            if wait is None:
                logger.error("the result of %s was not taken, and is not sent again: %s", request_id, reason)  # fmt: skip
                return
            wait = max(wait, _JITTER.uniform(pause / 2, pause))
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
            logger.warning("the result of %s was not taken: %s; again in %.1f s", request_id, reason, wait)  # fmt: skip
            await asyncio.sleep(min(wait, remaining))

    async def aclose(self) -> None:
        """Close all connections."""
        if self._client is not None:
            await self._client.aclose()

    async def _attempt(
        self, request_id: str, callback: Callback, body: bytes, seconds: float
    ) -> tuple[str | None, float | None]:
        """Why it was not taken (None: it was), and the least wait before the next attempt (None: there is none)."""
        headers = {
            "authorization": f"Bearer {callback.token}",
            "content-type": "application/json",
            "user-agent": f"dar-service/{__version__}",
            **signed(self._keys, request_id, body),
        }
        reason = _unusable(callback.url)
        if reason is not None:
            return reason, None
        if self._client is None:
            # The request says where to; a proxy or credentials of this machine's environment are not meant for there.
            self._client = httpx2.AsyncClient(trust_env=False, follow_redirects=False)
        try:
            async with (
                asyncio.timeout(min(seconds, ATTEMPT_SECONDS)),
                self._client.stream(
                    "POST", callback.url, content=body, headers=headers, timeout=ATTEMPT_SECONDS
                ) as answer,
            ):
                return await _verdict(answer, callback.token)
        except (httpx2.HTTPError, TimeoutError) as error:
            return f"{type(error).__name__} at {urlsplit(callback.url).netloc}", 0.0


def _unusable(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        httpx2.URL(url)  # more is no URL to one of them than to the other
    except (httpx2.InvalidURL, ValueError):
        return "its callback's url is no URL"
    if parts.scheme not in {"http", "https"} or not parts.hostname or "@" in parts.netloc:
        return "its callback's url is not http(s)://host…, without a user name"
    return None


async def _verdict(answer: httpx2.Response, token: str) -> tuple[str | None, float | None]:
    if answer.is_success:
        return None, None
    reason = f"HTTP {answer.status_code} from {answer.url.netloc.decode('ascii', 'replace')}"
    if answer.status_code in RETRIED or answer.status_code >= 500:
        wait = parse_retry_after(answer.headers.get("retry-after")) or 0.0
        return reason, min(wait, LONGEST_RETRY_AFTER_SECONDS)
    said = b""
    async for chunk in answer.aiter_raw(QUOTED_BYTES):
        said += chunk
        if len(said) >= QUOTED_BYTES + len(token):
            break
    # It may repeat what it was sent.
    quote = said.replace(token.encode(), b"rwt_...")[:QUOTED_BYTES]
    return f"{reason}: {quote.decode('utf-8', 'replace')!r}", None
