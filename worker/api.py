"""The worker's side of ``/v1/worker``: one method per route, and patience with a service that is away."""

import contextlib
import gzip
import random
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Self, TypedDict, TypeVar, Unpack
from urllib.parse import quote

import httpx2
import structlog
from pydantic import BaseModel, ValidationError
from pydantic_core import to_json

from dar.errors import (
    DARError,
    NotFoundError,
    ServiceConnectionError,
    ServiceUnavailableError,
    error_from_body,
)
from dar.protocol.worker import (
    AnnounceRewardRequests,
    AttemptOf,
    BatchAck,
    CheckpointUpload,
    Claim,
    Complete,
    Directives,
    Fail,
    Heartbeat,
    Inputs,
    Lease,
    LeaseState,
    NoteRewardProgress,
    Outcome,
    RegisterCheckpoint,
    Release,
    RewardProgressNoted,
    RewardRequestStates,
)

log = structlog.get_logger(__name__)

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
CONNECT_SECONDS = 5.0
READ_SECONDS = 30.0
COMMIT_SECONDS = 600.0
"""The service hashes every file of a checkpoint before it answers a commit."""
DIRECTIVES_WAIT_SECONDS = 20
LOOK_SECONDS = 0.1
"""How often a pause looks whether it should be given up."""
BROKEN_ANSWERS = 10
"""HTTP 500s in a row, over a minute and a half, after which a call is not repeated any more."""
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})

Answer = TypeVar("Answer")
Model = TypeVar("Model", bound=BaseModel)


class GaveUpError(Exception):
    """A call was not repeated any more, because nobody waits for its answer."""


class ServiceBrokenError(DARError):
    """The service failed at a request (HTTP 500), and may well fail at it for ever."""


class MissingError(DARError):
    """The service lacks a file or a checkpoint of a lease."""

    code = "missing"
    retryable = False


class Backoff:
    """Growing pauses between repetitions: 0.5 s doubling to 30 s, each drawn from its upper half."""

    def __init__(self, longest: float = LONGEST_PAUSE_SECONDS) -> None:
        self._longest = longest
        self._pause = FIRST_PAUSE_SECONDS

    def next(self, asked: float | None = None) -> float:
        """Seconds to wait now; at least ``asked``, which is what a ``Retry-After`` said."""
        pause = self._pause * random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, protects nothing
        self._pause = min(2 * self._pause, self._longest)
        return max(pause, asked or 0.0)


def _retry_after(headers: httpx2.Headers) -> float | None:
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            return min(float(headers[name]) * unit, 4 * LONGEST_PAUSE_SECONDS)
        except (KeyError, ValueError):
            continue
    return None


class _Options(TypedDict, total=False):
    """What a request is made of beside its path."""

    content: str | bytes
    headers: dict[str, str]
    params: dict[str, str | int]


def error_of(response: httpx2.Response) -> DARError:
    """The error that the service answered with."""
    try:
        body: object = response.json()
    except ValueError:
        body = None
    error = error_from_body(
        response.status_code, body, request_id=response.headers.get("x-request-id")
    )
    if response.status_code == ServiceBrokenError.status:
        message = f"{error.message} (request {error.request_id})"
        error = ServiceBrokenError(message, code=error.error_code, request_id=error.request_id)
    error.retry_after_seconds = _retry_after(response.headers)
    return error


@contextlib.contextmanager
def _of_a_lease() -> Iterator[None]:
    """What is not found here belongs to a lease. Were it the lease itself, its other calls would say so."""
    try:
        yield
    except NotFoundError as error:
        raise MissingError(error.message, request_id=error.request_id) from error


class WorkerClient:
    """Speaks with the service under one key.

    Every method but `persist` tries once and raises the classes of `dar.errors`: `ServiceConnectionError` when the service
    cannot be reached, `FencedError` when the lease has passed to a successor.

    Args:
        url: Address of the service.
        key: The worker key, or the token of an attempt.
        node: Sent along, so that the service lets a worker key speak for the attempts that ran here.
        give_up: Asked during pauses; once it is true nothing is repeated any more.
    """

    def __init__(
        self, url: str, key: str, *, node: str, give_up: Callable[[], bool] = lambda: False
    ) -> None:
        self._url = url
        self._give_up = give_up
        self._http = httpx2.Client(
            base_url=f"{url}/v1/worker",
            headers={"authorization": f"Bearer {key}", "x-dar-node": node},
            trust_env=httpx2.URL(url).host not in LOOPBACK,
            verify=url.startswith(
                "https:"
            ),  # loading certificates costs 40 ms, which plain HTTP need not pay
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def persist(
        self,
        call: Callable[[], Answer],
        what: str,
        *,
        give_up: Callable[[], bool] | None = None,
        longest: float = LONGEST_PAUSE_SECONDS,
    ) -> Answer:
        """Repeat ``call`` until the service answers, with growing pauses.

        A service that is away is waited for however long it takes; one that fails at the call each time is not.

        Args:
            call: One of this client's methods with its arguments.
            what: Its name in log lines.
            give_up: Replaces the client's own.
            longest: Longest pause, in seconds.

        Raises:
            GaveUpError: ``give_up`` became true first.
            ServiceBrokenError: The service failed ten times in a row.
            DARError: The service refused, and would refuse again.
        """
        backoff, give_up, broken = Backoff(longest), give_up or self._give_up, 0
        while not give_up():
            try:
                return call()
            except DARError as error:
                broken = broken + 1 if isinstance(error, ServiceBrokenError) else 0
                if not error.retryable or broken == BROKEN_ANSWERS:
                    raise
                pause = backoff.next(error.retry_after_seconds)
                log.warning("repeating", call=what, seconds=round(pause, 1), error=error.message)
                self._sleep(pause, give_up)
        raise GaveUpError(what)

    @staticmethod
    def _sleep(seconds: float, give_up: Callable[[], bool]) -> None:
        until = time.monotonic() + seconds
        while not give_up() and (left := until - time.monotonic()) > 0:
            time.sleep(min(LOOK_SECONDS, left))

    def _send(
        self,
        method: str,
        path: str,
        *,
        read_seconds: float = READ_SECONDS,
        **options: Unpack[_Options],
    ) -> httpx2.Response:
        timeout = httpx2.Timeout(read_seconds, connect=CONNECT_SECONDS)
        try:
            response = self._http.request(method, path, timeout=timeout, **options)
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error
        if not response.is_success:
            raise error_of(response)
        return response

    def _unreachable(self, error: Exception) -> ServiceConnectionError:
        return ServiceConnectionError(
            f"no answer from the service at {self._url}: {str(error) or type(error).__name__}"
        )

    def _ask(
        self,
        answer: type[Model],
        method: str,
        path: str,
        body: BaseModel | None = None,
        *,
        read_seconds: float = READ_SECONDS,
        **options: Unpack[_Options],
    ) -> Model:
        if body is not None:
            options["content"] = encode(body)
            options["headers"] = {"content-type": "application/json"}
        return self._parse(answer, self._send(method, path, read_seconds=read_seconds, **options))

    def _parse(self, answer: type[Model], response: httpx2.Response) -> Model:
        try:
            return answer.model_validate_json(response.content)
        except ValidationError as error:
            raise ServiceUnavailableError(
                f"{response.url} answered something that is no {answer.__name__}: {error}"
            ) from error

    def claim(self, claim: Claim) -> Lease | None:
        """Ask for a job; None when there is none."""
        response = self._send(
            "POST",
            "/leases/claim",
            content=encode(claim),
            headers={"content-type": "application/json"},
        )
        return None if response.status_code == 204 else self._parse(Lease, response)

    def inputs(self, lease_id: str) -> Inputs:
        """The files of the attempt."""
        with _of_a_lease():
            return self._ask(Inputs, "GET", f"/leases/{lease_id}/inputs")

    def download(
        self, lease_id: str, name: str, offset: int, take: Callable[[Iterable[bytes]], None]
    ) -> None:
        """Stream an input file from ``offset`` on into ``take``; what it raises passes through."""
        headers = {"range": f"bytes={offset}-"} if offset else {}
        timeout = httpx2.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
        path = f"/leases/{lease_id}/inputs/{quote(name)}"
        try:
            with (
                _of_a_lease(),
                self._http.stream("GET", path, headers=headers, timeout=timeout) as response,
            ):
                if not response.is_success:
                    response.read()
                    raise error_of(response)
                if offset and response.status_code != 206:
                    raise ServiceUnavailableError(f"{response.url} ignored a byte range")
                take(response.iter_bytes())
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error

    def heartbeat(self, lease_id: str, heartbeat: Heartbeat) -> LeaseState:
        """Renew the lease."""
        return self._ask(
            LeaseState, "POST", f"/leases/{lease_id}/heartbeat", heartbeat, read_seconds=10.0
        )

    def directives(self, lease_id: str, after: str) -> Directives:
        """Wait for what the service wants of the attempt."""
        return self._ask(
            Directives,
            "GET",
            f"/leases/{lease_id}/directives",
            params={"after": after, "wait": DIRECTIVES_WAIT_SECONDS},
            read_seconds=DIRECTIVES_WAIT_SECONDS + 10.0,
        )

    def batch(self, lease_id: str, attempt: int, rows: Iterable[bytes]) -> BatchAck:
        """Send rows, each given as its JSON."""
        body = b'{"attempt":%d,"rows":[%s]}' % (attempt, b",".join(rows))
        return self._ask(
            BatchAck,
            "POST",
            f"/leases/{lease_id}/batch",
            content=gzip.compress(body, compresslevel=3),
            headers={"content-type": "application/json", "content-encoding": "gzip"},
        )

    def announce_rewards(
        self, lease_id: str, announced: AnnounceRewardRequests
    ) -> RewardRequestStates:
        """Have reward requests stored before they are sent."""
        return self._ask(
            RewardRequestStates, "POST", f"/leases/{lease_id}/reward_requests", announced
        )

    def note_rewards(self, lease_id: str, said: NoteRewardProgress) -> RewardProgressNoted:
        """Say what became of reward requests."""
        return self._ask(
            RewardProgressNoted, "POST", f"/leases/{lease_id}/reward_requests/progress", said
        )

    def register(self, lease_id: str, checkpoint: RegisterCheckpoint) -> CheckpointUpload:
        """Announce a checkpoint; repeating it tells what has arrived."""
        return self._ask(CheckpointUpload, "POST", f"/leases/{lease_id}/checkpoints", checkpoint)

    def put_part(
        self,
        lease_id: str,
        checkpoint_id: str,
        name: str,
        part: bytes,
        *,
        attempt: int,
        offset: int,
    ) -> CheckpointUpload:
        """Send a part of a checkpoint's file."""
        with _of_a_lease():
            return self._ask(
                CheckpointUpload,
                "PUT",
                f"/leases/{lease_id}/checkpoints/{checkpoint_id}/files/{quote(name)}",
                params={"attempt": attempt, "offset": offset},
                content=part,
                headers={"content-type": "application/octet-stream"},
            )

    def commit(self, lease_id: str, checkpoint_id: str, attempt: int) -> CheckpointUpload:
        """Have the service verify a checkpoint and show it."""
        with _of_a_lease():
            return self._ask(
                CheckpointUpload,
                "POST",
                f"/leases/{lease_id}/checkpoints/{checkpoint_id}/commit",
                AttemptOf(attempt=attempt),
                read_seconds=COMMIT_SECONDS,
            )

    def end(self, lease_id: str, verdict: Complete | Fail | Release) -> Outcome:
        """Say how the attempt ended."""
        verb = type(verdict).__name__.lower()
        return self._ask(Outcome, "POST", f"/leases/{lease_id}/{verb}", verdict)


NUL, REPLACEMENT = "\0", "\N{REPLACEMENT CHARACTER}"
_ESCAPED_NUL = b"\\u0000"


def encode(model: BaseModel) -> bytes:
    """``model`` as JSON without NUL, in its texts and in the names of what it holds."""
    content = model.model_dump_json().encode()
    if _ESCAPED_NUL not in content:
        return content
    return to_json(_without_nul(model.model_dump(mode="json")))


def _without_nul(value: object) -> object:
    if isinstance(value, str):
        return value.replace(NUL, REPLACEMENT)
    if isinstance(value, dict):
        return {_without_nul(key): _without_nul(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nul(item) for item in value]
    return value
