"""Jobs made from another one: forks with changed settings, and reruns of the same.

A copy is a submission of its own, with all checks. The job that it is made from stays as it is,
with its attempts, metrics and checkpoints.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import orjson
from pydantic import ValidationError

from dar.errors import ConflictError, InvalidRequestError, Problem
from dar.protocol.budget_checks import CHOSEN
from dar.protocol.job_config import ForkJob, JobOrigin
from dar.protocol.spec import JobSpec
from dar.protocol.status import TERMINAL
from service.http import errors
from service.http.auth import User
from service.jobs.ingredients import config_of
from service.jobs.submission import Copy
from service.runtime import Runtime
from service.store import checkpoints, jobs
from service.store.database import Transaction
from service.store.tables import CheckpointRow, JobRow

EXCLUSIVE = (("max_steps", "n_epochs"), ("kl_budget", *CHOSEN))
"""Hyperparameters of which a change to one replaces the others."""


def rerun_digest(job_id: str) -> str:
    """Digest of a request for a rerun, which its repetition has too."""
    return _digest(["rerun", job_id])


def fork_digest(job_id: str, wanted: ForkJob) -> str:
    """Digest of a request for a fork, which its repetition has too."""
    return _digest(["fork", job_id, wanted.model_dump(mode="json")])


def rerun(runtime: Runtime, user: User, job_id: str) -> tuple[JobSpec, Copy]:
    """The same job again: its spec, seed and model, at the same commits of a hub.

    Raises:
        NotFoundError: The project has no such job.
        ConflictError: The job has not ended.
    """
    with runtime.database.read() as transaction:
        job = jobs.get(transaction, user.project_id, job_id)
        if job.status not in TERMINAL:
            raise ConflictError(
                f"job {job_id} is {job.status}; a job is run again after it has ended. To begin "
                "another one from the same spec now, fork it from its start"
            )
        spec = JobSpec.model_validate_json(orjson.dumps(config_of(job).spec))
        revisions = job.model_source.get("revisions") or {}
    origin = JobOrigin(kind="rerun", job_id=job_id, checkpoint_id=None, step=None)
    return spec, Copy(origin, rerun_digest(job_id), revisions)


def fork(runtime: Runtime, user: User, job_id: str, wanted: ForkJob) -> tuple[JobSpec, Copy]:
    """A job that starts from a checkpoint of another one, with changed settings.

    Raises:
        NotFoundError: The project has no such job, or the job no such checkpoint.
        ConflictError: The job has no checkpoint yet, or the checkpoint is damaged.
        InvalidRequestError: The changes do not make a spec.
    """
    with runtime.database.read() as transaction:
        job = jobs.get(transaction, user.project_id, job_id)
        start = _start_of(transaction, job, wanted.checkpoint)
        base = config_of(job).spec
    if start is not None and "model" in wanted.changes:
        raise InvalidRequestError(
            "a fork trains the model of its checkpoint; leave changes.model out, or send checkpoint "
            "'start' to begin with another model",
            param="changes.model",
            code="exclusive_fields",
        )
    model = job.model if start is None else start.name
    spec = _changed({**base, "model": model}, wanted.changes)
    origin = JobOrigin(
        kind="fork",
        job_id=job_id,
        checkpoint_id=None if start is None else start.id,
        step=None if start is None else start.step,
    )
    return spec, Copy(origin, fork_digest(job_id, wanted))


def _start_of(transaction: Transaction, job: JobRow, name: str) -> CheckpointRow | None:
    """The checkpoint that a fork starts from; None: it starts from the model of the job."""
    if name == "start":
        return None
    if name == "latest":
        found = checkpoints.newest(transaction, job.id)
    elif name == "best":
        best = job.best_checkpoint_id
        found = None if best is None else checkpoints.get(transaction, job.id, best)
    else:
        found = checkpoints.get(transaction, job.id, name)
    if found is None:
        raise ConflictError(
            f"job {job.id} has no {name} checkpoint yet; fork it from its start, or wait for one"
        )
    named = next(checkpoints.models(transaction, job.project_id, name=found.name), None)
    if named is None or named[1].id != found.id:
        raise ConflictError(
            f"checkpoint {found.id} of step {found.step} was written again by a later attempt; take "
            "the newer one of this step, which the list of checkpoints has"
        )
    return found


def _changed(base: Mapping[str, Any], changes: Mapping[str, Any]) -> JobSpec:
    merged = _merged(base, _without_replaced(changes))
    try:
        return JobSpec.model_validate_json(orjson.dumps(merged))
    except ValidationError as error:
        found = errors.problems_of(error.errors(include_url=False), JobSpec)
        raise errors.invalid(
            [Problem(one.message, f"changes.{one.param}", one.code) for one in found]
        ) from None


def _without_replaced(changes: Mapping[str, Any]) -> Mapping[str, Any]:
    """The changes, with null for hyperparameters that exclude one of those that are changed."""
    place = ("method", "dar", "hyperparameters")
    inner: Any = changes
    for name in place:
        inner = inner.get(name) if isinstance(inner, Mapping) else None
    if not isinstance(inner, Mapping):
        return changes
    cleared = {
        name: None
        for group in EXCLUSIVE
        for name in group
        if name not in inner and _is_replaced(name, group, inner)
    }
    return _nested(changes, place, {**cleared, **inner})


def _is_replaced(name: str, group: tuple[str, ...], inner: Mapping[str, Any]) -> bool:
    """Whether a hyperparameter gives way: alpha and beta go together, everything else excludes."""
    sent = [other for other in group if inner.get(other) is not None]
    return any(not {name, other} <= set(CHOSEN) for other in sent)


def _nested(
    changes: Mapping[str, Any], place: tuple[str, ...], value: Mapping[str, Any]
) -> Mapping[str, Any]:
    if not place:
        return value
    first, *rest = place
    return {**changes, first: _nested(changes[first], tuple(rest), value)}


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A merge patch (RFC 7386)."""
    made = dict(base)
    for name, value in changes.items():
        if value is None:
            made.pop(name, None)
        elif isinstance(value, Mapping):
            below = made.get(name)
            made[name] = _merged(below if isinstance(below, Mapping) else {}, value)
        else:
            made[name] = value
    return made


def _digest(request: object) -> str:
    return hashlib.sha256(orjson.dumps(request, option=orjson.OPT_SORT_KEYS)).hexdigest()
