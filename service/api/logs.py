"""Logs of trainers: the end of each, sent by its worker and read by users."""

import re
from typing import Annotated, cast, get_args

from fastapi import APIRouter, Depends, Query, Response

from dar.errors import InvalidRequestError
from dar.protocol.base import MAX_COUNT
from dar.protocol.jobs import JobLog, LogLevel
from dar.protocol.worker import TrainerLog
from service.api.jobs import PATH
from service.api.paging import seconds
from service.http.auth import LeaseSender, Reader
from service.http.bodies import body_of, schema_of
from service.runtime import CurrentRuntime
from service.store import fence, jobs, logs

router = APIRouter()
MAX_LINES = 10_000
LEVELS: tuple[LogLevel, ...] = get_args(LogLevel)
HEAD = re.compile(r"\d{4}-\d\d-\d\d [\d:,]+ (DEBUG|INFO|WARNING|ERROR|CRITICAL) ")
"""How a trainer's line begins (`worker.attempt.main`)."""
LEVEL = (
    "Only lines of this level and above. Lines without a level are kept: tracebacks, and what "
    "libraries print."
)
AFTER = (
    "Only what is newer than an earlier response: its `bytes`, with its `attempt`. Lines that are "
    "no longer stored are counted in `missed_bytes`."
)
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
    level: Annotated[LogLevel | None, Query(description=LEVEL)] = None,
    after: Annotated[int | None, Query(ge=0, le=2**53, description=AFTER)] = None,
) -> JobLog:
    """The end of a trainer's log, while it runs and afterwards."""
    with runtime.database.read() as transaction:
        job = jobs.get(transaction, user.project_id, job_id)
        found = logs.get(transaction, job, attempt)
    text, missed = found.text, 0
    if after is not None and after <= found.bytes:
        text, missed = _newer(found.text, found.bytes - after)
    lines = text.splitlines(keepends=True)
    if level is not None:
        lines = [line for line in lines if _level(line) >= LEVELS.index(level)]
    if tail is not None:
        lines = lines[-tail:]
    return JobLog(
        object="fine_tuning.job.log",
        job_id=job_id,
        attempt=found.attempt,
        updated_at=seconds(found.updated_at),
        bytes=found.bytes,
        text="".join(lines),
        missed_bytes=missed,
    )


def _newer(text: str, count: int) -> tuple[str, int]:
    """The last ``count`` bytes of a text, and how many it lacks."""
    content = text.encode()
    start = max(0, len(content) - count)
    return content[start:].decode(errors="ignore"), max(0, count - len(content))


def _level(line: str) -> int:
    """The place of a line's level in `LEVELS`; a line without one counts as the highest."""
    found = HEAD.match(line)
    return len(LEVELS) if found is None else LEVELS.index(cast("LogLevel", found[1].lower()))


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
