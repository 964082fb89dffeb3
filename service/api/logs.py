"""Logs of trainers: the end of each, sent by its worker and read by users."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response

from dar.errors import InvalidRequestError
from dar.protocol.base import MAX_COUNT
from dar.protocol.jobs import JobLog
from dar.protocol.worker import TrainerLog
from service.api.jobs import PATH
from service.api.paging import seconds
from service.http.auth import LeaseSender, Reader
from service.http.bodies import body_of, schema_of
from service.runtime import CurrentRuntime
from service.store import fence, jobs, logs

router = APIRouter()
MAX_LINES = 10_000
LogBody = Annotated[TrainerLog, Depends(body_of(TrainerLog))]


@router.get(PATH + "/{job_id}/logs", tags=["jobs"])
def get_log(
    job_id: str,
    runtime: CurrentRuntime,
    user: Reader,
    attempt: Annotated[
        int | None, Query(ge=1, le=MAX_COUNT, description="Default: the newest with a log.")
    ] = None,
    tail: Annotated[
        int | None, Query(ge=1, le=MAX_LINES, description="Only so many lines of its end.")
    ] = None,
) -> JobLog:
    """The end of a trainer's log, while it runs and afterwards."""
    with runtime.database.read() as transaction:
        job = jobs.get(transaction, user.project_id, job_id)
        found = logs.get(transaction, job, attempt)
    text = found.text
    if tail is not None:
        text = "".join(text.splitlines(keepends=True)[-tail:])
    return JobLog(
        object="fine_tuning.job.log",
        job_id=job_id,
        attempt=found.attempt,
        updated_at=seconds(found.updated_at),
        bytes=found.bytes,
        text=text,
    )


@router.put(
    "/v1/worker/leases/{lease_id}/log",
    tags=["worker"],
    openapi_extra=schema_of(TrainerLog),
    status_code=204,
)
def put_log(lease_id: LeaseSender, runtime: CurrentRuntime, body: LogBody) -> Response:
    """Store the end of a trainer's log, also that of an attempt that has lost its job."""
    with runtime.database.write() as transaction:
        held = fence.lock(transaction, lease_id)
        if held.attempt.number != body.attempt:
            raise InvalidRequestError(
                f"lease {lease_id} is of attempt {held.attempt.number}, not {body.attempt}",
                param="attempt",
            )
        logs.put(transaction, held, body)
    return Response(status_code=204)
