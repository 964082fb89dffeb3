"""What must become of jobs and their attempts, as a model without a database.

It knows what the state table of `service.store.transitions` promises, and nothing of how that is
done. `tests/store/test_state_machine.py` compares it with the real store after every message.
"""

from dataclasses import dataclass, field
from typing import Literal

from dar.errors import ConflictError, FencedError, NotFoundError
from dar.protocol.status import TERMINAL

STEPS = 2
MOST_OWN_FAILURES, MOST_NODES, MOST_LOSSES = 3, 3, 5
Place = tuple[str, str]
"""Node and slot."""


@dataclass
class ModelAttempt:
    """An attempt, as the service knows it, and how far its trainer is."""

    job: "ModelJob"
    lease_id: str
    place: Place
    process: int
    start: int
    number: int
    seen: float
    status: str = "running"
    is_renewed: bool = False
    acked: int = 0
    end: tuple[str, str] | None = None
    """The call that ended it, and the job's status then."""
    trained: int = 0
    """Steps that its trainer has done, which the service may not know yet."""
    announced: dict[int, str] = field(default_factory=dict)
    """Step -> checkpoint."""

    @property
    def step(self) -> int:
        return self.start + self.trained


@dataclass
class ModelJob:
    """A job."""

    id: str
    status: str = "queued"
    is_cancelling: bool = False
    is_stopping: bool = False
    is_waiting_for_reward: bool = False
    is_deleted: bool = False
    attempts: list[ModelAttempt] = field(default_factory=list)
    published: dict[str, int] = field(default_factory=dict)
    """Its checkpoints, with their steps."""
    own: int = 0
    failed: int = 0
    lost_on: list[str] = field(default_factory=list)
    counts_from: int = 1

    @property
    def newest(self) -> int:
        """Step of its newest checkpoint; 0: it has none."""
        return max(self.published.values(), default=0)

    @property
    def newest_id(self) -> str:
        return max(self.published, key=self.published.__getitem__, default="ckpt-none")

    @property
    def attempt(self) -> ModelAttempt | None:
        """The running attempt."""
        return next((one for one in self.attempts if one.status == "running"), None)

    def check_exists(self) -> None:
        if self.is_deleted:
            raise NotFoundError("deleted")


class JobModel:
    """All jobs, and which process of each worker may claim."""

    def __init__(self) -> None:
        self.jobs: dict[str, ModelJob] = {}
        self.by_key: dict[str, str] = {}
        self._processes: dict[Place, list[int]] = {}

    @property
    def attempts(self) -> list[ModelAttempt]:
        return [attempt for job in self.jobs.values() for attempt in job.attempts]

    # --- what users ask ---

    def submit(self, key: str, job_id: str) -> str:
        known = self.by_key.setdefault(key, job_id)
        self.jobs.setdefault(known, ModelJob(known))
        return known

    def cancel(self, job: ModelJob) -> str:
        job.check_exists()
        if job.status in {"queued", "paused"}:
            job.status, job.is_cancelling = "cancelled", True
            job.is_waiting_for_reward = False
        elif job.status in {"running", "pausing"} and not job.is_cancelling:
            job.status, job.is_cancelling = "running", True
        elif job.status not in {"cancelled", "running"}:
            raise ConflictError("over")
        return job.status

    def pause(self, job: ModelJob) -> str:
        job.check_exists()
        is_ending = job.is_stopping or job.is_cancelling
        if job.status in TERMINAL or (job.status == "running" and is_ending):
            raise ConflictError("over or ending")
        if job.status == "queued":
            job.status, job.is_waiting_for_reward = "paused", False
        elif job.status == "running":
            job.status = "pausing"
        return job.status

    def stop(self, job: ModelJob) -> str:
        job.check_exists()
        is_asked = job.is_stopping and not job.is_cancelling
        if is_asked and job.status in {"queued", "running", "succeeded"}:
            return job.status
        if job.status in {"queued", "paused"} and job.newest:
            job.status, job.is_stopping = "succeeded", True
            job.is_waiting_for_reward = False
        elif job.status in {"running", "pausing"} and not job.is_cancelling:
            job.status, job.is_stopping = "running", True
        else:
            raise ConflictError("nothing to end with")
        return job.status

    def resume(self, job: ModelJob) -> str:
        job.check_exists()
        if job.status == "succeeded" or (job.status == "running" and job.is_cancelling):
            raise ConflictError("over or ending")
        if job.status in {"failed", "cancelled"}:
            job.is_cancelling = job.is_stopping = False
            self._forget_failures(job, len(job.attempts) + 1)
        if job.status == "pausing":
            job.status = "running"
        elif job.status != "running":
            job.status = "queued"
        return job.status

    def delete(self, job: ModelJob) -> str:
        job.check_exists()
        if job.status not in TERMINAL:
            raise ConflictError("it has not ended")
        job.is_deleted = True
        self.by_key = {key: one for key, one in self.by_key.items() if one != job.id}
        return "deleted"

    def pass_probe(self, job: ModelJob) -> bool:
        """The reward service answers again; returns whether the job waited for that."""
        is_due = job.status == "queued" and job.is_waiting_for_reward
        if is_due:
            job.is_waiting_for_reward = False
        return is_due

    # --- what workers say ---

    def check_in(self, place: Place, process: int) -> None:
        """A process of a worker claims: what the worker has run until now, it runs no more."""
        known = self._processes.setdefault(place, [process])
        if process in known[:-1]:
            raise ConflictError("it was replaced")
        if process != known[-1]:
            known.append(process)
        for attempt in self.attempts:
            if attempt.place == place and attempt.status == "running":
                if attempt.process == process and not attempt.is_renewed:
                    self._end(attempt, "drained")
                else:
                    self.lose(attempt)

    def start(
        self, job: ModelJob, place: Place, process: int, lease_id: str, seen: float
    ) -> ModelAttempt:
        number = len(job.attempts) + 1
        attempt = ModelAttempt(job, lease_id, place, process, job.newest, number, seen)
        job.attempts.append(attempt)
        job.status = "running"
        return attempt

    def renew(self, attempt: ModelAttempt, seen: float) -> str:
        self._check_fence(attempt)
        attempt.seen, attempt.is_renewed = seen, True
        return "renewed"

    def append(self, attempt: ModelAttempt, first: int, last: int) -> int:
        """Rows may come from any attempt, at any time, in any order."""
        attempt.job.check_exists()
        if first > attempt.acked + 1:
            raise ConflictError("gap")
        attempt.acked = max(attempt.acked, last)
        return attempt.acked

    def announce(self, attempt: ModelAttempt, step: int, last_seq: int) -> str:
        self._check_fence(attempt)
        if attempt.acked < last_seq:
            raise ConflictError("rows are missing")
        return "announced"

    def publish(self, attempt: ModelAttempt, step: int) -> str:
        self._check_fence(attempt)
        job = attempt.job
        made = attempt.announced[step]
        if made not in job.published:
            job.published[made] = step
            self._forget_failures(job, attempt.number + 1)
        return "published"

    def complete(self, attempt: ModelAttempt, last_seq: int, checkpoint_id: str) -> str:
        if (known := self._repeated(attempt, "complete")) is not None:
            return known
        self._check_fence(attempt)
        job = attempt.job
        step = job.published.get(checkpoint_id, 0)
        is_enough = step == STEPS or (step > 0 and job.is_stopping)
        if attempt.acked != last_seq or not is_enough:
            raise ConflictError("rows or the checkpoint are missing")
        return self._end(attempt, "succeeded", "complete", then="succeeded")

    def fail(self, attempt: ModelAttempt, kind: Literal["user", "own", "storage"]) -> str:
        if (known := self._repeated(attempt, "fail")) is not None:
            return known
        self._check_fence(attempt)
        if kind == "user":
            return self._end(attempt, "failed", "fail", then="failed")
        return self._end(attempt, "failed", "fail", is_own=kind == "own")

    def release(self, attempt: ModelAttempt, reason: str) -> str:
        if (known := self._repeated(attempt, "release")) is not None:
            return known
        self._check_fence(attempt)
        job = attempt.job
        if reason == "cancelled" and not job.is_cancelling:
            raise ConflictError("nobody has cancelled it")
        status = self._end(
            attempt, "drained", "release", free="paused" if reason == "paused_reward" else "queued"
        )
        job.is_waiting_for_reward = status == "queued" and reason == "waiting_for_reward"
        return status

    def lose(self, attempt: ModelAttempt) -> None:
        self._end(attempt, "lost", is_own=False)

    def _repeated(self, attempt: ModelAttempt, call: str) -> str | None:
        attempt.job.check_exists()
        return attempt.end[1] if attempt.end is not None and attempt.end[0] == call else None

    def _check_fence(self, attempt: ModelAttempt) -> None:
        attempt.job.check_exists()
        if attempt.status != "running":
            raise FencedError("another attempt has the job, or nobody")

    def _end(
        self,
        attempt: ModelAttempt,
        how: str,
        call: str | None = None,
        *,
        then: str | None = None,
        is_own: bool | None = None,
        free: str = "queued",
    ) -> str:
        """End an attempt. ``then``: the job ends too; ``is_own`` is None unless it has failed."""
        job = attempt.job
        attempt.status = how
        if then != "succeeded" and job.is_cancelling:
            job.status = "cancelled"
            attempt.status = "cancelled" if how == "drained" else how
        elif then is not None:
            job.status = then
        elif job.is_stopping and job.newest:
            job.status = "succeeded"
        elif is_own is not None and self._gives_up(attempt, is_own=is_own):
            job.status = "failed"
        elif job.status == "pausing":
            job.status = "paused"
        else:
            job.status = free
        attempt.end = None if call is None else (call, job.status)
        return job.status

    def _gives_up(self, attempt: ModelAttempt, *, is_own: bool) -> bool:
        job = attempt.job
        job.failed += 1
        if attempt.number < job.counts_from:
            return False
        job.own += is_own
        if attempt.status == "lost":
            job.lost_on.append(attempt.place[0])
        is_lost_too_often = not is_own and (
            len(set(job.lost_on)) >= MOST_NODES
            or job.lost_on.count(attempt.place[0]) >= MOST_LOSSES
        )
        return job.own >= MOST_OWN_FAILURES or is_lost_too_often

    def _forget_failures(self, job: ModelJob, counts_from: int) -> None:
        job.own, job.failed, job.lost_on, job.counts_from = 0, 0, [], counts_from
