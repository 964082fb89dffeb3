"""State shared by all requests to a reward endpoint.

Connections, concurrency, rate, ``Retry-After``, breaker and retry budget. Components and jobs of a
process that name the same URL with the same credentials and limits share one `Endpoint`, as the
limits protect the service from all of them together.

The connection pool is used without the client that httpx2 puts around it: the pool has no
redirects, cookies, proxies or netrc to turn off, and takes the egress guard as a public argument.
"""

import asyncio
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Self
from weakref import WeakKeyDictionary

import httpcore2

from dar.errors import RewardMisconfiguredError
from dar.rewards.http.breaker import BreakerOptions, BreakerState, Call, CircuitBreaker
from dar.rewards.http.connection import CURRENT, JoinedStream, Timings
from dar.rewards.http.egress import EgressPolicy, GuardedBackend, Resolver, Target
from dar.rewards.http.redaction import Redactor, filter_http_logs
from dar.rewards.http.responses import (
    Answer,
    Incoming,
    failure_of,
    read_answer,
    refusal_of,
    without_secrets,
)
from dar.rewards.http.retry import (
    AttemptFailedError,
    RetryBudget,
    RetryBudgetOptions,
    RetrySchedule,
)
from dar.settings import unusable_surroundings

KEEPALIVE_SECONDS = 15.0
"""Idle connections are closed after this; common servers close them after 60 to 75 s."""


@cache
def default_tls() -> ssl.SSLContext:
    """The default TLS context, made once: loading the certificates takes at least 20 ms.

    Raises:
        ConfigurationError: The certificates cannot be loaded.
    """
    try:
        return httpcore2.default_ssl_context()
    except OSError as error:
        raise unusable_surroundings(error) from None


@dataclass(frozen=True)
class EndpointConfig:
    """Configuration of an endpoint; sources with equal ones share an `Endpoint`."""

    target: Target
    secrets: tuple[str, ...] = field(repr=False)
    headers: tuple[tuple[str, str], ...] = field(repr=False)
    limits: tuple[int, float | None]
    """Concurrency and requests per second."""
    guard: EgressPolicy | None
    breaker: BreakerOptions
    budget: RetryBudgetOptions
    tls: ssl.SSLContext | None = field(repr=False)
    resolver: Resolver | None = field(repr=False)
    owner: object | None
    """None: shared with all sources; otherwise used by this owner alone."""


@dataclass(slots=True)
class Patience:
    """How long a request waits until it may be sent."""

    seconds: float
    """How long the breaker may still extend the deadline of the schedule."""
    schedule: RetrySchedule
    on_wait: Callable[[str], None]


class ConcurrencySlot:
    """A request's place among those in flight.

    Args:
        places: The semaphore of the endpoint.
    """

    def __init__(self, places: asyncio.Semaphore) -> None:
        self._places = places
        self._is_held = False

    async def acquire(self) -> None:
        """Wait for a place, unless one is held."""
        if not self._is_held:
            await self._places.acquire()
            self._is_held = True

    def release(self) -> None:
        """Give the place back, if held.

        A request that waits for a later result is not in flight.
        """
        if self._is_held:
            self._is_held = False
            self._places.release()


Listener = Callable[[BreakerState, str], None]


class Endpoint:
    """One endpoint in one event loop; from `open_endpoint`, until `release`."""

    def __init__(self, config: EndpointConfig, registry: "dict[EndpointConfig, Endpoint]") -> None:
        self._config = config
        self._registry = registry
        self._users = 0
        concurrency, rps = config.limits
        self._places = asyncio.Semaphore(concurrency)
        self.breaker = CircuitBreaker(config.breaker, self._breaker_changed)
        self.budget = RetryBudget(config.budget)
        self.listeners: set[Listener] = set()
        headers = dict(config.headers).values()
        self.redact = Redactor(config.secrets, headers, config.target.target)
        self._closed_until = 0.0
        self._interval = 0.0 if rps is None else 1.0 / rps
        self._next_start = 0.0
        self._guard = GuardedBackend(config.guard, config.resolver)
        tls = config.tls or default_tls()
        tls.minimum_version = max(tls.minimum_version, ssl.TLSVersion.TLSv1_2)
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=tls,
            max_connections=concurrency,
            max_keepalive_connections=concurrency,
            keepalive_expiry=KEEPALIVE_SECONDS,
            http1=True,
            http2=False,
            network_backend=self._guard,
        )
        filter_http_logs()

    def acquire(self) -> Self:
        """Add a user."""
        self._users += 1
        return self

    async def release(self, listener: Listener | None = None) -> None:
        """Remove a user; the last one closes all connections."""
        if listener is not None:
            self.listeners.discard(listener)
        self._users -= 1
        if self._users == 0:
            self._registry.pop(self._config, None)
            await self._pool.aclose()

    def slot(self) -> ConcurrencySlot:
        """A place for one request, not yet held."""
        return ConcurrencySlot(self._places)

    def hold_back(self, seconds: float) -> None:
        """Start no request for so long; those in flight go on."""
        self._closed_until = max(self._closed_until, time.monotonic() + seconds)

    async def admit(self, patience: Patience) -> Call:
        """Wait until an attempt may start: ``Retry-After``, breaker, then rate.

        Raises:
            AttemptFailedError: The deadline has passed, or the breaker stayed open for too long.
            RewardMisconfiguredError: No request can succeed until the configuration changes.
        """
        while True:
            call = await self._enter(patience)
            if await self._keep_pace(call):
                return call

    async def passable(self, patience: Patience) -> None:
        """Wait as `admit` does, but for ``Retry-After`` and breaker only, and start no attempt."""
        self.breaker.done(await self._enter(patience), "neutral")

    async def _enter(self, patience: Patience) -> Call:
        is_reported = False
        while True:
            if patience.schedule.remaining_seconds <= 0:
                raise AttemptFailedError("transient", "deadline", "no answer before the deadline")
            pause = self._closed_until - time.monotonic()
            if pause > 0:
                await asyncio.sleep(min(pause, patience.schedule.remaining_seconds))
                continue
            call = self.breaker.enter()
            if call is not None:
                return call
            if not is_reported:
                patience.on_wait("most requests failed; waiting before the next request")
            is_reported = True
            await self._wait_for_breaker(patience)

    async def _wait_for_breaker(self, patience: Patience) -> None:
        refusal = self.breaker.refusal
        if refusal is not None:
            raise RewardMisconfiguredError(refusal.message, code=refusal.error_code)
        started = time.monotonic()
        await self.breaker.changed(patience.seconds)
        waited = min(patience.seconds, time.monotonic() - started)
        patience.seconds -= waited
        patience.schedule.extend(waited)
        if patience.seconds <= 0:
            reason = "most requests failed for too long; this one was not sent"
            raise AttemptFailedError("transient", "breaker_open", reason, is_final=True)

    async def _keep_pace(self, call: Call) -> bool:
        """Wait for this call's turn; False: a ``Retry-After`` came, and the call has ended.

        Not a token bucket: it starts with a burst, which the limit is there to prevent.
        """
        now = time.monotonic()
        start = max(now, self._next_start)
        self._next_start = start + self._interval
        if start > now:
            try:
                await asyncio.sleep(start - now)
            except asyncio.CancelledError:
                self.breaker.done(call, "neutral")
                raise
        if self._closed_until > time.monotonic():
            self.breaker.done(call, "neutral")
            return False
        return True

    async def post(
        self,
        body: bytes,
        headers: Callable[[], Mapping[str, str]],
        timeouts: Mapping[str, float],
        timings: Timings | None = None,
    ) -> Answer:
        """Make one attempt.

        A server may close an idle connection just when it is used again. That is no failure of the
        service, and the request's id makes a repetition harmless. So the request is sent once more
        at once, as the same attempt.

        Args:
            body: The body.
            headers: Returns the headers, with a fresh timestamp.
            timeouts: ``connect``, ``read``, ``write`` and ``pool``, in seconds.
            timings: Records where the time goes.

        Raises:
            AttemptFailedError: There was no usable answer.
        """
        path = self._config.target.target
        try:
            return await self._once(
                "POST", path, body, headers(), timeouts, timings, is_repeatable=True
            )
        except _StaleConnectionError:
            pass
        return await self._once("POST", path, body, headers(), timeouts, timings)

    async def get(
        self, target: str, headers: Mapping[str, str], timeouts: Mapping[str, float]
    ) -> Answer:
        """GET ``target`` (path and query) on the endpoint's origin; see `post`."""
        return await self._once("GET", target, b"", headers, timeouts)

    async def _once(
        self,
        method: str,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        timeouts: Mapping[str, float],
        timings: Timings | None = None,
        *,
        is_repeatable: bool = False,
    ) -> Answer:
        timings = timings or Timings()
        timings.begin()
        target = self._config.target
        given = {"host": target.authority, **dict(self._config.headers), **headers}
        if body:
            given["content-length"] = str(len(body))
        request = httpcore2.Request(
            method,
            httpcore2.URL(scheme=target.scheme, host=target.host, port=target.port, target=path),
            headers=[
                (name.encode("ascii"), value.encode("ascii")) for name, value in given.items()
            ],
            content=body,
            extensions={"timeout": dict(timeouts), "trace": timings.trace},
        )
        token = CURRENT.set(timings)
        try:
            response = await self._pool.handle_async_request(request)
        except _TRANSPORT_ERRORS as error:
            is_broken = isinstance(error, httpcore2.NetworkError | httpcore2.RemoteProtocolError)
            if is_repeatable and is_broken and not timings.has_dialled:
                raise _StaleConnectionError from error
            # Not ``from error``: a traceback would show what was received.
            raise self._without_secrets(failure_of(error)) from None
        finally:
            CURRENT.reset(token)
        return await self._read(response)

    async def _read(self, response: httpcore2.Response) -> Answer:
        incoming = Incoming(response)
        try:
            if incoming.status not in {200, 202}:
                raise await refusal_of(incoming)
            return await read_answer(incoming)
        except AttemptFailedError as failure:
            raise self._without_secrets(failure) from None
        except _TRANSPORT_ERRORS as error:
            raise self._without_secrets(failure_of(error)) from None
        finally:
            stream = response.extensions["network_stream"]
            if isinstance(stream, JoinedStream):  # a 101 has another stream
                stream.end_answer(incoming.status, incoming.headers)
            await response.aclose()

    def _without_secrets(self, failure: AttemptFailedError) -> AttemptFailedError:
        return without_secrets(failure, self.redact)

    def _breaker_changed(self, state: BreakerState, reason: str) -> None:
        for listener in list(self.listeners):
            listener(state, reason)


class _StaleConnectionError(Exception):
    """A reused connection broke before an answer arrived."""


_TRANSPORT_ERRORS = (
    httpcore2.NetworkError,
    httpcore2.TimeoutException,
    httpcore2.ProtocolError,
    httpcore2.UnsupportedProtocol,
)


_endpoints: "WeakKeyDictionary[asyncio.AbstractEventLoop, dict[EndpointConfig, Endpoint]]" = (
    WeakKeyDictionary()
)


def open_endpoint(config: EndpointConfig) -> Endpoint:
    """The endpoint with this configuration in this event loop, with a user added."""
    known = _endpoints.setdefault(asyncio.get_running_loop(), {})
    if config not in known:
        known[config] = Endpoint(config, known)
    return known[config].acquire()
