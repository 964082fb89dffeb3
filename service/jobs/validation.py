"""A dry run of a submission: every check of it, all problems at once, and what the job would take.

Nothing is stored. The checks are those of `service.jobs.submission`; where one of them ends at its
first problem, the others still run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.concurrency import run_in_threadpool

from dar.errors import InvalidRequestError, NotFoundError, Problem, SecretUnreadableError
from dar.protocol.base import ErrorProblem
from dar.protocol.job_validation import (
    ComponentCheck,
    DataFacts,
    JobEstimate,
    JobValidation,
    MemoryFit,
)
from dar.protocol.reward_probe import ProbeReport
from dar.protocol.spec import JobSpec
from service.http.auth import User
from service.jobs import datasets, estimates, submission
from service.jobs.memory import least_memory, parameters_of
from service.jobs.memory_peak import peak_memory, prompt_tokens
from service.jobs.model_checks import ModelFiles
from service.jobs.submission import CheckedData, Submission
from service.rewards import endpoints, probing
from service.runtime import Runtime
from service.store import files, pace, workers
from service.store.database import Transaction
from service.store.tables import FileRow, WorkerRow

Result = TypeVar("Result")
HUB_MODEL = (
    "a hub model is downloaded by the worker, so its size is not known here before it has run"
)
NO_SIZES = "the files of the model do not say how large it is"


@dataclass
class Findings:
    """What is known of a submission, and why it would be refused."""

    spec: JobSpec
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    data: CheckedData | None = None
    file: FileRow | None = None
    validation_rows: int | None = None
    model: ModelFiles | None = None
    probes: Sequence[probing.ComponentProbe] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    """Component -> why its service is not probed."""
    known_pace: pace.KnownPace | None = None
    fleet: Sequence[WorkerRow] = ()

    def of(self, check: Callable[[], Result]) -> Result | None:
        """The result of a check; None: it has found problems, which are noted."""
        try:
            return check()
        except InvalidRequestError as error:
            found = error.problems or [Problem(error.message, error.param, error.error_code)]
            self.problems += found
        except SecretUnreadableError as error:
            self.problems.append(Problem(error.message, error.param, error.error_code))
        return None


async def validate(runtime: Runtime, user: User, spec: JobSpec) -> JobValidation:
    """The report about a job that is not submitted."""
    found = await run_in_threadpool(examine, runtime, user, spec)
    reports = await probing.reports_on(found.probes)
    return await run_in_threadpool(report, found, reports)


def examine(runtime: Runtime, user: User, spec: JobSpec) -> Findings:
    """Make every check but the probes of reward services."""
    wanted = Submission(user, submission.body_digest(spec), None, 0, spec)
    found = Findings(spec)
    with runtime.database.read() as transaction:
        resolved = found.of(lambda: endpoints.resolve(transaction, user.project_id, spec))
        if resolved is not None:
            found.spec = resolved.spec
            complete = resolved
            found.of(lambda: submission.check_settings(runtime, wanted, complete))
            _find_probes(transaction, runtime, wanted, complete, found)
        found.data = found.of(lambda: submission.check_data(transaction, runtime, wanted))
        _look_at_files(transaction, user, found)
        model = found.of(lambda: submission.find_model(transaction, runtime, wanted))
        found.model = None if model is None else model[1]
        found.known_pace = pace.of_model(transaction, user.project_id, spec.model)
        found.fleet = workers.able(transaction)
    data = found.data or CheckedData(None, {})
    found.problems += submission.model_problems(runtime, spec, found.model, data)
    if found.file is not None and found.probes:
        example = submission.example_of(runtime, spec)
        found.probes = [probing.with_example(one, example) for one in found.probes]
    _list_rows(runtime, found)
    found.warnings += _of_fleet(found)
    return found


def _list_rows(runtime: Runtime, found: Findings) -> None:
    """List every row that lacks a value; the checks of a submission end at the first one."""
    if found.data is not None or found.file is None:
        return
    content = runtime.artifacts.open_file(found.file.id)
    if content is not None:
        with content:
            rows = list(datasets.rows_without(found.spec, found.file.columns, content))
        found.problems += [one for one in rows if one not in found.problems]


def _find_probes(
    transaction: Transaction,
    runtime: Runtime,
    wanted: Submission,
    resolved: endpoints.ResolvedSpec,
    found: Findings,
) -> None:
    rewards = resolved.spec.dar.rewards
    names = (
        [] if rewards is None else [one.name for one in rewards.components if one.kind == "http"]
    )
    if wanted.spec.skip_validation:
        found.skipped = dict.fromkeys(names, "skip_validation is set")
        return
    probes = found.of(lambda: list(submission.probes_of(transaction, runtime, wanted, resolved)))
    taken = [one for one in probes or () if runtime.submission_probes.try_take(wanted.user.key_id)]
    found.probes = taken
    left = set(names) - {one.target.component.name for one in taken}
    why = "too many probes were made with this key within a minute; send the request again later"
    found.skipped = dict.fromkeys(left, why)


def _look_at_files(transaction: Transaction, user: User, found: Findings) -> None:
    spec = found.spec
    if not submission.is_on_hub(spec):
        found.file = _file(transaction, user, spec.training_file)
    if spec.validation_file is not None:
        file = _file(transaction, user, spec.validation_file)
        found.validation_rows = None if file is None else file.num_rows


def _file(transaction: Transaction, user: User, file_id: str) -> FileRow | None:
    try:
        return files.get(transaction, user.project_id, file_id)
    except NotFoundError:
        return None


def _of_fleet(found: Findings) -> list[Problem]:
    wanted = found.spec.dar.resources.processes
    if not found.fleet:
        what = "no worker is alive that may take a job, so the job would wait in the queue"
        return [Problem(what, None, "no_worker")]
    most = max(len((row.report or {}).get("devices") or ()) or wanted for row in found.fleet)
    if wanted > most:
        what = f"the job asks for {wanted} processes, but no worker has more than {most} GPUs"
        return [Problem(what, "method.dar.resources.processes", "too_few_gpus")]
    return []


def report(found: Findings, reports: Sequence[ProbeReport]) -> JobValidation:
    """The report of all checks."""
    spec = found.spec
    checks = []
    for one, probed in zip(found.probes, reports, strict=True):
        lasting = probing.problems_in(one, probed)
        found.problems += lasting
        found.warnings += [
            Problem(f"{finding.detail}. {finding.advice}".strip(), one.param, finding.code)
            for finding in (*probed.warnings, *(() if lasting else probed.errors))
        ]
        checks.append(_check_of(one, probed, is_refused=bool(lasting)))
    checks += [
        ComponentCheck(
            component=name,
            param=endpoints.COMPONENTS,
            status="skipped",
            message=why,
            report=None,
        )
        for name, why in found.skipped.items()
    ]
    memory = memory_of(found)
    return JobValidation(
        object="fine_tuning.job.validation",
        allowed_to_proceed=not found.problems,
        problems=[_shown(one) for one in found.problems],
        warnings=[_shown(one) for one in found.warnings],
        model=spec.model,
        method=spec.method.model_dump(mode="json"),
        data=_data_of(found),
        rewards=checks,
        memory=memory,
        estimate=_estimate_of(found),
    )


def _check_of(
    one: probing.ComponentProbe, probed: ProbeReport, *, is_refused: bool
) -> ComponentCheck:
    first = next(iter(probed.errors), None)
    return ComponentCheck(
        component=one.target.component.name,
        param=one.param,
        status="failed" if is_refused else "waiting" if first else "ok",
        message=None if first is None else first.detail,
        report=probed,
    )


def _data_of(found: Findings) -> DataFacts:
    file = found.file
    return DataFacts(
        num_rows=None if file is None else file.num_rows,
        bytes=None if file is None else file.bytes,
        sha256=None if file is None else file.sha256,
        columns=[] if file is None else datasets.common_columns(file.columns),
        validation_rows=found.validation_rows,
    )


def memory_of(found: Findings) -> MemoryFit:
    """What the trainer needs, and whether a worker has as much free."""
    spec, model, file = found.spec.dar, found.model, found.file
    if model is None:
        why = HUB_MODEL if "/" in found.spec.model else NO_SIZES
        return _unknown_memory(why)
    count, least = parameters_of(model), least_memory(spec, model)
    if count is None or least is None:
        return _unknown_memory(NO_SIZES)
    prompt = None if file is None else prompt_tokens(file.bytes, file.num_rows)
    peak = peak_memory(spec, model, prompt)
    free = [
        row.report["memory_free"]
        for row in found.fleet
        if row.report is not None and not row.report["devices"]
    ]
    known = [one for one in free if one is not None]
    has_others = len(known) < len(found.fleet)
    needed = least.on_cpu if peak is None else peak.on_cpu
    is_room = any(one >= needed for one in known)
    fits = True if is_room else None if has_others or not known else False
    return MemoryFit(
        parameters=count,
        least_bytes=least.on_cpu,
        peak_bytes=None if peak is None else peak.on_cpu,
        peak_gpu_bytes=None if peak is None else peak.on_gpu,
        fits=fits,
        message="computed from the files of the model"
        + ("" if peak is not None else "; its config.json does not say how wide its layers are"),
    )


def _unknown_memory(why: str) -> MemoryFit:
    return MemoryFit(
        parameters=None,
        least_bytes=None,
        peak_bytes=None,
        peak_gpu_bytes=None,
        fits=None,
        message=why,
    )


def _estimate_of(found: Findings) -> JobEstimate | None:
    if found.data is None:
        return None
    return estimates.of_job(
        found.spec, found.data.num_rows, found.validation_rows, found.known_pace
    )


def _shown(one: Problem) -> ErrorProblem:
    return ErrorProblem(param=one.param, message=one.message, code=one.code, row=one.row)
