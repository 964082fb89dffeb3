"""One request to the service: the key, the retries, and errors as the classes the service raised."""

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
from dar.version import __version__

CONNECT_SECONDS = 5.0
FIRST_BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 8.0
MAX_RETRY_AFTER_SECONDS = 60.0
"""Longest wait that the service can ask for."""
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_RETRIED = frozenset({408, 429})
# Not the module's functions: they would change what a seeded program draws next.
_JITTER = random.SystemRandom()

Answer = TypeVar("Answer", bound=BaseModel)
Result = TypeVar("Result")
Upload = Callable[[], Mapping[str, Any]]
"""Makes the parts of a multipart body, afresh for each attempt."""


class AttemptError(Exception):
    """One attempt at a request failed.

    Args:
        error: What the caller of the SDK sees when no attempt is left.
        is_passing: Whether another attempt can help.
    """

    def __init__(self, error: DARError, *, is_passing: bool) -> None:
        super().__init__(error.message)
        self.error = error
        self.is_passing = is_passing


class Transport:
    """HTTP with the manners of the service.

    Args:
        api_key: Sent as a bearer token.
        base_url: Where the service is, with or without ``/v1``.
        timeout: Seconds between two pieces of an answer.
        max_retries: How often a request is repeated after a passing failure.

    Raises:
        ConfigurationError: ``base_url`` is no URL.
    """

    def __init__(self, api_key: str, base_url: str, *, timeout: float, max_retries: int) -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        parts = urlsplit(self.base_url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ConfigurationError(
                f"base_url {base_url!r} is not a URL like http://127.0.0.1:8321; correct base_url= or DAR_BASE_URL"
            )
        self.max_retries = max_retries
        self._client = httpx2.Client(
            headers={
                "authorization": f"Bearer {api_key}",
                "accept": "application/json",
                "user-agent": f"dar-sdk/{__version__}",
            },
            timeout=httpx2.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS)),
            follow_redirects=True,  # to storage elsewhere; the key is not sent along to another host
            trust_env=parts.hostname not in LOOPBACK,  # no proxy leads to here
        )

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def get(
        self, path: str, answer: type[Answer], params: Mapping[str, Any] | None = None
    ) -> Answer:
        """What a GET answers; parameters that are None are left out."""
        return self._parse(self.send("GET", path, params=params), answer)

    def post(
        self,
        path: str,
        answer: type[Answer],
        *,
        body: object = None,
        upload: Upload | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """What a POST of JSON, of a multipart body or of nothing answers."""
        return self._parse(
            self.send("POST", path, body=body, upload=upload, headers=headers), answer
        )

    def patch(self, path: str, answer: type[Answer], *, body: object) -> Answer:
        """What a PATCH of JSON answers."""
        return self._parse(self.send("PATCH", path, body=body), answer)

    def delete(self, path: str, answer: type[Answer]) -> Answer:
        """What a DELETE answers."""
        return self._parse(self.send("DELETE", path), answer)

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
        """Send a request, again after passing failures, and read its answer.

        Raises:
            ServiceConnectionError: The service could not be reached.
            DARError: It answered with an error; the class is the one it raised.
        """

        def attempt() -> httpx2.Response:
            with self.open(
                method, path, params=params, body=body, upload=upload, headers=headers
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
        body: object = None,
        upload: Upload | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Iterator[httpx2.Response]:
        """Send a request once; its answer's body is read by the caller.

        Raises:
            AttemptError: The service could not be reached, the connection broke, or it answered with an error; to be
                resolved by `retried`.
        """
        sent = dict(headers or {})
        if body is not None:
            sent["content-type"] = "application/json"
        try:
            with self._client.stream(
                method,
                f"{self.base_url}/v1{path}",
                params={key: value for key, value in (params or {}).items() if value is not None},
                # NaN goes out as it is: the service names its path, where null might pass for a default.
                content=None if body is None else json.dumps(body).encode(),
                headers=sent,
                **(upload() if upload is not None else {}),
            ) as response:
                if response.is_error:
                    response.read()
                    raise _failure_of(response)
                yield response
        except httpx2.TransportError as error:
            unreachable = ServiceConnectionError(
                f"cannot reach the DAR service at {self.base_url}: {str(error) or type(error).__name__}; "
                "start it with `dar up`, or say where it is with base_url= or DAR_BASE_URL"
            )
            raise AttemptError(unreachable, is_passing=True) from error

    def retried(self, attempt: Callable[[], Result]) -> Result:
        """What ``attempt`` returns, tried again after passing failures as often as is allowed.

        Raises:
            ServiceConnectionError: The service could not be reached.
            DARError: It answered with an error; the class is the one it raised.
        """
        number = 0
        while True:
            try:
                return attempt()
            except AttemptError as failure:
                if number >= self.max_retries or not failure.is_passing:
                    raise failure.error from failure.__cause__
                wait = _wait_seconds(failure.error, number)
            time.sleep(wait)
            number += 1

    def _parse(self, response: httpx2.Response, answer: type[Answer]) -> Answer:
        try:
            return answer.model_validate_json(response.content)
        except ValidationError as error:
            raise DARError(
                f"{self.base_url} answered something else than a {answer.__name__}; is it a DAR service of this "
                f"version? {error.error_count()} problems, the first: {error.errors()[0]['msg']}",
                request_id=response.headers.get("x-request-id"),
            ) from None


def escaped(name: str) -> str:
    """An id as one part of a path."""
    return quote(name, safe="")


def _failure_of(response: httpx2.Response) -> AttemptError:
    try:
        body = response.json()
    except ValueError:
        body = None
    headers = response.headers
    error = error_from_body(response.status_code, body, request_id=headers.get("x-request-id"))
    error.retry_after_seconds = _retry_after(headers)
    told = headers.get("x-should-retry")
    status = response.status_code
    is_passing = (
        told == "true" if told in {"true", "false"} else status in _RETRIED or status >= 500
    )
    return AttemptError(error, is_passing=is_passing)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        with contextlib.suppress(ValueError):
            seconds = float(headers.get(name, "")) * unit
            if 0 <= seconds < float("inf"):
                return seconds
    return None


def _wait_seconds(error: DARError, number: int) -> float:
    if error.retry_after_seconds is not None:
        return min(error.retry_after_seconds, MAX_RETRY_AFTER_SECONDS)
    longest = min(MAX_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2.0**number)
    return longest * _JITTER.uniform(0.75, 1.0)
