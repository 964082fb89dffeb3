"""Events of a job."""

from fastapi import APIRouter

from dar.protocol.base import Page
from dar.protocol.events import Event
from service.api.jobs import PATH
from service.api.paging import PageCursor, envelope, seconds
from service.http.auth import Reader
from service.runtime import CurrentRuntime
from service.store import events, jobs, tables

router = APIRouter(prefix=PATH, tags=["jobs"])


@router.get("/{job_id}/events")
def list_events(
    job_id: str, runtime: CurrentRuntime, user: Reader, cursor: PageCursor
) -> Page[Event]:
    """Events of a job, newest first."""
    with runtime.database.read() as transaction:
        job = jobs.get(transaction, user.project_id, job_id)
        found = events.list_page(transaction, job.id, cursor)
    return envelope(found, show, lambda event: event.id)


def show(event: tables.JobEventRow) -> Event:
    return Event.model_validate(
        {
            "id": event.id,
            "object": "fine_tuning.job.event",
            "created_at": seconds(event.created_at),
            "seq": event.seq,
            "level": event.level,
            "type": event.type,
            "message": event.message,
            "data": event.data,
        }
    )
