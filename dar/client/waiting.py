"""Following a job by polling: until it ends, its new metrics, its growing log.

What is followed is written once, as steps: items, and pauses before the next request. `Following`
sleeps through the pauses; the asynchronous client waits through them without a thread.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar, get_args

from dar.client.transport import MAX_RETRY_AFTER_SECONDS, check_seconds
from dar.errors import ConfigurationError, ConflictError, DARError, NotFoundError
from dar.protocol.jobs import Job, JobLog
from dar.protocol.metrics import Metrics
from dar.protocol.status import TERMINAL

Item = TypeVar("Item")
OnPause = Literal["return", "raise", "wait"]
log = logging.getLogger("dar.client.jobs")
STALLED = frozenset({"backoff", "waiting_for_reward", "reward", "by_user"})
"""Values of `status_detail` at which a person may have to change something."""
REPEAT_SECONDS = 30.0
"""Shortest time between two log lines about the same wait, whose message may change often."""
OUTAGE_SECONDS = 300.0
"""How long following a job tolerates failures that may pass: jobs continue while a service
restarts, or while a proxy in front of it does."""


@dataclass(frozen=True, slots=True)
class Pause:
    """A wait before the next step."""

    seconds: float


class Following(Generic[Item]):
    """Items that come over time. Iterating begins anew, and waits for the next item."""

    def __init__(self, steps: Callable[[], Iterator[Item | Pause]]) -> None:
        self.steps = steps

    def __iter__(self) -> Iterator[Item]:
        for step in self.steps():
            if isinstance(step, Pause):
                time.sleep(step.seconds)
            else:
                yield step


class _Outage:
    """How long the service has not answered."""

    def __init__(self) -> None:
        self._answered = time.monotonic()

    def end(self) -> None:
        self._answered = time.monotonic()

    def pause(self, error: DARError, least: float) -> float:
        """Seconds to wait after an error.

        Raises:
            DARError: It does not pass, or has not passed for 300 s.
        """
        if not error.retryable or time.monotonic() - self._answered > OUTAGE_SECONDS:
            raise error
        return max(least, min(error.retry_after_seconds or 0.0, MAX_RETRY_AFTER_SECONDS))


class Watch:
    """The changes of a job until it ends.

    Args:
        job_id: The job.
        on_pause: As of `Jobs.wait`.
        poll_seconds: Pause between two requests.
        timeout_seconds: Longest wait; None: no limit.

    Raises:
        ConfigurationError: An argument is out of range.
    """

    def __init__(
        self, job_id: str, on_pause: OnPause, poll_seconds: float, timeout_seconds: float | None
    ) -> None:
        _check_wait(on_pause, poll_seconds, timeout_seconds)
        self._job_id = job_id
        self._on_pause: OnPause = on_pause
        self._poll_seconds = poll_seconds
        self._timeout_seconds = timeout_seconds

    def steps(self, fetch: Callable[[], Job]) -> Iterator[Job | Pause]:
        """The job at the start and after each change, and the pauses between.

        Raises:
            ConflictError: The job is paused, only its user can end that, and ``on_pause`` is
                ``raise``.
            TimeoutError: The job has not ended in time.
            DARError: For 300 s the service could not be reached.
        """
        started, outage, stalls = time.monotonic(), _Outage(), _StallLog()
        seen: Job | None = None
        while True:
            pause = self._poll_seconds
            try:
                job = fetch()
            except DARError as error:
                pause = outage.pause(error, pause)
            else:
                outage.end()
                if job != seen:
                    yield job
                stalls.note(job)
                if _is_over(job, self._on_pause):
                    return
                seen = job
            if self._timeout_seconds is not None:
                left = started + self._timeout_seconds - time.monotonic()
                if left < 0:
                    state = f"{self._job_id} is not reached" if seen is None else _state(seen)
                    raise TimeoutError(f"after {self._timeout_seconds:g} s, job {state}")
                pause = min(pause, left)
            yield Pause(pause)


def ended(job: Job | None) -> Job:
    """The job with which a watch has ended; a watch yields at least one."""
    assert job is not None
    return job


def metric_steps(
    read: Callable[[str | None], Metrics], cursor: str | None, poll_seconds: float | None
) -> Iterator[Metrics | Pause]:
    """What is new of a job's series, until the job has ended and nothing is new.

    Raises:
        DARError: For 300 s the service could not be reached, or it has returned an error.
    """
    outage, pause = _Outage(), 1.0 if poll_seconds is None else poll_seconds
    while True:
        try:
            new = read(cursor)
        except DARError as error:
            yield Pause(outage.pause(error, pause))
            continue
        outage.end()
        cursor = new.cursor
        if new.series or new.rewound_to is not None:
            yield new
        elif new.status in TERMINAL:
            return
        else:
            yield Pause(new.poll_after_ms / 1000 if poll_seconds is None else pause)


def log_steps(
    fetch: Callable[[], Job],
    read: Callable[[int | None, int | None], JobLog],
    only: int | None,
    poll_seconds: float,
) -> Iterator[JobLog | Pause]:
    """What is new in the logs of a job's attempts, until the job has ended.

    Args:
        fetch: Asks for the job.
        read: Asks for the log of an attempt (None: the newest) after a number of bytes.
        only: The only attempt; None: the newest, and those that follow it.
        poll_seconds: Pause between two requests.

    Raises:
        DARError: For 300 s the service could not be reached, or it has returned an error.
    """
    outage, attempt, size = _Outage(), only, None
    while True:
        try:
            is_last = fetch().status in TERMINAL
            parts = []
            if attempt is not None and size is not None:
                parts.append(read(attempt, size))
            newest = read(only, None)
            if size is None or newest.attempt != attempt:
                parts.append(newest)
        except NotFoundError:  # no log yet; `fetch` says whether the job exists
            fetch()
            parts = []
        except DARError as error:
            yield Pause(outage.pause(error, poll_seconds))
            continue
        outage.end()
        for part in parts:
            attempt, size = part.attempt, part.bytes
            if part.text:
                yield part
        if is_last:
            return
        yield Pause(poll_seconds)


def needs_user(job: Job) -> bool:
    """Whether a job is paused, and the service does not resume it by itself."""
    if job.status != "paused":
        return False
    rewards = ((job.method or {}).get("dar") or {}).get("rewards") or {}
    # The service checks the reward services of a job that is paused for rewards, and resumes it.
    is_checked = any(one.get("kind") == "http" for one in rewards.get("components", ()))
    return job.status_detail != "reward" or not is_checked


def _check_wait(on_pause: str, poll_seconds: float, timeout_seconds: float | None) -> None:
    """Check the arguments of a watch.

    Raises:
        ConfigurationError: One is out of range.
    """
    check_seconds("poll_seconds", poll_seconds)
    if timeout_seconds is not None:
        check_seconds("timeout_seconds", timeout_seconds, most=math.inf)
    if on_pause not in get_args(OnPause):
        raise ConfigurationError(
            f"on_pause is {on_pause!r}, but it must be {', '.join(get_args(OnPause))}",
            param="on_pause",
        )


def _is_over(job: Job, on_pause: OnPause) -> bool:
    """Whether a wait for ``job`` ends.

    Raises:
        ConflictError: The job is paused, only its user can end that, and ``on_pause`` is ``raise``.
    """
    if job.status in TERMINAL:
        return True
    if on_pause == "raise" and needs_user(job):
        raise ConflictError(
            f"job {_state(job)}; client.jobs.resume({job.id!r}) continues it", code="job_paused"
        )
    return on_pause == "return" and needs_user(job)


def _state(job: Job) -> str:
    """A job's id, status, detail and message."""
    detail = f" ({job.status_detail})" if job.status_detail else ""
    message = f": {job.status_message}" if job.status_message else ""
    return f"{job.id} is {job.status}{detail}{message}"


class _StallLog:
    """Logs that a job waits for something: at once, and again when the reason changes."""

    def __init__(self) -> None:
        self._seen: tuple[str, str | None] | None = None
        self._state = ""
        self._logged = 0.0

    def note(self, job: Job) -> None:
        kind, state, now = (job.status, job.status_detail), _state(job), time.monotonic()
        is_new = kind != self._seen or (
            state != self._state and now - self._logged >= REPEAT_SECONDS
        )
        if job.status_detail in STALLED and is_new:
            log.warning("job %s", state)
            self._state, self._logged = state, now
        self._seen = kind
