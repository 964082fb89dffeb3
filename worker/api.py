"""The worker's client of ``/v1/worker``: one method per route, and repetition during outages."""

import contextlib
import gzip
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypedDict, TypeVar, Unpack
from urllib.parse import quote

import httpx2
import structlog
from pydantic import BaseModel

from dar.client.transport import RetryPolicy, Transport, call_with_retries
from dar.errors import DARError, NotFoundError, ServiceUnavailableError
from dar.protocol.worker import (
    AnnounceRewardRequests,
    AttemptOf,
    BatchAck,
    CheckpointParts,
    CheckpointUpload,
    Claim,
    Complete,
    DamagedInputs,
    Directives,
    DirectParts,
    Fail,
    Heartbeat,
    Inputs,
    Lease,
    LeaseState,
    NoteRewardProgress,
    Outcome,
    PinRevisions,
    RegisterCheckpoint,
    Release,
    RevisionsPinned,
    RewardProgressNoted,
    RewardRequestStates,
    TrainerLog,
)
from worker.spool import encode

log = structlog.get_logger(__name__)

LONGEST_PAUSE_SECONDS = 30.0
READ_SECONDS = 30.0
COMMIT_SECONDS = 600.0
"""The service hashes every file of a checkpoint before it responds to a commit."""
PARTS_SECONDS = 120.0
"""The service asks its store several times before it responds, and puts finished files together."""
DIRECTIVES_WAIT_SECONDS = 20
LOG_SECONDS = 2.0
"""A log that the service does not take in this time is sent again later, or not at all."""
LOOK_SECONDS = 0.1
"""How often a pause checks whether to give up."""
BROKEN_ANSWERS = 10
"""HTTP 500s in a row, over a minute and a half, after which a call is not repeated."""
JSON_TYPE = {"content-type": "application/json"}

Answer = TypeVar("Answer")
Model = TypeVar("Model", bound=BaseModel)


class GaveUpError(Exception):
    """A call is not repeated, because its result is no longer needed."""


class ServiceBrokenError(DARError):
    """The service failed at a request (HTTP 500) and may fail at it every time."""


class MissingError(DARError):
    """The service lacks a file or a checkpoint of a lease."""

    code = "missing"
    retryable = False


class _Options(TypedDict, total=False):
    """Parts of a request besides method and path."""

    content: bytes
    headers: dict[str, str]
    params: dict[str, str | int]
    timeout: float


@contextlib.contextmanager
def _of_a_lease() -> Iterator[None]:
    """Turn "not found" into `MissingError`.

    It concerns a file or checkpoint of the lease. If the lease itself were gone, heartbeats would
    report that.
    """
    try:
        yield
    except NotFoundError as error:
        raise MissingError(error.message, request_id=error.request_id) from error


class WorkerClient:
    """The worker API with one key.

    Every method but `until_answered` tries once and raises the classes of `dar.errors`:
    `ServiceConnectionError` when the service cannot be reached, `FencedError` when another attempt
    holds the lease.

    Args:
        url: URL of the service.
        key: The worker key, or the token of an attempt.
        node: Sent along. It lets a worker key act for the attempts that ran on this node.
        give_up: Polled during pauses; once it returns True, calls are not repeated.
    """

    def __init__(
        self, url: str, key: str, *, node: str, give_up: Callable[[], bool] = lambda: False
    ) -> None:
        self._give_up = give_up
        self._transport = Transport(
            key,
            url,
            timeout=READ_SECONDS,
            headers={"x-dar-node": node},
            follow_redirects=False,
        )

    def close(self) -> None:
        self._transport.close()

    def until_answered(
        self,
        call: Callable[[], Answer],
        what: str,
        *,
        give_up: Callable[[], bool] | None = None,
        longest: float = LONGEST_PAUSE_SECONDS,
    ) -> Answer:
        """Repeat ``call`` until the service responds, with growing pauses.

        An unreachable service is waited for without limit. A service that fails at the call each
        time is not.

        Args:
            call: One of this client's methods with its arguments.
            what: Its name in log lines.
            give_up: Replaces the client's own.
            longest: Longest pause, in seconds.

        Raises:
            GaveUpError: ``give_up`` returned True first.
            ServiceBrokenError: The service failed ten times in a row.
            DARError: The service rejected the call and would reject it again.
        """
        is_over = give_up or self._give_up

        def pause(seconds: float, error: DARError) -> None:
            log.warning("repeating", call=what, seconds=round(seconds, 1), error=error.message)
            until = time.monotonic() + seconds
            while not is_over() and (left := until - time.monotonic()) > 0:
                time.sleep(min(LOOK_SECONDS, left))
            if is_over():
                raise GaveUpError(what)

        if is_over():
            raise GaveUpError(what)
        policy = RetryPolicy(
            BROKEN_ANSWERS,
            longest,
            pause,
            counts=lambda error: isinstance(error, ServiceBrokenError),
        )
        return call_with_retries(call, policy)

    @contextlib.contextmanager
    def _open(
        self, method: str, path: str, **options: Unpack[_Options]
    ) -> Iterator[httpx2.Response]:
        with contextlib.ExitStack() as stack:
            try:
                response = stack.enter_context(
                    self._transport.open(method, f"/worker{path}", **options)
                )
            except DARError as error:
                if error.status != ServiceBrokenError.status:
                    raise
                raise ServiceBrokenError(
                    f"{error.message} (request {error.request_id})",
                    code=error.error_code,
                    request_id=error.request_id,
                    retry_after_seconds=error.retry_after_seconds,
                ) from error
            yield response

    def _send(self, method: str, path: str, **options: Unpack[_Options]) -> httpx2.Response:
        with self._open(method, path, **options) as response:
            response.read()
            return response

    def _request(
        self,
        answer: type[Model],
        method: str,
        path: str,
        body: BaseModel | None = None,
        **options: Unpack[_Options],
    ) -> Model:
        if body is not None:
            options |= {"content": encode(body), "headers": JSON_TYPE}
        return self._transport.parse(self._send(method, path, **options), answer)

    def claim(self, claim: Claim, *, timeout: float = READ_SECONDS) -> Lease | None:
        """Request a job; None when there is none that this worker can run."""
        response = self._send(
            "POST", "/leases/claim", content=encode(claim), headers=JSON_TYPE, timeout=timeout
        )
        return None if response.status_code == 204 else self._transport.parse(response, Lease)

    def inputs(self, lease_id: str) -> Inputs:
        with _of_a_lease():
            return self._request(Inputs, "GET", f"/leases/{lease_id}/inputs")

    def pin(self, lease_id: str, given: PinRevisions) -> RevisionsPinned:
        """Fix the commits of hub models for all attempts of the job."""
        with _of_a_lease():
            return self._request(RevisionsPinned, "POST", f"/leases/{lease_id}/revisions", given)

    def check_inputs(self, lease_id: str, attempt: int) -> DamagedInputs:
        """Make the service read every byte of the attempt's checkpoints."""
        path = f"/leases/{lease_id}/inputs/check"
        with _of_a_lease():
            return self._request(
                DamagedInputs, "POST", path, AttemptOf(attempt=attempt), timeout=COMMIT_SECONDS
            )

    def download(
        self, lease_id: str, name: str, offset: int, take: Callable[[Iterable[bytes]], None]
    ) -> None:
        """Stream an input file from ``offset`` on into ``take``, whose exceptions pass through."""
        headers = {"range": f"bytes={offset}-"} if offset else {}
        path = f"/leases/{lease_id}/inputs/{quote(name)}"
        with _of_a_lease(), self._open("GET", path, headers=headers) as response:
            if offset and response.status_code != 206:
                raise ServiceUnavailableError(f"{response.url} ignored a byte range")
            take(response.iter_bytes())

    def heartbeat(self, lease_id: str, heartbeat: Heartbeat) -> LeaseState:
        """Renew the lease."""
        path = f"/leases/{lease_id}/heartbeat"
        return self._request(LeaseState, "POST", path, heartbeat, timeout=10.0)

    def directives(self, lease_id: str, after: str) -> Directives:
        """Long-poll for directives after the cursor ``after``."""
        return self._request(
            Directives,
            "GET",
            f"/leases/{lease_id}/directives",
            params={"after": after, "wait": DIRECTIVES_WAIT_SECONDS},
            timeout=DIRECTIVES_WAIT_SECONDS + 10.0,
        )

    def batch(
        self, lease_id: str, attempt: int, rows: Iterable[bytes], job_id: str = ""
    ) -> BatchAck:
        """Send rows, each given as its JSON. A service without the job reports ``job_id``."""
        body = b'{"attempt":%d,"rows":[%s]}' % (attempt, b",".join(rows))
        return self._request(
            BatchAck,
            "POST",
            f"/leases/{lease_id}/batch",
            content=gzip.compress(body, compresslevel=3),
            headers={**JSON_TYPE, "content-encoding": "gzip", "x-dar-job": job_id},
        )

    def put_log(self, lease_id: str, log: TrainerLog) -> None:
        """Replace the end of the trainer's log."""
        path = f"/leases/{lease_id}/log"
        self._send("PUT", path, content=encode(log), headers=JSON_TYPE, timeout=LOG_SECONDS)

    def announce_rewards(
        self, lease_id: str, announced: AnnounceRewardRequests
    ) -> RewardRequestStates:
        """Store reward requests before they are sent."""
        return self._request(
            RewardRequestStates, "POST", f"/leases/{lease_id}/reward_requests", announced
        )

    def note_rewards(self, lease_id: str, progress: NoteRewardProgress) -> RewardProgressNoted:
        """Report the state of reward requests."""
        return self._request(
            RewardProgressNoted, "POST", f"/leases/{lease_id}/reward_requests/progress", progress
        )

    def register(self, lease_id: str, checkpoint: RegisterCheckpoint) -> CheckpointUpload:
        """Announce a checkpoint. A repeated call returns how many bytes of each file arrived."""
        path = f"/leases/{lease_id}/checkpoints"
        return self._request(CheckpointUpload, "POST", path, checkpoint)

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
            return self._request(
                CheckpointUpload,
                "PUT",
                f"/leases/{lease_id}/checkpoints/{checkpoint_id}/files/{quote(name)}",
                params={"attempt": attempt, "offset": offset},
                content=part,
                headers={"content-type": "application/octet-stream"},
            )

    def direct_parts(
        self, lease_id: str, checkpoint_id: str, parts: CheckpointParts
    ) -> DirectParts:
        """Requests for the next parts that go directly to the store; none: all are there."""
        path = f"/leases/{lease_id}/checkpoints/{checkpoint_id}/parts"
        with _of_a_lease():
            return self._request(DirectParts, "POST", path, parts, timeout=PARTS_SECONDS)

    def commit(self, lease_id: str, checkpoint_id: str, attempt: int) -> CheckpointUpload:
        """Make the service verify a checkpoint and list it."""
        path = f"/leases/{lease_id}/checkpoints/{checkpoint_id}/commit"
        with _of_a_lease():
            return self._request(
                CheckpointUpload, "POST", path, AttemptOf(attempt=attempt), timeout=COMMIT_SECONDS
            )

    def end(self, lease_id: str, end: Complete | Fail | Release) -> Outcome:
        """Report how the attempt ended."""
        verb = type(end).__name__.lower()
        return self._request(Outcome, "POST", f"/leases/{lease_id}/{verb}", end)
