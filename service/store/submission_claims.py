"""Submissions without an ``Idempotency-Key``: one try and its retries make one job.

The OpenAI client sends no key by default; ``x-stainless-retry-count`` numbers the tries of a call.
They may arrive at the same time and in any order, as when the database was stalled. One row for
each API key and body has the recent calls with their tries. It is locked from before the first look
until the job is committed, so concurrent tries wait for each other.

A call has each number once. A try belongs to a call that lacks its number; otherwise it begins a
new call. So two meant calls make two jobs, unless the first try of one of them never arrived.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

from sqlalchemy import delete, select
from sqlalchemy.dialects import postgresql, sqlite

from service.store.database import Transaction
from service.store.tables import JobRow, SubmissionClaimRow

RETRY_WINDOW = timedelta(seconds=620)
"""How long after a try a retry of the same call may come: the ten minutes that the OpenAI client
waits for an answer, and its pause."""
FIRST_WINDOW = timedelta(seconds=120)
"""How long after a retry the first try of the same call may come: longer than the service works on
a request. A second call with the same body is taken for that first try, so the time is short."""


@dataclass(slots=True)
class SubmittedCall:
    """A call that has made a job."""

    job_id: str
    tries: list[int]
    """Numbers of its tries that have arrived; 0 is the first one."""
    at: float
    """When the newest of them arrived, in seconds since 1970."""


class SubmissionClaim:
    """The recent calls of an API key with one body.

    Args:
        transaction: Where they are read.
        row: Their row.
    """

    def __init__(self, transaction: Transaction, row: SubmissionClaimRow) -> None:
        self._transaction = transaction
        self._row = row
        oldest = (transaction.now - RETRY_WINDOW).timestamp()
        calls = [SubmittedCall(**one) for one in row.calls]
        self._calls = [call for call in calls if call.at > oldest]

    def match(self, number: int) -> JobRow | None:
        """The job of the newest call that lacks the try ``number``; None: a new call begins."""
        return self._job_of(self._call_without(number))

    def take(self, number: int) -> JobRow | None:
        """Like `match`, and note the try as one of that call."""
        call = self._call_without(number)
        job = self._job_of(call)
        if call is not None and job is not None:
            call.tries.append(number)
            call.at = self._transaction.now.timestamp()
            self._store()
        return job

    def add(self, job_id: str, number: int) -> None:
        """Note a new call, whose try ``number`` has made a job."""
        self._calls.append(SubmittedCall(job_id, [number], self._transaction.now.timestamp()))
        self._store()

    def _job_of(self, call: SubmittedCall | None) -> JobRow | None:
        job = None if call is None else self._transaction.get(JobRow, call.job_id)
        return None if job is None or job.deleted_at is not None else job

    def _call_without(self, number: int) -> SubmittedCall | None:
        oldest = (self._transaction.now - FIRST_WINDOW).timestamp()
        fitting = [
            call
            for call in self._calls
            if number not in call.tries and (number > 0 or call.at > oldest)
        ]
        return fitting[-1] if fitting else None

    def _store(self) -> None:
        self._row.calls = [asdict(call) for call in self._calls]
        self._row.seen_at = self._transaction.now
        self._transaction.flush()


def find(transaction: Transaction, api_key_id: str, body_sha256: str) -> SubmissionClaim | None:
    """The recent calls, without a lock; None if there are none."""
    row = transaction.get(SubmissionClaimRow, (api_key_id, body_sha256))
    return None if row is None else SubmissionClaim(transaction, row)


def lock(transaction: Transaction, api_key_id: str, body_sha256: str) -> SubmissionClaim:
    """The recent calls, locked until the transaction ends."""
    insert = postgresql.insert if transaction.is_postgresql else sqlite.insert
    identity = {"api_key_id": api_key_id, "body_sha256": body_sha256}
    is_new = transaction.scalars(
        insert(SubmissionClaimRow)
        .values(**identity, calls=[], seen_at=transaction.now)
        .on_conflict_do_nothing()
        .returning(SubmissionClaimRow.body_sha256)
    ).first()
    row = transaction.scalars(
        select(SubmissionClaimRow)
        .filter_by(**identity)
        .with_for_update()
        .execution_options(populate_existing=True)
    ).one()
    if is_new:
        row.calls = [asdict(call) for call in _calls_before(transaction, api_key_id, body_sha256)]
    return SubmissionClaim(transaction, row)


def _calls_before(
    transaction: Transaction, api_key_id: str, body_sha256: str
) -> Sequence[SubmittedCall]:
    """Calls that an earlier version of the service, which had no such rows, has stored as jobs."""
    jobs = transaction.scalars(
        select(JobRow)
        .where(
            JobRow.api_key_id == api_key_id,
            JobRow.body_sha256 == body_sha256,
            JobRow.created_at > transaction.now - RETRY_WINDOW,
            JobRow.idempotency_key.is_(None),
        )
        .order_by(JobRow.created_at)
    )
    return [SubmittedCall(job.id, [job.retry_count], job.created_at.timestamp()) for job in jobs]


def shift(transaction: Transaction, forward: timedelta) -> None:
    """Move calls along with a clock that was set ``forward``: their retries are still to come."""
    recent = SubmissionClaimRow.seen_at > transaction.now - forward - RETRY_WINDOW
    for row in transaction.scalars(select(SubmissionClaimRow).where(recent).with_for_update()):
        row.seen_at += forward
        seconds = forward.total_seconds()
        row.calls = [{**call, "at": call["at"] + seconds} for call in row.calls]
    transaction.flush()


def forget(transaction: Transaction) -> None:
    """Delete calls to which no retry can come any more."""
    transaction.execute(
        delete(SubmissionClaimRow)
        .where(SubmissionClaimRow.seen_at < transaction.now - RETRY_WINDOW)
        .execution_options(synchronize_session=False)
    )
