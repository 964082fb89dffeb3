"""Events of a job."""

from collections.abc import Mapping

from fastapi import APIRouter

from dar.protocol.base import Page
from dar.protocol.events import Event
from service.api.jobs import PATH
from service.api.paging import PageCursor, WithRewound, envelope, seconds
from service.http.auth import Reader
from service.runtime import CurrentRuntime
from service.store import events, jobs, rewinds, tables

router = APIRouter(prefix=PATH, tags=["jobs"])


@router.get("/{job_id}/events", response_model_exclude_defaults=True)
def list_events(
    job_id: str,
    runtime: CurrentRuntime,
    user: Reader,
    cursor: PageCursor,
    rewound: WithRewound = False,
) -> Page[Event]:
    """Events of a job, newest first."""
    with runtime.database.read() as transaction:
        job = jobs.get(transaction, user.project_id, job_id)
        found = events.list_page(transaction, job.id, cursor, rewound=rewound)
        last = rewinds.last_steps(transaction, job.id)
    return envelope(found, lambda event: show(event, last), lambda event: event.id)


def show(event: tables.JobEventRow, last_steps: Mapping[int, int]) -> Event:
    return Event.model_validate(
        {
            "rewound": rewinds.is_rewound(last_steps, event.attempt, event.step),
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
