"""Attempts of a job: where each ran, how it ended, and whose fault a failure was."""

from fastapi import APIRouter

from dar.protocol.base import Page
from dar.protocol.jobs import Attempt
from service.api.jobs import PATH
from service.api.paging import PageCursor, envelope, seconds
from service.http.auth import Reader
from service.runtime import CurrentRuntime
from service.store import jobs, leases, tables

router = APIRouter(prefix=PATH, tags=["attempts"])


@router.get("/{job_id}/attempts")
def list_attempts(
    job_id: str, runtime: CurrentRuntime, user: Reader, cursor: PageCursor
) -> Page[Attempt]:
    """Attempts of a job, newest first."""
    with runtime.database.read() as transaction:
        job = jobs.get(transaction, user.project_id, job_id)
        found = leases.list_page(transaction, job.id, cursor)
    return envelope(found, show, lambda attempt: attempt.id)


def show(attempt: tables.AttemptRow) -> Attempt:
    failure = attempt.failure or {}
    return Attempt.model_validate(
        {
            "id": attempt.lease_id,
            "object": "fine_tuning.job.attempt",
            "number": attempt.number,
            "status": attempt.status,
            "node": attempt.node,
            "slot": attempt.slot,
            "started_at": seconds(attempt.started_at),
            "ended_at": None if attempt.ended_at is None else seconds(attempt.ended_at),
            "start_step": attempt.start_step,
            "owner": attempt.owner,
            "code": failure.get("code"),
            "message": failure.get("message"),
        }
    )
