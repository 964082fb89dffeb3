"""Requests to reward services with later results: announced by workers, answered by callbacks.

Everything here happens under the lock of the job's row. So one of several concurrent callbacks
wins, and results are numbered in the order of their commits: a reader that has seen a number has
seen all lower ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from sqlalchemy import and_, delete, func, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import aliased

from dar.errors import InvalidRequestError
from dar.protocol.status import TERMINAL
from dar.protocol.worker import FIRST_RESULT_ID, RewardAnnouncement, RewardProgress
from service.secret_box import Binding, SecretBox
from service.store import events
from service.store.database import Transaction
from service.store.fence import Held
from service.store.tables import JobRow, RewardDeliveryRow, RewardRequestRow

MAX_INVALID = 5
"""Invalid results after which a request accepts no more."""
MAX_TOKENS = 8
"""Valid tokens of one request: those of the newest announcements."""
REPLAY_WINDOW = timedelta(seconds=600)
KEPT = timedelta(days=1)
"""How long a request is kept after its deadline if its job has ended."""
KEPT_AT_MOST = timedelta(days=7)
PAGE_RESULTS, PAGE_BYTES = 64, 4 * 1024**2
"""Most results and bytes in one poll; a single result may be larger."""

CallbackOutcome = Literal[
    "accepted", "duplicate", "conflict", "late", "closed", "burned", "invalid", "replayed"
]
"""What `settle` did with a callback that had a valid token."""


@dataclass(frozen=True, slots=True)
class CallbackResult:
    """A body that was posted to a callback, checked."""

    text: str
    sha256: str
    error: str | None
    """Why the body is not a result of the request; None: it is one."""
    webhook_id: str | None = None
    """Digest of the id in the verified signature; None: not signed."""


def announce(
    transaction: Transaction,
    box: SecretBox,
    held: Held,
    wanted: RewardAnnouncement,
    *,
    is_signature_required: bool,
) -> RewardRequestRow:
    """Store a request before it is sent; a result from an earlier attempt is kept.

    The deadline is that of the first announcement. A request past its deadline, or with too many
    invalid results, starts again. One whose ``poll_url`` no key decrypts any more counts as not
    accepted, so that it is sent again.

    Args:
        transaction: The current transaction.
        box: Decrypts its ``poll_url``.
        held: The job and the attempt, locked.
        wanted: The request.
        is_signature_required: Whether a callback must be signed.

    Raises:
        InvalidRequestError: The id belongs to another job.
    """
    number = held.attempt.number
    row = transaction.get(RewardRequestRow, wanted.request_id)
    if row is None:
        row = RewardRequestRow(
            id=wanted.request_id,
            job_id=held.job.id,
            attempt=number,
            component=wanted.component,
            step=wanted.step,
            sample_ids=list(wanted.sample_ids),
            state="waiting",
            deadline=_deadline(transaction, wanted),
            token_hashes=wanted.token_sha256,
            is_signature_required=is_signature_required,
            is_accepted=False,
            invalid_count=0,
            reported="",
        )
        transaction.add(row)
        transaction.flush()
        return row
    if row.job_id != held.job.id:
        raise InvalidRequestError(
            f"request {wanted.request_id!r} belongs to another job", param="request_id"
        )
    is_repeated = row.attempt == number and wanted.token_sha256 in row.token_hashes
    row.attempt = number
    if row.poll_url is not None and not box.is_readable(row.poll_url):
        row.is_accepted, row.poll_url = False, None
    if row.state != "done" and not is_repeated:
        _announce_again(transaction, row, wanted)
    transaction.flush()
    return row


def _announce_again(
    transaction: Transaction, row: RewardRequestRow, wanted: RewardAnnouncement
) -> None:
    hashes = [*row.token_hashes.split(), wanted.token_sha256]
    row.token_hashes = " ".join(hashes[-MAX_TOKENS:])
    if row.deadline <= transaction.now or row.state == "burned":
        row.deadline = _deadline(transaction, wanted)
        row.is_accepted, row.poll_url, row.invalid_count = False, None, 0
        row.last_error, row.reported = None, ""
    row.state = "waiting"


def _deadline(transaction: Transaction, wanted: RewardAnnouncement) -> datetime:
    """The deadline of a new request, by the clock of the database where the worker allows that."""
    if wanted.seconds is None:
        return datetime.fromtimestamp(wanted.deadline, UTC)
    return transaction.now + timedelta(seconds=wanted.seconds)


def seconds_left(
    transaction: Transaction, row: RewardRequestRow, wanted: RewardAnnouncement
) -> float | None:
    """Time until the deadline, at most that of a new request: the clock may have been set back."""
    if wanted.seconds is None:
        return None
    left = (row.deadline - transaction.now).total_seconds()
    return min(max(left, 0.0), wanted.seconds)


def _binding(row: RewardRequestRow, held: Held) -> Binding:
    return Binding(held.job.project_id, row.id, "", "poll_url")


def poll_url_of(row: RewardRequestRow, box: SecretBox, held: Held) -> str | None:
    """The decrypted ``poll_url``, which may contain a token of the reward service."""
    return None if row.poll_url is None else box.open(_binding(row, held), row.poll_url)


def note_progress(
    transaction: Transaction, box: SecretBox, held: Held, notes: Sequence[RewardProgress]
) -> list[str]:
    """Store, in order, that the service accepted requests or that results came another way.

    A ``poll_url`` is stored encrypted.

    Returns:
        Ids that the job has not announced, each once. They may have expired, and do not affect the
        others.
    """
    found = transaction.scalars(
        select(RewardRequestRow).where(
            RewardRequestRow.job_id == held.job.id,
            RewardRequestRow.id.in_({note.request_id for note in notes}),
        )
    )
    rows = {row.id: row for row in found}
    for note in notes:
        row = rows.get(note.request_id)
        if row is None:
            continue
        if note.state == "accepted":
            url = note.poll_url
            row.is_accepted = True
            row.poll_url = None if url is None else box.seal(_binding(row, held), url)
        elif row.state == "waiting":
            row.state = "closed"
    transaction.flush()
    return list(dict.fromkeys(note.request_id for note in notes if note.request_id not in rows))


def find(transaction: Transaction, request_id: str) -> RewardRequestRow | None:
    """The request with this id; None if there is none."""
    return transaction.get(RewardRequestRow, request_id)


def job_of(transaction: Transaction, row: RewardRequestRow) -> JobRow:
    """The job that sent the request."""
    return transaction.get_one(JobRow, row.job_id)


def settle(
    transaction: Transaction, request_id: str, result: CallbackResult
) -> tuple[CallbackOutcome, str]:
    """Check a callback that had a valid token, and store its result if it is the first valid one.

    Returns:
        The outcome, and the id of the job.
    """
    job = _job_locked(transaction, request_id)  # first, as everywhere
    assert job is not None
    row = transaction.get_one(RewardRequestRow, request_id)
    outcome = _outcome_of(transaction, job, row, result)
    if outcome == "accepted" and not _consume(transaction, row, result):
        outcome = "conflict"
    elif outcome in {"late", "conflict", "burned"}:
        _append_event_once(transaction, row, outcome)
    transaction.flush()
    return outcome, job.id


def _outcome_of(
    transaction: Transaction, job: JobRow, row: RewardRequestRow, result: CallbackResult
) -> CallbackOutcome:
    if result.webhook_id is not None and not _is_fresh(transaction, row.id, result):
        return "replayed"
    if row.state == "done":
        return "duplicate" if result.sha256 == row.body_hash else "conflict"
    if row.state in {"closed", "burned"}:
        return "closed" if row.state == "closed" else "burned"
    is_over = job.status in TERMINAL or job.cancel_requested_at is not None
    if is_over or row.deadline <= transaction.now:
        return "late"
    if result.error is None:
        return "accepted"
    row.invalid_count += 1
    row.last_error = result.error
    if row.invalid_count >= MAX_INVALID:
        row.state = "burned"
    _append_event_once(transaction, row, "burned" if row.state == "burned" else "invalid")
    return "invalid"


def note_refusal(transaction: Transaction, request_id: str, error: str) -> str | None:
    """Store that a callback was refused, and append an event the first time.

    Args:
        transaction: The current transaction.
        request_id: Id of the request.
        error: Status of the response and reason.

    Returns:
        The id of the job; None if nothing is awaited for the request.
    """
    job = _job_locked(transaction, request_id)
    row = None if job is None else transaction.get(RewardRequestRow, request_id)
    if job is None or row is None or row.state != "waiting" or row.deadline <= transaction.now:
        return None
    if job.status in TERMINAL:
        return None
    row.last_error = error
    _append_event_once(transaction, row, "refused")
    transaction.flush()
    return job.id


def _job_locked(transaction: Transaction, request_id: str) -> JobRow | None:
    """The job of a request. Its lock orders all changes of its requests."""
    return transaction.scalars(
        select(JobRow)
        .join(RewardRequestRow, RewardRequestRow.job_id == JobRow.id)
        .where(RewardRequestRow.id == request_id)
        .with_for_update(of=JobRow)
    ).one_or_none()


def _is_fresh(transaction: Transaction, request_id: str, result: CallbackResult) -> bool:
    """Whether a signed message is new or an exact repetition; its id allows nothing else."""
    assert result.webhook_id is not None
    too_old = RewardDeliveryRow.seen_at < transaction.now - REPLAY_WINDOW
    transaction.execute(delete(RewardDeliveryRow).where(too_old))
    seen = transaction.get(RewardDeliveryRow, result.webhook_id)
    if seen is not None:
        return (seen.request_id, seen.body_hash) == (request_id, result.sha256)
    delivery = RewardDeliveryRow(
        id=result.webhook_id,
        request_id=request_id,
        body_hash=result.sha256,
        seen_at=transaction.now,
    )
    try:
        with transaction.begin_nested():
            transaction.add(delivery)
    except IntegrityError:  # a concurrent callback of another job used the id
        return False
    return True


def _consume(transaction: Transaction, row: RewardRequestRow, result: CallbackResult) -> bool:
    """Store the result in one UPDATE, which succeeds for only one of several callers."""
    other = aliased(RewardRequestRow)
    last = select(func.coalesce(func.max(other.result_id), FIRST_RESULT_ID - 1)).where(
        other.job_id == row.job_id
    )
    won = transaction.scalars(
        update(RewardRequestRow)
        .where(RewardRequestRow.id == row.id, RewardRequestRow.state == "waiting")
        .values(
            state="done",
            result_id=last.scalar_subquery() + 1,
            body_hash=result.sha256,
            result=result.text,
        )
        .returning(RewardRequestRow.id)
        .execution_options(synchronize_session=False)
    ).one_or_none()
    return won is not None


MESSAGES = {
    "late": "a result of reward request {id} came too late; it is not used",
    "conflict": "reward request {id} got two different results; the first one counts",
    "refused": "a callback of reward request {id} was refused: {error}",
    "invalid": "a callback of reward request {id} is not a result: {error}; "
    "the token stays valid for a few corrected results",
    "burned": "reward request {id} accepts no more after {count} invalid results; last: {error}",
}


def _append_event_once(transaction: Transaction, row: RewardRequestRow, what: str) -> None:
    """Append an event about a failed callback, the first time that it happens."""
    if what in row.reported.split():
        return
    row.reported = f"{row.reported} {what}".strip()
    message = MESSAGES[what].format(id=row.id, count=row.invalid_count, error=row.last_error)
    data = {
        "kind": f"reward_callback_{what}",
        "request_id": row.id,
        "component": row.component,
        "step": row.step,
    }
    event = events.NewEvent(message[:4000], level="warn", data=data)
    events.append(transaction, row.job_id, [event])


def results(transaction: Transaction, held: Held, after: int) -> Sequence[tuple[int, str, str]]:
    """Results of requests that the attempt announced: number, request id and body, oldest first.

    Args:
        transaction: The current transaction.
        held: The job and the attempt.
        after: Number of the last result that the attempt has; 0: none.
    """
    size = func.length(RewardRequestRow.result)
    found = transaction.execute(
        select(RewardRequestRow.result_id, RewardRequestRow.id, size)
        .where(
            RewardRequestRow.job_id == held.job.id,
            RewardRequestRow.attempt == held.attempt.number,
            RewardRequestRow.result_id > after,
        )
        .order_by(RewardRequestRow.result_id)
        .limit(PAGE_RESULTS)
    ).all()
    page: list[tuple[int, str, str]] = []
    room = PAGE_BYTES
    for number, request_id, length in found:
        if page and length > room:
            break
        room -= length
        body = transaction.scalars(
            select(RewardRequestRow.result).where(RewardRequestRow.id == request_id)
        ).one()
        page.append((number, request_id, body or ""))
    return page


def newest_results(transaction: Transaction, job_ids: Sequence[str]) -> dict[str, int]:
    """Number of the newest result of each job's running attempt, if there is one."""
    rows = transaction.execute(
        select(RewardRequestRow.job_id, func.max(RewardRequestRow.result_id))
        .join(
            JobRow,
            and_(JobRow.id == RewardRequestRow.job_id, JobRow.attempt == RewardRequestRow.attempt),
        )
        .where(RewardRequestRow.job_id.in_(job_ids), RewardRequestRow.result_id.is_not(None))
        .group_by(RewardRequestRow.job_id)
    ).all()
    return {job_id: number for job_id, number in rows if number is not None}


def shift_deadlines(transaction: Transaction, forward: timedelta) -> None:
    """Move the deadlines that were ahead before the clock was set ``forward``, by as much.

    A request that is moved twice only stays open for longer; its trainer has a clock of its own.
    """
    rows = transaction.scalars(
        select(RewardRequestRow)
        .where(
            RewardRequestRow.state == "waiting",
            RewardRequestRow.deadline > transaction.now - forward,
        )
        .order_by(RewardRequestRow.id)
        .with_for_update()
    ).all()
    for row in rows:
        row.deadline += forward
    transaction.flush()


def forget(transaction: Transaction) -> None:
    """Delete expired requests."""
    ended = select(JobRow.id).where(JobRow.status.in_(TERMINAL))
    now = transaction.now
    transaction.execute(
        delete(RewardRequestRow)
        .where(
            or_(
                and_(RewardRequestRow.deadline < now - KEPT, RewardRequestRow.job_id.in_(ended)),
                RewardRequestRow.deadline < now - KEPT_AT_MOST,
            )
        )
        .execution_options(synchronize_session=False)
    )
