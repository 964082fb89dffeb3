"""HTTP to the service, for the SDK and for workers: requests, their errors, and waits."""

import contextlib
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import httpx2
from pydantic import BaseModel, ValidationError

from dar.errors import ConfigurationError, DARError, ServiceConnectionError, error_from_body
from dar.rewards.http.retry import parse_retry_after

CONNECT_SECONDS = 5.0
FIRST_BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 8.0
MAX_RETRY_AFTER_SECONDS = 60.0
"""Longest wait that a service can request."""
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_RETRIED = frozenset({408, 429})
# A generator of its own: the module's functions would change what a seeded program draws next.
_JITTER = random.SystemRandom()

Answer = TypeVar("Answer", bound=BaseModel)
Result = TypeVar("Result")
Upload = Callable[[], Mapping[str, Any]]
"""Makes the parts of a multipart body, again for each attempt."""


class AttemptError(Exception):
    """One attempt at a request failed.

    Args:
        error: What the caller sees when no attempt is left.
        is_passing: Whether another attempt can succeed.
        status: HTTP status of the response; None: there was no response.
    """

    def __init__(self, error: DARError, *, is_passing: bool, status: int | None = None) -> None:
        super().__init__(error.message)
        self.error = error
        self.is_passing = is_passing
        self.status = status


class Backoff:
    """Growing waits between attempts: 0.5 s, doubled each time, with jitter.

    Args:
        longest: Longest wait in seconds.
        least: Smallest share of a wait that the jitter leaves.
    """

    def __init__(self, longest: float, least: float = 0.5) -> None:
        self._longest = longest
        self._least = least
        self._pause = FIRST_BACKOFF_SECONDS

    def next(self, requested: float | None = None) -> float:
        """Seconds to wait now, at least ``requested``, the value of a ``Retry-After``."""
        pause = self._pause * _JITTER.uniform(self._least, 1.0)
        self._pause = min(2 * self._pause, self._longest)
        return max(pause, min(requested or 0.0, MAX_RETRY_AFTER_SECONDS))


class Transport:
    """HTTP connections to one service.

    Args:
        key: Sent as a bearer token.
        base_url: URL of the service, with or without ``/v1``.
        timeout: Seconds between two parts of a response; connecting gets 5 s at most.
        max_retries: How often `send` repeats a request after a passing failure.
        headers: Sent with every request.
        follow_redirects: Whether a response may come from storage on another host. The key is not
            sent to that host.

    Raises:
        ConfigurationError: ``base_url`` is not a URL.
    """

    def __init__(
        self,
        key: str,
        base_url: str,
        *,
        timeout: float,
        max_retries: int,
        headers: Mapping[str, str],
        follow_redirects: bool,
    ) -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        parts = urlsplit(self.base_url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ConfigurationError(
                f"base_url {base_url!r} is not a URL like http://127.0.0.1:8321; "
                "correct base_url= or DAR_BASE_URL"
            )
        self.max_retries = max_retries
        self._client = httpx2.Client(
            headers={"authorization": f"Bearer {key}", **headers},
            timeout=_timeout(timeout),
            follow_redirects=follow_redirects,
            trust_env=parts.hostname not in LOOPBACK,  # no proxy can reach a loopback address
            # Loading certificates takes 40 ms, and plain HTTP needs none unless it is redirected.
            verify=follow_redirects or parts.scheme == "https",
        )

    def close(self) -> None:
        self._client.close()

    def get(
        self, path: str, answer: type[Answer], params: Mapping[str, Any] | None = None
    ) -> Answer:
        """GET a model; parameters that are None are left out."""
        return self.parse(self.send("GET", path, params=params), answer)

    def post(
        self,
        path: str,
        answer: type[Answer],
        *,
        body: object = None,
        upload: Upload | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """POST JSON, a multipart body or nothing."""
        return self.parse(
            self.send("POST", path, body=body, upload=upload, headers=headers), answer
        )

    def patch(self, path: str, answer: type[Answer], *, body: object) -> Answer:
        return self.parse(self.send("PATCH", path, body=body), answer)

    def delete(self, path: str, answer: type[Answer]) -> Answer:
        return self.parse(self.send("DELETE", path), answer)

    def send(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: object = None,
        upload: Upload | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx2.Response:
        """Send a request, repeat it after passing failures, and read the response.

        Raises:
            ServiceConnectionError: The service could not be reached.
            DARError: The service returned an error; the class is the one that it raised.
        """
        # NaN is sent as it is, so that the service names its path. A null could pass as a default.
        content = None if body is None else json.dumps(body).encode()
        json_type = {} if body is None else {"content-type": "application/json"}

        def attempt() -> httpx2.Response:
            with self.open(
                method,
                path,
                params=params,
                content=content,
                upload=upload,
                headers={**(headers or {}), **json_type},
            ) as response:
                response.read()
                return response

        return self.retried(attempt)

    @contextlib.contextmanager
    def open(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        content: bytes | None = None,
        upload: Upload | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Iterator[httpx2.Response]:
        """Send a request once; the caller reads the body of the response.

        Raises:
            AttemptError: The service could not be reached, the connection broke, or the service
                returned an error. `retried` handles it.
        """
        more: dict[str, Any] = {} if timeout is None else {"timeout": _timeout(timeout)}
        if upload is not None:
            more |= upload()
        try:
            with self._client.stream(
                method,
                f"{self.base_url}/v1{path}",
                params={key: value for key, value in (params or {}).items() if value is not None},
                content=content,
                headers=headers,
                **more,
            ) as response:
                if not response.is_success:
                    response.read()
                    raise failure_of(response)
                yield response
        except httpx2.TransportError as error:
            unreachable = ServiceConnectionError(
                f"cannot reach the DAR service at {self.base_url}: "
                f"{str(error) or type(error).__name__}; "
                "start it with `dar up`, or give its URL with base_url= or DAR_BASE_URL"
            )
            raise AttemptError(unreachable, is_passing=True) from error

    def retried(self, attempt: Callable[[], Result]) -> Result:
        """Call ``attempt``, and again after passing failures, up to ``max_retries`` times.

        Raises:
            ServiceConnectionError: The service could not be reached.
            DARError: The service returned an error; the class is the one that it raised.
        """
        backoff = Backoff(MAX_BACKOFF_SECONDS, least=0.75)
        retries = 0
        while True:
            try:
                return attempt()
            except AttemptError as failure:
                if retries >= self.max_retries or not failure.is_passing:
                    raise failure.error from failure.__cause__
                requested = failure.error.retry_after_seconds
            time.sleep(
                backoff.next() if requested is None else min(requested, MAX_RETRY_AFTER_SECONDS)
            )
            retries += 1

    def parse(self, response: httpx2.Response, answer: type[Answer]) -> Answer:
        """The body of a response as a model.

        Raises:
            DARError: It is something else.
        """
        try:
            return answer.model_validate_json(response.content)
        except ValidationError as error:
            raise DARError(
                f"{self.base_url} returned something else than a {answer.__name__}; "
                f"is it a DAR service of this version? {error.error_count()} problems, "
                f"the first: {error.errors()[0]['msg']}",
                request_id=response.headers.get("x-request-id"),
            ) from None


def escaped(name: str) -> str:
    """An id as one part of a path."""
    return quote(name, safe="")


def failure_of(response: httpx2.Response) -> AttemptError:
    """The error that a response reports."""
    try:
        body = response.json()
    except ValueError:
        body = None
    headers, status = response.headers, response.status_code
    error = error_from_body(status, body, request_id=headers.get("x-request-id"))
    error.retry_after_seconds = _retry_after(headers)
    advice = headers.get("x-should-retry")
    is_passing = (
        advice == "true" if advice in {"true", "false"} else status in _RETRIED or status >= 500
    )
    return AttemptError(error, is_passing=is_passing, status=status)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    milliseconds = parse_retry_after(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    return parse_retry_after(headers.get("retry-after"))


def _timeout(seconds: float) -> httpx2.Timeout:
    return httpx2.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS))
