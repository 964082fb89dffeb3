"""Query parameters that say which jobs a list shows."""

import re
from datetime import UTC, datetime
from typing import Annotated

from fastapi import Depends, Query, Request

from dar.errors import InvalidRequestError
from dar.protocol.spec import MAX_LABELS
from dar.protocol.status import JobStatus
from service.store.job_filters import JobFilter

LATEST = 253_402_300_799
"""The last second of the year 9999."""
_LABEL = re.compile(r"metadata\[(.+)\]", re.DOTALL)


def wanted_jobs(
    request: Request,
    status: Annotated[JobStatus | None, Query()] = None,
    model: Annotated[
        str | None, Query(max_length=256, description="Name of the model that is trained.")
    ] = None,
    label: Annotated[
        str | None,
        Query(
            max_length=600,
            description="`key=value`, or `key` for any value; several: `metadata[key]=value`.",
        ),
    ] = None,
    created_after: Annotated[
        int | None,
        Query(
            ge=0,
            le=LATEST,
            description="Only jobs of this second and later, in seconds since 1970.",
        ),
    ] = None,
    created_before: Annotated[
        int | None,
        Query(ge=0, le=LATEST, description="Only jobs before this second, in seconds since 1970."),
    ] = None,
    q: Annotated[
        str | None,
        Query(
            min_length=1,
            max_length=256,
            description="Part of the id, of the name of the model or of the result, or of a "
            "label's value; case does not matter.",
        ),
    ] = None,
    _metadata: Annotated[str | None, Query(alias="metadata", description="See above.")] = None,
) -> JobFilter:
    """The jobs that are wanted.

    Raises:
        InvalidRequestError: A label is not written as one, is given twice, or there are too many.
    """
    labels: dict[str, str | None] = dict(_labels(request))
    if label is not None:
        key, separator, value = label.partition("=")
        if not key:
            raise InvalidRequestError(
                "label: filter by a label as label=key or label=key=value", param="label"
            )
        if key in labels:
            raise InvalidRequestError(
                f"label: {key!r} is also given as metadata[{key}]; send one of them",
                param="label",
                code="exclusive_fields",
            )
        labels[key] = value if separator else None
    return JobFilter(
        status=status,
        model=model,
        labels=labels,
        created_after=_instant(created_after),
        created_before=_instant(created_before),
        text=q,
    )


WantedJobs = Annotated[JobFilter, Depends(wanted_jobs)]


def _instant(seconds: int | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def _labels(request: Request) -> dict[str, str]:
    labels: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if (match := _LABEL.fullmatch(name)) is not None:
            labels[match[1]] = value
        elif name.startswith("metadata[") or (name == "metadata" and value != "null"):
            raise InvalidRequestError(
                f"{name}: filter by one label as metadata[key]=value", param=name
            )
    if len(labels) > MAX_LABELS:
        raise InvalidRequestError(
            f"metadata: {len(labels)} labels, but a job has at most {MAX_LABELS}; leave some out",
            param="metadata",
            code="too_many_keys",
        )
    return labels
