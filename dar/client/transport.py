"""HTTP to the service, for the SDK and for workers: requests, their errors, and waits."""

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from urllib.parse import quote

import httpx2
from pydantic import BaseModel, ValidationError

from dar.client.arguments import as_json
from dar.errors import (
    ConfigurationError,
    DARError,
    ServiceConnectionError,
    ServiceUnavailableError,
    error_from_body,
)
from dar.rewards.http.redaction import Redactor
from dar.rewards.http.retry import parse_retry_after
from dar.setting_kinds import LONGEST_SECONDS, plain_key
from dar.settings import unusable_surroundings

CONNECT_SECONDS = 5.0
SHORTEST_TIMEOUT = 0.001
FIRST_BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 8.0
MAX_RETRY_AFTER_SECONDS = 60.0
"""Longest wait that a service can request."""
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
# A generator of its own: the module's functions would change what a seeded program draws next.
_JITTER = random.SystemRandom()

Answer = TypeVar("Answer", bound=BaseModel)
Result = TypeVar("Result")
Upload = Callable[[], Mapping[str, Any]]
"""Makes the parts of a multipart body, again for each attempt."""


class Backoff:
    """Growing waits between attempts: 0.5 s, doubled each time, with jitter.

    Args:
        longest: Longest wait in seconds.
    """

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self._pause = FIRST_BACKOFF_SECONDS

    def next(self, requested: float | None = None) -> float:
        """Seconds to wait now.

        A ``Retry-After`` replaces the growing wait, unless it is 0: repetition without limit would
        then become a busy loop.
        """
        pause = self._pause * _JITTER.uniform(0.5, 1.0)
        self._pause = min(2 * self._pause, self._longest)
        return min(requested, MAX_RETRY_AFTER_SECONDS) if requested else pause


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a call is repeated, and after which pauses."""

    failures: int
    """Failures in a row after which a call is not repeated."""
    longest: float
    """Longest pause in seconds; a ``Retry-After`` may request a longer one."""
    pause: Callable[[float, DARError], None]
    """Waits some seconds after an error. Its exceptions end the repetition."""
    counts: Callable[[DARError], bool] = lambda _: True
    """Whether an error counts as a failure; another one starts the count again."""


def call_with_retries(call: Callable[[], Result], policy: RetryPolicy) -> Result:
    """Call ``call``, and again after errors that may pass.

    Raises:
        DARError: The error of the last call.
    """
    backoff, failures = Backoff(policy.longest), 0
    while True:
        try:
            return call()
        except DARError as error:
            failures = failures + 1 if policy.counts(error) else 0
            if not error.retryable or failures >= policy.failures:
                raise
            policy.pause(backoff.next(error.retry_after_seconds), error)


class Transport:
    """HTTP connections to one service.

    Args:
        key: Sent as a bearer token.
        base_url: URL of the service, with or without ``/v1``.
        timeout: Seconds between two parts of a response; connecting gets 5 s at most.
        max_retries: How often `send` and `retried` repeat a request after a passing failure.
        headers: Sent with every request.
        follow_redirects: Whether a response may come from storage on another host. The key is not
            sent to that host.

    Raises:
        ConfigurationError: ``base_url`` is not a URL of a host and a path, ``timeout`` or
            ``max_retries`` is out of range, ``key`` or a header has characters that a header cannot
            carry, or the proxies or certificates of this machine cannot be used.
    """

    def __init__(
        self,
        key: str,
        base_url: str,
        *,
        timeout: float,
        max_retries: int = 0,
        headers: Mapping[str, str],
        follow_redirects: bool,
    ) -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        if "://" in key:
            raise ConfigurationError(
                "the key for the DAR service is a URL; give the key first and then the URL: "
                "Client(api_key, base_url)",
                param="api_key",
            )
        host = _host_of(self.base_url)
        key = _checked(key)
        check_seconds("timeout", timeout, SHORTEST_TIMEOUT)
        if type(max_retries) is not int or max_retries < 0:
            raise ConfigurationError(
                f"max_retries is {max_retries!r}, but it must be a whole number from 0",
                param="max_retries",
            )
        _check_headers(headers)
        self._redact = Redactor((key,))
        self._policy = RetryPolicy(
            max_retries + 1, MAX_BACKOFF_SECONDS, lambda seconds, _: time.sleep(seconds)
        )
        try:
            self._client = httpx2.Client(
                headers={"authorization": f"Bearer {key}", **headers},
                timeout=_timeout(timeout),
                follow_redirects=follow_redirects,
                trust_env=host not in LOOPBACK,  # no proxy can reach a loopback address
                # Certificates take 40 ms, and plain HTTP needs none unless it is redirected.
                verify=follow_redirects or self.base_url.lower().startswith("https:"),
            )
        except (ImportError, OSError, ValueError, httpx2.InvalidURL) as error:
            raise unusable_surroundings(error) from None

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

    def patch(
        self,
        path: str,
        answer: type[Answer],
        *,
        body: object,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        return self.parse(self.send("PATCH", path, body=body, headers=headers), answer)

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
            ConfigurationError: The body, a header, the path or a parameter cannot be sent.
            ServiceConnectionError: The service could not be reached.
            DARError: The service returned an error; the class is the one that it raised.
        """
        content = None if body is None else as_json(body)
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
            ConfigurationError: A header, the path or a parameter has characters that cannot be
                sent.
            ServiceConnectionError: The service could not be reached, the connection broke, or the
                response is damaged.
            DARError: The service returned an error; the class is the one that it raised.
        """
        _check_headers(headers or {})
        more: dict[str, Any] = {} if timeout is None else {"timeout": _timeout(timeout)}
        if upload is not None:
            more |= upload()
        try:
            request = self._client.build_request(
                method,
                f"{self.base_url}/v1{path}",
                params={key: value for key, value in (params or {}).items() if value is not None},
                content=content,
                headers=headers,
                **more,
            )
        except (UnicodeError, httpx2.InvalidURL) as error:
            raise ConfigurationError(
                f"the request to {path} cannot be written: {error}; correct its arguments"
            ) from None
        try:
            with contextlib.ExitStack() as stack:
                try:
                    response = self._client.send(request, stream=True)
                    stack.callback(response.close)
                except (UnicodeError, httpx2.InvalidURL) as error:  # of a redirect or a proxy
                    raise httpx2.ConnectError(f"a host on the way is not valid: {error}") from None
                if not response.is_success:
                    response.read()
                    if self._is_of_a_store(response):
                        raise _store_failure(response)
                    raise failure_of(response, self._redact)
                yield response
        except httpx2.RequestError as error:
            # The HTTP library's traceback has 60 lines; `__context__` keeps its error.
            raise self._broken(error) from None

    def _broken(self, error: httpx2.RequestError) -> ServiceConnectionError:
        """What ended a request without a usable response, in one sentence."""
        why = self._redact(str(error)) or type(error).__name__
        if self._client.is_closed:
            return ServiceConnectionError(
                f"the request to {self.base_url} was given up, as this client has been closed"
            )
        if isinstance(error, httpx2.DecodingError):
            return ServiceConnectionError(
                f"a response from {self.base_url} is damaged: {why}; "
                "try again, or examine the proxy in front of the service"
            )
        if isinstance(error, httpx2.TooManyRedirects):
            return ServiceConnectionError(
                f"{self.base_url} redirects each request to another URL, without an end; "
                "give the URL of the service itself with base_url= or DAR_BASE_URL"
            )
        if (elsewhere := self._elsewhere(error)) is not None:
            return ServiceConnectionError(
                f"cannot reach {elsewhere}, to which {self.base_url} "
                f"redirects: {type(error).__name__}; try again, or let its operator set "
                "DAR_DOWNLOADS=stream or DAR_S3_PUBLIC_ENDPOINT"
            )
        return ServiceConnectionError(
            f"cannot reach the DAR service at {self.base_url}: {why}; "
            "start it with `dar up`, or give its URL with base_url= or DAR_BASE_URL"
        )

    def _is_elsewhere(self, url: httpx2.URL) -> bool:
        own = httpx2.URL(self.base_url)
        return (url.host, url.port) != (own.host, own.port)

    def _is_of_a_store(self, response: httpx2.Response) -> bool:
        """Whether a failure is none of the service, but of a store that it has redirected to."""
        is_json = "json" in response.headers.get("content-type", "")
        return bool(response.history) and self._is_elsewhere(response.url) and not is_json

    def _elsewhere(self, error: httpx2.RequestError) -> str | None:
        """The host that could not be reached, if the service has redirected to it."""
        try:
            url = error.request.url
        except RuntimeError:  # the error is about no request that was sent
            return None
        return url.netloc.decode() if self._is_elsewhere(url) else None

    def retried(self, attempt: Callable[[], Result]) -> Result:
        """Call ``attempt``, and again after passing failures, up to ``max_retries`` times.

        Raises:
            ServiceConnectionError: The service could not be reached.
            DARError: The service returned an error; the class is the one that it raised.
        """
        try:
            return call_with_retries(attempt, self._policy)
        except DARError as error:
            # In a user's traceback only the way to this module matters, not the way inside.
            raise error.with_traceback(None) from None

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


def _host_of(base_url: str) -> str:
    """The host of ``base_url``.

    Raises:
        ConfigurationError: It is not a URL, no host can have its name, or it has more than a host
            and a path. The message shows no password and no key.
    """
    is_secret = "@" in base_url or Redactor()(base_url) != base_url
    shown = "" if is_secret else f" {base_url!r}"
    try:
        url = httpx2.URL(base_url)
        host, is_http = url.host, url.scheme in {"http", "https"}
        url.raw_host.decode().encode("idna")  # as the connection does, late and with a traceback
        extra = url.userinfo or url.query or url.fragment
    except (httpx2.InvalidURL, UnicodeError):
        host, is_http, extra = "", False, b""
    if not is_http or not host:
        raise ConfigurationError(
            f"base_url{shown} is not a URL like http://127.0.0.1:8321; "
            "correct base_url= or DAR_BASE_URL"
        )
    if extra or base_url.endswith(("?", "#")):
        raise ConfigurationError(
            f"base_url{shown} has a user name, a query or a fragment, but the service takes only "
            "its key; remove it from base_url= or DAR_BASE_URL"
        )
    return host


def check_seconds(
    name: str, seconds: object, least: float = 0.0, most: float = LONGEST_SECONDS
) -> None:
    """Check an argument that is a number of seconds.

    Raises:
        ConfigurationError: It is none, or out of range.
    """
    is_usable = (
        isinstance(seconds, int | float)
        and not isinstance(seconds, bool)
        and least <= seconds <= most
    )
    if not is_usable:
        end = "" if most == math.inf else f" to {most:.0f}"
        raise ConfigurationError(
            f"{name} is {seconds!r}, but it must be a number of seconds from {least:g}{end}",
            param=name,
        )


def _checked(key: str) -> str:
    """The key as it is sent.

    Raises:
        ConfigurationError: It is none. The message does not show it.
    """
    try:
        plain = plain_key(key)
    except ValueError as error:
        raise ConfigurationError(
            f"the key for the DAR service is not valid: {error} (api_key=, DAR_API_KEY, "
            "DAR_WORKER_KEY or its file)"
        ) from None
    if not plain:
        raise ConfigurationError(
            "the key for the DAR service is empty; set api_key=, DAR_API_KEY or DAR_WORKER_KEY"
        )
    return plain


def _check_headers(headers: Mapping[str, str]) -> None:
    """Check that HTTP can carry the values of headers.

    Raises:
        ConfigurationError: One has a line break or another character that is not visible ASCII, or
            a space at an end. The message does not show it.
    """
    for name, value in headers.items():
        if value != value.strip() or not all(" " <= ch <= "~" for ch in value):
            raise ConfigurationError(
                f"the value of the header {name} has a character that a header cannot carry; use "
                "ASCII letters, digits and signs, without a space or a line break at the ends"
            )


def escaped(name: str) -> str:
    """An id as one part of a path."""
    return quote(name, safe="")


def failure_of(
    response: httpx2.Response, redact: Callable[[str], str] = lambda text: text
) -> DARError:
    """The error that a response reports. The service decides whether a retry can help.

    Args:
        response: With its body.
        redact: Removes the key from the texts of the error.
    """
    try:
        body = response.json()
    except (ValueError, RecursionError):
        body = None
    headers, status = response.headers, response.status_code
    error = error_from_body(status, body, request_id=headers.get("x-request-id"))
    _redact_texts(error, redact)
    error.status = status  # no class has the status of a proxy's 502
    error.retry_after_seconds = _retry_after(headers)
    advice = headers.get("x-should-retry")
    if advice in {"true", "false"}:
        error.retryable = advice == "true"
    return error


def _store_failure(response: httpx2.Response) -> ServiceUnavailableError:
    """The error about a store to which the service has redirected. Its URL may have expired."""
    return ServiceUnavailableError(
        f"the artifact store at {response.url.netloc.decode()}, to which the service redirects, "
        f"answers {response.status_code}; try again",
        code="storage_unavailable",
    )


def _redact_texts(error: DARError, redact: Callable[[str], str]) -> None:
    """Apply ``redact`` to all texts of an error but its code."""
    error.message = redact(error.message)
    error.args = (error.message,)
    error.param = None if error.param is None else redact(error.param)
    error.problems = tuple(
        replace(
            problem,
            message=redact(problem.message),
            param=None if problem.param is None else redact(problem.param),
        )
        for problem in error.problems
    )


def _retry_after(headers: Mapping[str, str]) -> float | None:
    milliseconds = parse_retry_after(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    return parse_retry_after(headers.get("retry-after"))


def _timeout(seconds: float) -> httpx2.Timeout:
    return httpx2.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS))
