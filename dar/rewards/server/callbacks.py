"""Callbacks of a reward server: posts a result until it is accepted, rejected or too late."""

import asyncio
import hashlib
import logging
import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from urllib.parse import urlsplit

import httpx2

from dar.protocol.rewards import Callback
from dar.rewards.http.retry import parse_retry_after
from dar.rewards.http.signing import signed_headers
from dar.version import __version__

logger = logging.getLogger(__name__)
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0
LONGEST_RETRY_AFTER_SECONDS = 60.0
ATTEMPT_SECONDS = 30.0
"""Time limit of one POST, from connecting to the end of the answer."""
QUOTED_BYTES = 1024
"""Bytes of a rejection that are logged."""
RETRIED = {408, 425, 429}
"""Statuses below 500 that are retried."""
_ID_CHARACTERS = 32
# A generator of its own: the user's function may have seeded the module's and rely on its sequence.
_JITTER = random.SystemRandom()


def own_id(request_id: str, body: bytes) -> str:
    """The ``webhook-id`` of an answer: equal for equal answers, different for others."""
    digest = hashlib.sha256(request_id.encode() + b"\0" + body).hexdigest()
    return f"rwr_{digest[:_ID_CHARACTERS]}"


def signed(keys: Sequence[bytes], request_id: str, body: bytes) -> dict[str, str]:
    """The three signature headers of an answer; none without keys."""
    if not keys:
        return {}
    return signed_headers(keys, own_id(request_id, body), int(datetime.now(UTC).timestamp()), body)


class CallbackSender:
    """Posts results to the callback URLs of their requests.

    Args:
        keys: Secrets that sign results.
    """

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys = tuple(keys)
        self._client: httpx2.AsyncClient | None = None

    async def deliver(
        self, request_id: str, reply: Callable[[], tuple[Callback | None, float]], body: bytes
    ) -> None:
        """Post a result until it is accepted, rejected, or its deadline passes.

        Args:
            request_id: Id of the request.
            reply: Returns the callback and the seconds until the deadline; called before each
                attempt, as a newer request may have changed them.
            body: The result.
        """
        pause = FIRST_PAUSE_SECONDS
        while True:
            callback, remaining = reply()
            if callback is None or remaining <= 0:
                logger.error("the result of %s was not delivered before its deadline", request_id)
                return
            reason, wait = await self._attempt(request_id, callback, body, remaining)
            if reason is None:
                return
            if wait is None:
                logger.error("the result of %s could not be delivered: %s", request_id, reason)
                return
            wait = max(wait, _JITTER.uniform(pause / 2, pause))
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
            logger.warning(
                "the result of %s was not delivered: %s; retry in %.1f s", request_id, reason, wait
            )
            await asyncio.sleep(min(wait, remaining))

    async def aclose(self) -> None:
        """Close all connections."""
        if self._client is not None:
            await self._client.aclose()

    async def _attempt(
        self, request_id: str, callback: Callback, body: bytes, seconds: float
    ) -> tuple[str | None, float | None]:
        """Return why it failed (None: accepted), and the least wait before a retry (None: none)."""
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
            # The URL comes from the request: no proxy or credentials of this machine's environment.
            self._client = httpx2.AsyncClient(trust_env=False, follow_redirects=False)
        try:
            async with (
                asyncio.timeout(min(seconds, ATTEMPT_SECONDS)),
                self._client.stream(
                    "POST", callback.url, content=body, headers=headers, timeout=ATTEMPT_SECONDS
                ) as answer,
            ):
                return await _rejection(answer, callback.token)
        except (httpx2.HTTPError, OSError, UnicodeError) as error:
            # OSError: also of TLS, after the handshake. UnicodeError: the host cannot be looked up.
            return f"{type(error).__name__} at {urlsplit(callback.url).netloc}", 0.0


def _unusable(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        _ = httpx2.URL(url).host  # each of the two rejects some URLs that the other accepts
    except (httpx2.InvalidURL, ValueError):
        return "its callback's url is not a URL"
    if parts.scheme not in {"http", "https"} or not parts.hostname or "@" in parts.netloc:
        return "its callback's url is not http(s)://host…, without a user name"
    return None


async def _rejection(answer: httpx2.Response, token: str) -> tuple[str | None, float | None]:
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
    # The answer may repeat the request.
    quote = said.replace(token.encode(), b"rwt_...")[:QUOTED_BYTES]
    return f"{reason}: {quote.decode('utf-8', 'replace')!r}", None
