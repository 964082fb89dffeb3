"""Accepting a job: everything is checked first, then the row and its event are stored at once, then workers are woken."""

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

import orjson
from sqlalchemy.exc import IntegrityError

from dar.errors import (
    IdempotencyMismatchError,
    InvalidRequestError,
    ModelNotFoundError,
    NotFoundError,
    Problem,
)
from dar.protocol import spec_checks
from dar.protocol.hub_data import SCHEME, HubData
from dar.protocol.ids import new_id
from dar.protocol.reward_spec import with_retired_fields
from dar.protocol.spec import JobSpec, total_steps
from dar.rewards.base import RewardSample
from dar.rewards.from_spec import PATH, check_rewards
from dar.rewards.http.egress import EgressPolicy
from dar.rewards.probe.run import ProbeTarget
from service.http import errors
from service.http.auth import User
from service.jobs import datasets, models
from service.rewards import endpoints
from service.rewards.first_prompts import first_prompts
from service.rewards.probing import Try
from service.runtime import Runtime
from service.store import checkpoints, files, jobs, reward_endpoints
from service.store.database import Transaction
from service.store.tables import File, Job

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
    content = spec.model_dump(mode="json")
    dar = content["method"]["dar"]
    if dar["rewards"] is not None:
        dar["rewards"] = with_retired_fields(dar["rewards"])
    canonical = orjson.dumps(content, option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(canonical).hexdigest()


def to_try(runtime: Runtime, request: Request) -> list[Try]:
    """The reward services that must be tried before `submit`; none for a repetition, or where the spec says so.

    Raises:
        InvalidRequestError: A component names an endpoint that is not there or does not fit, or what else is plainly wrong.
        IdempotencyMismatchError: The key was used with another body.
    """
    rewards = request.spec.dar.rewards
    if request.spec.skip_validation or rewards is None:
        return []
    with runtime.database.read() as transaction:
        if _replayed(transaction, request) is not None:
            return []
        resolved = endpoints.resolve(transaction, request.user.project_id, request.spec)
        tries = [
            _try(transaction, runtime, resolved, index)
            for index, component in enumerate(rewards.components)
            if component.kind == "http"
        ]
        fresh = [one for one in tries if not runtime.remembered.has(one.key)]
        # Nobody is asked for a job that cannot be accepted anyway.
        if fresh:
            _new_job(transaction, runtime, request, resolved)
            transaction.rollback()
    example = _example(runtime, request.spec) if fresh else None
    return [
        replace(one, target=replace(one.target, example=example))
        for one in fresh
        if runtime.tries.has_room(request.user.key_id)
    ]


def _example(runtime: Runtime, spec: JobSpec) -> RewardSample | None:
    """The first prompt of the job, as a reward service may need its columns."""
    is_here = not spec.training_file.startswith(SCHEME)
    path = runtime.artifacts.file(spec.training_file) if is_here else None
    return next(iter(first_prompts(path, 1)), None)


def _try(
    transaction: Transaction, runtime: Runtime, resolved: endpoints.Resolved, index: int
) -> Try:
    assert resolved.spec.dar.rewards is not None
    component = resolved.spec.dar.rewards.components[index]
    guard = EgressPolicy.from_settings(runtime.settings)
    path = f"{endpoints.COMPONENTS}[{index}]"
    endpoint = resolved.endpoints.get(component.name)
    if endpoint is None:
        assert component.url is not None
        secrets = [runtime.reward_secret]
        target = ProbeTarget(component, component.url, secrets, {}, guard, runtime.probe_inbox)
        return Try(f"{path}.url", target)
    access = endpoints.access_to(transaction, runtime.secrets, endpoint)
    target = ProbeTarget(
        component, access.url, access.secrets, access.headers, guard, runtime.probe_inbox
    )
    return Try(f"{path}.endpoint", target, endpoint.revision)


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
        project_id = request.user.project_id
        resolved = endpoints.resolve(transaction, project_id, request.spec, lock="keep")
        job, inputs = _new_job(transaction, runtime, request, resolved)
        jobs.submit(transaction, job, inputs)
        reward_endpoints.link(transaction, job.id, resolved.links)
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


def _files_of(
    transaction: Transaction, runtime: Runtime, request: Request
) -> tuple[str, int | None]:
    """Check the job's files, and keep them from being removed.

    Returns:
        Id of the training file (empty for a data set of a hub) and its rows (None: not known here).
    """
    spec = request.spec
    problems: list[Problem] = []
    found: tuple[str, int | None]
    if spec.training_file.startswith(SCHEME):
        found = _hub_data(runtime.settings.hub_datasets, spec)
    else:
        file = _file(transaction, request, "training_file", spec.training_file)
        problems += datasets.check_for(spec, file.columns)
        found = file.id, file.num_rows
    if spec.validation_file is not None:
        file = _file(transaction, request, "validation_file", spec.validation_file)
        problems += datasets.check_for(spec, file.columns, "validation_file")
    if problems:
        raise errors.invalid(problems)
    return found


def _file(transaction: Transaction, request: Request, param: str, file_id: str) -> File:
    try:
        return files.get(transaction, request.user.project_id, file_id, is_keeping=True)
    except NotFoundError as error:
        raise InvalidRequestError(
            f"{param}: {error.message}", param=param, code="file_not_found"
        ) from None


def _hub_data(patterns: Sequence[str], spec: JobSpec) -> tuple[str, None]:
    """Whether the data set is allowed; whether it is there, the worker finds out."""
    name = HubData.parse(spec.training_file).name
    if not any(fnmatchcase(name, pattern) for pattern in patterns):
        allowed = ", ".join(patterns) or "none"
        raise InvalidRequestError(
            f"hub data set {name!r} is not allowed here; allowed patterns: {allowed} (DAR_HUB_DATASETS)",
            param="training_file",
            code="dataset_not_allowed",
        )
    if spec.dar.hyperparameters.max_steps is None:
        raise InvalidRequestError(
            "the rows of a hub data set are counted only where it is loaded, so the job's length cannot follow from n_epochs; "
            "send max_steps",
            param="method.dar.hyperparameters.max_steps",
            code="missing",
        )
    return "", None


def _check_rewards(runtime: Runtime, spec: JobSpec) -> None:
    """Refuse rewards that can never work.

    Raises:
        InvalidRequestError: There are some; the problems name their places.
        ModelNotFoundError: A reward model is not there.
    """
    if spec.dar.rewards is None:
        return
    if problems := check_rewards(spec.dar.rewards):
        raise errors.invalid(problems)
    for index, component in enumerate(spec.dar.rewards.components):
        if component.model is not None:
            path = f"{PATH}.components[{index}].model"
            models.check_reward_model(runtime.settings, component.model, path)


def _new_job(
    transaction: Transaction, runtime: Runtime, request: Request, rewarded: endpoints.Resolved
) -> tuple[Job, list[str]]:
    spec, project_id = request.spec, request.user.project_id
    if problems := spec_checks.problems_of(spec):
        raise errors.invalid(problems)
    _check_rewards(runtime, rewarded.spec)
    file_id, num_rows = _files_of(transaction, runtime, request)
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
        training_file=file_id,
        spec=rewarded.spec.model_dump(mode="json"),
        labels=spec.metadata,
        suffix=spec.suffix,
        seed=secrets.randbelow(2**31) if spec.seed is None else spec.seed,
        total_steps=total_steps(spec.dar.hyperparameters, num_rows or 0),
        keep_last=spec.dar.checkpointing.keep_last,
        not_before=transaction.now,
        idempotency_key=request.idempotency_key,
        body_sha256=request.body_sha256,
        retry_count=request.retry_count,
    )
    return job, resolved.checkpoint_ids
