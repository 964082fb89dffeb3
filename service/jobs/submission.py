"""Submitting a job: it is checked, then its reward services are probed, then it is stored."""

import hashlib
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Literal

import orjson
import structlog
from sqlalchemy.exc import IntegrityError
from starlette.concurrency import run_in_threadpool

from dar.errors import (
    IdempotencyMismatchError,
    InvalidRequestError,
    NotFoundError,
    Problem,
    ServiceUnavailableError,
)
from dar.protocol import spec_checks
from dar.protocol.budget_checks import CHOSEN, DEFAULT_BUDGET
from dar.protocol.hub_data import SCHEME, HubData
from dar.protocol.ids import new_id
from dar.protocol.job_config import JobOrigin
from dar.protocol.reward_spec import with_retired_fields
from dar.protocol.spec import Hyperparameters, JobSpec, total_steps
from dar.protocol.worker import ModelSource
from dar.rewards.base import RewardSample
from dar.rewards.from_spec import check_rewards
from service.http import errors
from service.http.auth import User
from service.jobs import datasets, ingredients, model_checks, models
from service.jobs.memory import Memory, least_memory
from service.rewards import endpoints, probing
from service.rewards.watch import first_prompts
from service.runtime import Runtime
from service.store import (
    checkpoints,
    events,
    files,
    jobs,
    reward_endpoints,
    submission_claims,
)
from service.store.database import Transaction
from service.store.tables import FileRow, JobRow

log = structlog.get_logger()
Replay = Literal["true", "inferred"]
PLANS = 5
"""How often a submission is checked anew, because what it needs has changed meanwhile."""
EARLIER_LEARNING_RATE = 1e-6
"""What earlier versions wrote into a spec without a learning rate."""
EARLIER_STRENGTHS = {name: Hyperparameters.model_fields[name].default for name in CHOSEN}
"""What earlier versions wrote into a spec without alpha and beta, which now has a ``kl_budget``."""


@dataclass(frozen=True, slots=True)
class Copy:
    """A request for a job that is made from another one."""

    origin: JobOrigin
    body_sha256: str
    """Digest of the request: what it means may change, as a job gets further checkpoints."""
    revisions: Mapping[str, str] = field(default_factory=dict)
    """Commits of hub models that it is to have, by hub id."""


@dataclass(frozen=True, slots=True)
class JobRequest:
    """Who asks for a job, and what identifies a repetition of an earlier request."""

    user: User
    body_sha256: str
    idempotency_key: str | None
    retry_count: int


@dataclass(frozen=True, slots=True)
class Submission(JobRequest):
    """A request for a job with its spec."""

    spec: JobSpec
    copy: Copy | None = None
    """How it is made from another job."""
    request_id: str | None = None
    """The ``x-request-id`` of the request, which the job's logs have."""


@dataclass(frozen=True, slots=True)
class Submitted:
    """A stored job; for a repeated request, how the repetition was recognised."""

    job: JobRow
    replay: Replay | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked submission: all that the job's row is made of."""

    submission: Submission
    resolved: endpoints.ResolvedSpec
    model: models.ResolvedModel
    num_rows: int | None
    """Rows of the training file; None for a hub data set, whose rows are not known here."""
    probes: Sequence[probing.ComponentProbe] = ()
    """Reward services that must pass a probe before the job is stored."""
    notices: Sequence[events.NewEvent] = ()
    """Warnings of these probes, or of earlier ones of the same services."""
    memory: Memory | None = None
    """The least memory of its trainer; None: not known."""
    file_sha256: Mapping[str, str] = field(default_factory=dict)
    """Digests of its files, by the name of their field."""
    model_sha256: str | None = None
    """See `service.jobs.ingredients.of_model`."""

    @property
    def file_ids(self) -> set[str]:
        spec = self.submission.spec
        training_file = "" if is_on_hub(spec) else spec.training_file
        return {one for one in (training_file, spec.validation_file) if one}

    @property
    def revisions(self) -> dict[str, int]:
        """Revisions of the reward endpoints that the spec names, by id."""
        return {row.id: row.revision for row in self.resolved.endpoints.values()}


@dataclass(frozen=True, slots=True)
class CheckedData:
    """What is known about the files of a job."""

    num_rows: int | None
    """Rows of the training file; None for a hub data set."""
    chat_rows: Mapping[str, int | None]
    """The first row with a conversation in each uploaded file; None: no such row."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """Digests of the uploaded files, by the name of their field."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A plan before the files of its models are read."""

    plan: Plan
    data: CheckedData
    files: model_checks.ModelFiles | None
    """Of the model that is trained; None for a hub model."""


class _StalePlanError(Exception):
    """Something that a job needs has changed since its plan was made."""


def body_digest(spec: JobSpec) -> str:
    """Digest of a spec that ignores whitespace, the order of keys, and defaults written out.

    It is that of earlier versions, so that a request repeated after an upgrade is recognised.
    """
    content = spec.model_dump(mode="json")
    dar = content["method"]["dar"]
    if dar["hyperparameters"]["learning_rate"] is None:
        dar["hyperparameters"]["learning_rate"] = EARLIER_LEARNING_RATE
    if dar["hyperparameters"].get("kl_budget") == DEFAULT_BUDGET and dar["rewards"] is not None:
        del dar["hyperparameters"]["kl_budget"]
        dar["hyperparameters"] |= EARLIER_STRENGTHS
    if dar["rewards"] is not None:
        dar["rewards"] = with_retired_fields(dar["rewards"])
    canonical = orjson.dumps(content, option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(canonical).hexdigest()


async def submit(
    runtime: Runtime,
    user: User,
    spec: JobSpec,
    *,
    idempotency_key: str | None,
    retry_count: int,
    copy: Copy | None = None,
) -> Submitted:
    """Store a job, or return the one that an earlier request with the same content has stored.

    Args:
        runtime: Of the service.
        user: Who submits it.
        spec: Of the job.
        idempotency_key: Of the request.
        retry_count: Of the request.
        copy: The job that it is made from; None: it is a new one.

    Raises:
        InvalidRequestError: The spec, a file, an endpoint or a reward service cannot be used.
        ModelNotFoundError: A model does not exist or is not allowed.
        IdempotencyMismatchError: The key was used with another body.
    """
    digest = body_digest(spec) if copy is None else copy.body_sha256
    request_id = structlog.contextvars.get_contextvars().get("request_id")
    submission = Submission(user, digest, idempotency_key, retry_count, spec, copy, request_id)
    checked = await run_in_threadpool(check, runtime, submission)
    if isinstance(checked, Submitted):
        return checked
    problems, notices = await probing.verdict_on(checked.probes, runtime.passed_probes)
    if problems:
        raise errors.invalid(problems)
    plan = replace(checked, notices=[*checked.notices, *notices])
    submitted = await run_in_threadpool(store, runtime, plan)
    if submitted.replay is None:
        log.info("job submitted", job=submitted.job.id)
    return submitted


def check(runtime: Runtime, submission: Submission) -> Plan | Submitted:
    """Check a submission against everything but its reward services. Stores nothing."""
    earlier = replayed(runtime, submission)
    if earlier is not None:
        return earlier
    with runtime.database.read() as transaction:
        resolved = endpoints.resolve(transaction, submission.user.project_id, submission.spec)
        probes = list(probes_of(transaction, runtime, submission, resolved))
        drafted = _draft(transaction, runtime, submission, resolved)
    plan = _complete(runtime, drafted)
    fresh = [one for one in probes if not runtime.passed_probes.has(one.key)]
    known = [
        notice
        for one in probes
        if one not in fresh
        for notice in runtime.passed_probes.notices(one.key)
    ]
    example = example_of(runtime, submission.spec) if fresh else None
    probes = [
        probing.with_example(one, example)
        for one in fresh
        if runtime.submission_probes.try_take(submission.user.key_id)
    ]
    return replace(plan, probes=probes, notices=known)


def store(runtime: Runtime, plan: Plan) -> Submitted:
    """Store the job of a plan. What has changed since the plan was made is checked again.

    Raises:
        ServiceUnavailableError: What the job needs changes again and again.
    """
    for _ in range(PLANS):
        if (submitted := _try_store(runtime, plan)) is not None:
            return submitted
        with runtime.database.read() as transaction:
            project_id = plan.submission.user.project_id
            resolved = endpoints.resolve(transaction, project_id, plan.submission.spec)
            drafted = _draft(transaction, runtime, plan.submission, resolved)
        plan = replace(_complete(runtime, drafted), notices=plan.notices)
    raise ServiceUnavailableError(
        "a file, model or reward endpoint of the job is being changed; send the request again"
    )


def _try_store(runtime: Runtime, plan: Plan) -> Submitted | None:
    """Store the job of a plan; None: something has changed since the plan was made."""
    submission = plan.submission

    def work(transaction: Transaction) -> Submitted:
        claim = _claim(transaction, submission)
        earlier = _earlier(transaction, submission, claim)
        if earlier is not None:
            return earlier
        if not _keep(transaction, plan):
            raise _StalePlanError
        job = _new_job(transaction, plan)
        jobs.submit(transaction, job, plan.model.checkpoint_ids, submission.request_id)
        if claim is not None:
            claim.add(job.id, submission.retry_count)
        events.append(transaction, job.id, plan.notices)
        reward_endpoints.link(transaction, job.id, plan.resolved.links)
        transaction.after_commit(runtime.waker.wake)
        return Submitted(job)

    try:
        return runtime.database.transact(work)
    except _StalePlanError:
        return None
    except IntegrityError:
        # The same key was sent twice at once, and the other request has stored its job by now.
        earlier = replayed(runtime, submission)
        if earlier is None:
            raise
        return earlier


def replayed(runtime: Runtime, submission: JobRequest) -> Submitted | None:
    """The job of an earlier request with the same content. Writes only where there is one.

    Raises:
        IdempotencyMismatchError: The key was used with another body.
    """
    with runtime.database.read() as transaction:
        if submission.idempotency_key is not None:
            return _earlier(transaction, submission, None)
        user, digest = submission.user, submission.body_sha256
        claim = submission_claims.find(transaction, user.key_id, digest)
        if submission.retry_count == 0 and (claim is None or claim.match(0) is None):
            return None

    def take(transaction: Transaction) -> Submitted | None:
        return _earlier(transaction, submission, _claim(transaction, submission))

    return runtime.database.transact(take)


def _claim(
    transaction: Transaction, submission: JobRequest
) -> submission_claims.SubmissionClaim | None:
    """Let other tries of a submission without a key wait; None for one with a key."""
    if submission.idempotency_key is not None:
        return None
    return submission_claims.lock(transaction, submission.user.key_id, submission.body_sha256)


def _earlier(
    transaction: Transaction,
    submission: JobRequest,
    claim: submission_claims.SubmissionClaim | None,
) -> Submitted | None:
    """The job of an earlier request with the same content.

    Raises:
        IdempotencyMismatchError: The key was used with another body.
    """
    if claim is not None:
        job = claim.take(submission.retry_count)
        return None if job is None else Submitted(job, "inferred")
    key = submission.idempotency_key
    assert key is not None
    job = jobs.find_by_key(transaction, submission.user.project_id, key)
    if job is None:
        return None
    if job.body_sha256 != submission.body_sha256:
        raise IdempotencyMismatchError(
            f"this Idempotency-Key was used for job {job.id} with another body; use a new key for "
            "a new job"
        )
    return Submitted(job, "true")


def probes_of(
    transaction: Transaction,
    runtime: Runtime,
    submission: Submission,
    resolved: endpoints.ResolvedSpec,
) -> Iterator[probing.ComponentProbe]:
    """The reward services of a job, with their access; none where the spec skips validation."""
    rewards = resolved.spec.dar.rewards
    if submission.spec.skip_validation or rewards is None:
        return
    for index, component in enumerate(rewards.components):
        if component.kind != "http":
            continue
        endpoint = resolved.endpoints.get(component.name)
        if endpoint is None:
            assert component.url is not None
            project_id = submission.user.project_id
            access = endpoints.inline_access(transaction, runtime, project_id, component.url)
            place = "url"
        else:
            place = "endpoint"
            access = endpoints.access_to(transaction, runtime.secrets, endpoint)
        target = endpoints.probe_target(runtime.settings, component, access, runtime.probe_inbox)
        path = f"{endpoints.COMPONENTS}[{index}].{place}"
        yield probing.ComponentProbe(path, target, access.revision)


def example_of(runtime: Runtime, spec: JobSpec) -> RewardSample | None:
    """The first prompt of the job: a reward service may need its columns."""
    file = None if is_on_hub(spec) else runtime.artifacts.open_file(spec.training_file)
    return next(iter(first_prompts(file, 1)), None)


def _draft(
    transaction: Transaction,
    runtime: Runtime,
    submission: Submission,
    resolved: endpoints.ResolvedSpec,
) -> Draft:
    """Check a submission against everything but the files of its models."""
    check_settings(runtime, submission, resolved)
    data = check_data(transaction, runtime, submission)
    model, installed = find_model(transaction, runtime, submission)
    plan = Plan(submission, resolved, model, data.num_rows, file_sha256=data.sha256)
    return Draft(plan, data, installed)


def check_settings(
    runtime: Runtime, submission: Submission, resolved: endpoints.ResolvedSpec
) -> None:
    """Check what needs neither data nor models.

    Raises:
        InvalidRequestError: A setting or a reward cannot be used.
    """
    if problems := spec_checks.problems_of(submission.spec):
        raise errors.invalid(problems)
    rewards = resolved.spec.dar.rewards
    if rewards is not None:
        if problems := check_rewards(rewards):
            raise errors.invalid(problems)
        models.check_reward_models(runtime.settings, rewards)


def check_data(transaction: Transaction, runtime: Runtime, submission: Submission) -> CheckedData:
    """Check the files of a job, and keep them until the transaction ends.

    Raises:
        InvalidRequestError: A file is not there, or its rows do not fit the job.
    """
    data = _check_files(transaction, runtime.settings.hub_datasets, submission)
    if problems := spec_checks.length_problems(submission.spec, data.num_rows):
        raise errors.invalid(problems)
    return data


def find_model(
    transaction: Transaction, runtime: Runtime, submission: Submission
) -> tuple[models.ResolvedModel, model_checks.ModelFiles | None]:
    """The model that a job trains, and its files; None for a hub model.

    Raises:
        ModelNotFoundError: There is no such model.
    """
    project_id, name = submission.user.project_id, submission.spec.model
    model = models.resolve(transaction, runtime.settings, project_id, name)
    return model, models.files_of(transaction, runtime, name, model.source)


def _complete(runtime: Runtime, draft: Draft) -> Plan:
    """Check the files of the models, outside of a transaction: a bucket may take its time."""
    spec = draft.plan.submission.spec
    if problems := model_problems(runtime, spec, draft.files, draft.data):
        raise errors.invalid(problems)
    memory = None if draft.files is None else least_memory(spec.dar, draft.files)
    return replace(draft.plan, memory=memory, model_sha256=ingredients.of_model(draft.files))


def model_problems(
    runtime: Runtime, spec: JobSpec, model: model_checks.ModelFiles | None, data: CheckedData
) -> list[Problem]:
    """What the files of the job's models rule out. A hub model's are known to the worker alone."""
    judges = models.reward_folders(spec)
    installed = {
        component: model_checks.ModelFiles(name, runtime.settings.models_path / name)
        for component, name in judges.items()
    }
    problems = list(model_checks.reward_model_problems(spec, installed))
    if model is not None:
        problems += model_checks.problems_of(spec, model, data.chat_rows)
    return problems


def _keep(transaction: Transaction, plan: Plan) -> bool:
    """Keep what a plan needs until the transaction ends. Returns whether nothing has changed."""
    copy = plan.submission.copy
    start = None if copy is None else copy.origin.checkpoint_id
    # A fork names its checkpoint by its step, which a later attempt may write again.
    if start is not None and start not in plan.model.checkpoint_ids:
        return False
    return (
        reward_endpoints.keep(transaction, plan.revisions)
        and files.keep(transaction, plan.file_ids) == plan.file_ids
        and checkpoints.keep(transaction, plan.model.checkpoint_ids)
    )


def _check_files(
    transaction: Transaction, hub_datasets: Sequence[str], submission: Submission
) -> CheckedData:
    """Check the job's files."""
    spec = submission.spec
    problems: list[Problem] = []
    num_rows: int | None = None
    chat_rows: dict[str, int | None] = {}
    sha256: dict[str, str] = {}
    if is_on_hub(spec):
        _check_hub_data(hub_datasets, spec)
    else:
        file = _file(transaction, submission, "training_file", spec.training_file)
        problems += datasets.check_for(spec, file.columns)
        num_rows = file.num_rows
        sha256["training_file"] = file.sha256
        chat_rows["training_file"] = datasets.first_chat(file.columns)
    if spec.validation_file is not None:
        file = _file(transaction, submission, "validation_file", spec.validation_file)
        problems += datasets.check_for(spec, file.columns, "validation_file")
        sha256["validation_file"] = file.sha256
        chat_rows["validation_file"] = datasets.first_chat(file.columns)
    if problems:
        raise errors.invalid(problems)
    return CheckedData(num_rows, chat_rows, sha256)


def _file(transaction: Transaction, submission: Submission, param: str, file_id: str) -> FileRow:
    try:
        return files.get(transaction, submission.user.project_id, file_id, is_keeping=True)
    except NotFoundError as error:
        raise InvalidRequestError(
            f"{param}: {error.message}", param=param, code="file_not_found"
        ) from None


def is_on_hub(spec: JobSpec) -> bool:
    return spec.training_file.startswith(SCHEME)


def _check_hub_data(patterns: Sequence[str], spec: JobSpec) -> None:
    """Check that the data set is allowed. The worker finds out whether it exists."""
    name = HubData.parse(spec.training_file).name
    if not any(fnmatchcase(name, pattern) for pattern in patterns):
        allowed = ", ".join(patterns) or "none"
        raise InvalidRequestError(
            f"hub data set {name!r} is not allowed here; allowed patterns: {allowed} "
            "(DAR_HUB_DATASETS)",
            param="training_file",
            code="dataset_not_allowed",
        )
    if spec.dar.hyperparameters.max_steps is None:
        raise InvalidRequestError(
            "the rows of a hub data set are counted only where it is loaded, so the job's length "
            "cannot follow from n_epochs; send max_steps",
            param="method.dar.hyperparameters.max_steps",
            code="missing",
        )


def _new_job(transaction: Transaction, plan: Plan) -> JobRow:
    submission = plan.submission
    spec, job_id = submission.spec, new_id("ftjob-")
    job = JobRow(
        id=job_id,
        project_id=submission.user.project_id,
        api_key_id=submission.user.key_id,
        created_at=transaction.now,
        status="queued" if spec.auto_start else "paused",
        status_detail=None if spec.auto_start else "by_user",
        status_message="waiting for a worker" if spec.auto_start else jobs.NOT_STARTED,
        model=spec.model,
        model_source=_source_of(plan).model_dump(),
        model_name=_result_name(spec.model, spec.suffix, job_id),
        training_file="" if is_on_hub(spec) else spec.training_file,
        spec=plan.resolved.spec.model_dump(mode="json", exclude={"auto_start"}),
        labels=spec.metadata,
        suffix=spec.suffix,
        seed=secrets.randbelow(2**31) if spec.seed is None else spec.seed,
        total_steps=total_steps(
            spec.dar.hyperparameters, plan.num_rows or 0, spec.dar.resources.processes
        ),
        keep_last=spec.dar.checkpointing.keep_last,
        keep_every=spec.dar.checkpointing.keep_every,
        not_before=transaction.now,
        memory_bytes=None if plan.memory is None else plan.memory.on_cpu,
        loading_bytes=None if plan.memory is None else plan.memory.beside_gpus,
        idempotency_key=submission.idempotency_key,
        body_sha256=submission.body_sha256,
        retry_count=submission.retry_count,
        origin=None if submission.copy is None else submission.copy.origin.model_dump(),
    )
    made = ingredients.of_job(transaction, job, plan.file_sha256, plan.model_sha256)
    job.ingredients = made.model_dump()
    return job


def _source_of(plan: Plan) -> ModelSource:
    """Where the weights come from; a job that is run again has the commits that it had before."""
    source, copy = plan.model.source, plan.submission.copy
    if copy is None or not copy.revisions:
        return source
    return source.model_copy(update={"revisions": dict(copy.revisions)})


def _result_name(model: str, suffix: str | None, job_id: str) -> str:
    """Name of a job's result: ``ft-<model>-<suffix>-<id8>``, without slashes."""
    base = re.sub(r"[^A-Za-z0-9_.-]", "-", model)[:96]
    return "-".join(part for part in ("ft", base, suffix, job_id[-8:].lower()) if part)
