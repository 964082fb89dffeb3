"""Changes of a stored job by its owner: labels, and the limits of a job that has not ended.

Limits are enforced by the service (`service.store.stops`), so that a change of them is in force at
once, also for a running job.
"""

import hashlib
from typing import Any

import orjson
from sqlalchemy import update

from dar.errors import ConflictError, PreconditionFailedError
from dar.protocol.job_config import UpdateJob
from dar.protocol.status import TERMINAL
from service.store import events, jobs
from service.store.database import Transaction
from service.store.tables import JobRow

LIMITS = "limits"
ANY = "*"
"""In ``If-Match``: whatever the job has."""


def etag_of(job: JobRow) -> str:
    """The entity tag of what can be changed: it stays the same while the job runs."""
    content = [job.labels, job.spec["method"]["dar"].get(LIMITS)]
    digest = hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()
    return f'"{digest[:32]}"'


def update_job(
    transaction: Transaction,
    project_id: str,
    job_id: str,
    changes: UpdateJob,
    if_match: str | None = None,
) -> JobRow:
    """Change labels and limits.

    Args:
        transaction: The transaction to write in.
        project_id: The project.
        job_id: The job.
        changes: What differs.
        if_match: Entity tags, separated by commas, of which the job must have one; None: any.

    Raises:
        NotFoundError: The project has no job with this id.
        PreconditionFailedError: It has another tag.
        ConflictError: Limits of a job that has ended.
    """
    job = jobs.locked(transaction, project_id, job_id)
    now = etag_of(job)
    if if_match is not None and not {ANY, now} & {one.strip() for one in if_match.split(",")}:
        raise PreconditionFailedError(
            f"the labels or limits of job {job_id} have changed: their ETag is {now} now; read the "
            "job again and decide anew",
            param="If-Match",
        )
    values = _values(job, changes)
    if not values:
        return job
    transaction.execute(
        update(JobRow)
        .where(JobRow.id == job_id)
        .values(values)
        .execution_options(synchronize_session=False)
    )
    data = {"kind": "update", "fields": sorted(changes.model_fields_set)}
    what = " and ".join(sorted(changes.model_fields_set))
    events.append(transaction, job_id, [events.NewEvent(f"{what} changed", data=data)])
    transaction.refresh(job)
    return job


def _values(job: JobRow, changes: UpdateJob) -> dict[str, Any]:
    """The columns that change."""
    values: dict[str, Any] = {}
    if "metadata" in changes.model_fields_set and changes.metadata != job.labels:
        values["labels"] = changes.metadata
    if changes.limits is not None:
        method = job.spec["method"]
        before = method["dar"].get(LIMITS) or {}
        sent = changes.limits.model_dump(mode="json", exclude_unset=True)
        after = {**before, **sent}
        if after != before:
            if job.status in TERMINAL:
                raise ConflictError(
                    f"job {job.id} has ended, so its limits cannot be changed; its metadata can"
                )
            dar = {**method["dar"], LIMITS: after}
            values["spec"] = {**job.spec, "method": {**method, "dar": dar}}
    return values
