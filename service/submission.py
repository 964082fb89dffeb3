"""Accepting a job: everything is checked first, then the row and its event are stored at once, then workers are woken."""

import hashlib
import secrets
from dataclasses import dataclass
from typing import Literal

import orjson
from sqlalchemy.exc import IntegrityError

from dar.errors import (
    IdempotencyMismatchError,
    InvalidRequestError,
    ModelNotFoundError,
    NotFoundError,
)
from dar.protocol.ids import new_id
from dar.protocol.spec import JobSpec, total_steps
from service import datasets, errors, models
from service.auth import User
from service.runtime import Runtime
from service.store import checkpoints, files, jobs
from service.store.database import Transaction
from service.store.tables import Job

Replay = Literal["true", "inferred"]


@dataclass(frozen=True, slots=True)
class Request:
    """A submission and what tells it from a repetition of an earlier one."""

    spec: JobSpec
    user: User
    body_sha256: str
    idempotency_key: str | None
    retry_count: int


def body_digest(spec: JobSpec) -> str:
    """Digest of what was asked for: spacing, the order of keys and written-out defaults do not change it."""
    canonical = orjson.dumps(spec.model_dump(mode="json"), option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(canonical).hexdigest()


def submit(runtime: Runtime, request: Request) -> tuple[Job, Replay | None]:
    """Accept a job, or find the one that an earlier try of the same request has made.

    Raises:
        InvalidRequestError: The file or the model is not there, or does not fit the spec.
        IdempotencyMismatchError: The key was used with another body.
    """

    def work(transaction: Transaction) -> tuple[Job, Replay | None]:
        earlier = _replayed(transaction, request)
        if earlier is not None:
            return earlier
        job, inputs = _new_job(transaction, runtime, request)
        jobs.submit(transaction, job, inputs)
        transaction.after_commit(runtime.waker.wake)
        return job, None

    try:
        return runtime.database.transact(work)
    except IntegrityError:
        # Two tries of one submission at once: the other one has stored it by now.
        with runtime.database.read() as transaction:
            earlier = _replayed(transaction, request)
        if earlier is None:
            raise
        return earlier


def _replayed(transaction: Transaction, request: Request) -> tuple[Job, Replay] | None:
    if request.idempotency_key is not None:
        job = jobs.find_by_key(transaction, request.user.project_id, request.idempotency_key)
        if job is None:
            return None
        if job.body_sha256 != request.body_sha256:
            raise IdempotencyMismatchError(
                f"this Idempotency-Key has made job {job.id} with another body; use a new key for a new job"
            )
        return job, "true"
    if request.retry_count < 1:
        return None
    job = jobs.find_retried(
        transaction, request.user.key_id, request.body_sha256, request.retry_count
    )
    return None if job is None else (job, "inferred")


def _new_job(transaction: Transaction, runtime: Runtime, request: Request) -> tuple[Job, list[str]]:
    spec, project_id = request.spec, request.user.project_id
    try:
        file = files.get(transaction, project_id, spec.training_file, is_keeping=True)
    except NotFoundError as error:
        raise InvalidRequestError(
            f"training_file: {error.message}", param="training_file", code="file_not_found"
        ) from None
    if problems := datasets.check_for(spec, file.columns):
        raise errors.invalid(problems)
    resolved = models.resolve(transaction, runtime.settings, project_id, spec.model)
    if not checkpoints.keep(transaction, resolved.checkpoint_ids):
        raise ModelNotFoundError(
            f"model {spec.model!r} is made of checkpoints that are no longer kept", param="model"
        )
    job_id = new_id("ftjob-")
    job = Job(
        id=job_id,
        project_id=project_id,
        api_key_id=request.user.key_id,
        created_at=transaction.now,
        status="queued",
        status_message="waiting for a worker",
        model=spec.model,
        model_source=resolved.source.model_dump(),
        model_name=models.result_name(spec.model, spec.suffix, job_id),
        training_file=file.id,
        spec=spec.model_dump(mode="json"),
        labels=spec.metadata,
        suffix=spec.suffix,
        seed=secrets.randbelow(2**31) if spec.seed is None else spec.seed,
        total_steps=total_steps(spec.dar.hyperparameters, file.num_rows),
        keep_last=spec.dar.checkpointing.keep_last,
        not_before=transaction.now,
        idempotency_key=request.idempotency_key,
        body_sha256=request.body_sha256,
        retry_count=request.retry_count,
    )
    return job, resolved.checkpoint_ids
