"""Looks after jobs that are paused for want of rewards: when their reward services answer again, the jobs go on by themselves.

The looks are made in a thread of their own, so that a reward service that hangs holds up nothing else, and ever less often
(`service.store.reward_pauses.wait_before_probe`). On PostgreSQL one replica at a time makes them.
"""

import asyncio
import functools
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

import structlog
from sqlalchemy.exc import SQLAlchemyError

from dar.errors import DARError
from dar.protocol.reward_spec import RewardComponent, RewardLimits, RewardRetry, Rewards
from dar.protocol.spec import JobSpec
from dar.protocol.worker import ComponentAccess
from dar.rewards.assembly import http_options
from dar.rewards.asynchronous import Inbox
from dar.rewards.base import Failed, RewardContext, RewardSample
from dar.rewards.guard import EgressPolicy
from dar.rewards.http import HttpReward
from service.endpoints import access_for
from service.first_prompts import as_sample, first_prompts
from service.runtime import Runtime
from service.store import reward_pauses
from service.store.tables import Job

log = structlog.get_logger()
ELECTION_KEY = 0x0DA2_0004
JOBS_PER_PASS = 16
PROBE_SECONDS = 30.0
"""Longest look at one job's reward services."""
ATTEMPT_SECONDS = 10.0
PROBE_ROWS: Sequence[Mapping[str, object]] = ({"prompt": "Hello"}, {"prompt": "Good evening"})
"""Where the job's own rows are not here."""


AccessOf = Callable[[Job, RewardComponent], ComponentAccess | None]
"""The access to a component of a job; None: not known here, so that only the user can resume the job."""
Probe = Callable[
    [RewardComponent, ComponentAccess, Sequence[RewardSample], RewardContext], Awaitable[bool]
]
"""Asks a reward service for rewards once; whether it gave any. Raises `DARError` where it refuses."""


async def light_probe(
    component: RewardComponent,
    access: ComponentAccess,
    samples: Sequence[RewardSample],
    context: RewardContext,
    *,
    guard: EgressPolicy | None = None,
    inbox: Inbox | None = None,
) -> bool:
    """One request, without retries: whether any sample gets an answer that is no failure.

    Raises:
        RewardMisconfiguredError: The service refuses us for good.
    """
    attempt = min(component.timeouts.attempt, ATTEMPT_SECONDS)
    timeouts = component.timeouts.model_copy(update={"attempt": attempt, "deadline": attempt})
    options = replace(
        # What was learned from earlier refusals must not answer for the service.
        http_options(component, access, guard=guard, is_shared=False),
        limits=RewardLimits(concurrency=1),
        timeouts=timeouts,
        retry=RewardRetry(attempts=1),
    )
    source = HttpReward(
        component.name, access.url, secrets=access.secrets, options=options, inbox=inbox
    )
    try:
        results = await source.score(samples, context)
    finally:
        await source.aclose()
    return not all(isinstance(result, Failed) for result in results)


class RewardWatch:
    """Resumes jobs whose reward services are back.

    Args:
        runtime: Of this process.
        probe: Asks a reward service; replaced in tests.
        access_of: Knows where it is; default: the registered endpoints, and the project's reward secret for inline URLs.
    """

    def __init__(
        self, runtime: Runtime, probe: Probe | None = None, access_of: AccessOf | None = None
    ) -> None:
        self._runtime = runtime
        guard = EgressPolicy.from_settings(runtime.settings)
        self._probe = probe or functools.partial(
            light_probe, guard=guard, inbox=runtime.probe_inbox
        )
        self._access_of = access_of or functools.partial(access_for, runtime)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reward-watch", daemon=True)

    def start(self) -> None:
        """Start looking."""
        self._thread.start()

    def close(self) -> None:
        """Look no more. A look in progress is not waited for: what it finds is found again."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=1)

    def run_once(self) -> None:
        """Look at the jobs that are due, all at once, if this replica is the one to do it."""
        database = self._runtime.database
        with database.elected(ELECTION_KEY) as is_elected:
            if not is_elected:
                return
            with database.read() as transaction:
                due = reward_pauses.due(transaction, JOBS_PER_PASS)
            if not due:
                return
            answers = asyncio.run(self._ask_all(due))
            for job, is_back in zip(due, answers, strict=True):
                if self._stop.is_set():
                    return
                self._note(job, is_back=is_back)

    async def _ask_all(self, due: Sequence[Job]) -> list[bool]:
        return list(await asyncio.gather(*map(self._ask, due)))

    async def _ask(self, job: Job) -> bool:
        """Whether all reward services of a job give rewards."""
        rewards = JobSpec.model_validate(job.spec).dar.rewards
        asked = _remote(rewards)
        if not asked:
            return False  # what is computed beside the trainer does not come back by itself
        samples = self._samples(job)
        context = RewardContext(step=max(1, job.step), mode="validate", job_id=job.id)
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                for component in asked:
                    access = self._access_of(job, component)
                    if access is None or not await self._probe(component, access, samples, context):
                        return False
        except (DARError, TimeoutError) as error:
            code = error.error_code if isinstance(error, DARError) else "timeout"
            log.info("reward service is not back", job_id=job.id, code=code)
            return False
        return True

    def _samples(self, job: Job) -> list[RewardSample]:
        """The first prompts of the job, as a reward service may need their columns, with a completion of ours."""
        path = self._runtime.artifacts.file(job.training_file) if job.training_file else None
        found = first_prompts(path, len(PROBE_ROWS))
        return found or [as_sample(index, row) for index, row in enumerate(PROBE_ROWS)]

    def _note(self, job: Job, *, is_back: bool) -> None:
        runtime = self._runtime
        seconds = runtime.settings.reward_probe_seconds
        with runtime.database.write() as transaction:
            if not reward_pauses.note_probe(
                transaction, job.id, job.attempt, is_back=is_back, base_seconds=seconds
            ):
                return
            log.info("reward service is back", job_id=job.id)
            transaction.after_commit(runtime.waker.wake)
            transaction.after_commit(lambda: runtime.notifier.notify(job.id))
            transaction.after_commit(lambda: runtime.telemetry.note("reward_resumes"))

    def _run(self) -> None:
        settings = self._runtime.settings
        pause = min(settings.reconcile_seconds, settings.reward_probe_seconds)
        while not self._stop.wait(pause):
            try:
                self.run_once()
            except (SQLAlchemyError, DARError, OSError) as error:
                log.warning("look at reward services failed; tried again", error=str(error))
            except Exception:
                # Outermost frame of a thread without which no paused job goes on by itself.
                log.exception("look at reward services failed by a mistake; tried again")


def _remote(rewards: Rewards | None) -> list[RewardComponent]:
    return [] if rewards is None else [one for one in rewards.components if one.kind == "http"]
