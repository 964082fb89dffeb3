"""Looks after jobs that are paused for want of rewards: when their reward services answer again, the jobs go on by themselves.

The looks are made in a thread of their own, so that a reward service that hangs holds up nothing else, and ever less often
(`service.store.reward_pauses.wait_before_probe`). On PostgreSQL one replica at a time makes them.
"""

import asyncio
import functools
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime

import structlog
from sqlalchemy.exc import SQLAlchemyError

from dar.errors import DARError
from dar.protocol.reward_spec import RewardComponent, RewardLimits, RewardRetry, Rewards
from dar.protocol.spec import JobSpec
from dar.protocol.worker import ComponentAccess
from dar.rewards.base import Failed, RewardContext, RewardSample
from dar.rewards.from_spec import http_options
from dar.rewards.http.async_results import Inbox, Stored
from dar.rewards.http.egress import EgressPolicy
from dar.rewards.http_reward import HttpReward
from dar.rewards.threads import all_of
from service.rewards.endpoints import access_for
from service.rewards.first_prompts import as_sample, first_prompts
from service.runtime import Runtime
from service.store import reward_pauses
from service.store.tables import Job

log = structlog.get_logger()
ELECTION_KEY = 0x0DA2_0004
JOBS_PER_PASS = 16
PROBE_SECONDS = 90.0
"""Longest look at a reward service, whatever its component allows an attempt."""
PROBE_ROWS: Sequence[Mapping[str, object]] = ({"prompt": "Hello"}, {"prompt": "Good evening"})
"""Where the job's own rows are not here."""


AccessOf = Callable[[Job, RewardComponent], ComponentAccess | None]
"""The access to a component of a job; None: not known here, so that only the user can resume the job."""
Probe = Callable[
    [RewardComponent, ComponentAccess, Sequence[RewardSample], RewardContext], Awaitable[bool]
]
"""Asks a reward service for rewards once; whether it gave any. Raises `DARError` where it refuses."""


class _Acceptance:
    """An inbox that notes when a request was accepted with a valid 202; its result is not waited for.

    Args:
        inbox: What is offered to the service as the place of its result.
    """

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._announced: set[str] = set()
        self.came = asyncio.Event()

    async def announce(
        self,
        request_id: str,
        component: str,
        step: int,
        token_sha256: str,
        deadline: datetime,
        sample_ids: Sequence[str],
    ) -> Stored:
        """See `Inbox`."""
        self._announced.add(request_id)
        return await self._inbox.announce(
            request_id, component, step, token_sha256, deadline, sample_ids
        )

    async def wait(self, request_id: str) -> bytes:
        """See `Inbox`."""
        return await self._inbox.wait(request_id)

    def accepted(self, request_id: str, poll_url: str | None) -> None:
        """See `Inbox`."""
        self._inbox.accepted(request_id, poll_url)
        self.came.set()

    def close(self, request_id: str) -> None:
        """See `Inbox`."""
        self._inbox.close(request_id)

    def close_all(self) -> None:
        """Nobody waits for a result any more."""
        for request_id in self._announced:
            self.close(request_id)


async def light_probe(
    component: RewardComponent,
    access: ComponentAccess,
    samples: Sequence[RewardSample],
    context: RewardContext,
    *,
    guard: EgressPolicy | None = None,
    inbox: Inbox,
) -> bool:
    """One request, without retries, within the component's own limits: whether any sample gets an answer that is no failure.

    A service that accepts the request with a 202 is back: it may take long over the result, and give it to another replica.

    Raises:
        RewardMisconfiguredError: The service refuses us for good.
    """
    own = component.timeouts
    bounds = {
        "attempt": min(own.attempt, PROBE_SECONDS),
        "deadline": min(own.deadline, PROBE_SECONDS),
    }
    options = replace(
        # What was learned from earlier refusals must not answer for the service.
        http_options(component, access, guard=guard, is_shared=False),
        limits=RewardLimits(concurrency=1),
        timeouts=own.model_copy(update=bounds),
        retry=RewardRetry(attempts=1),
    )
    acceptance = _Acceptance(inbox)
    source = HttpReward(
        component.name, access.url, secrets=access.secrets, options=options, inbox=acceptance
    )
    scoring = asyncio.create_task(source.score(samples, context))
    accepted = asyncio.create_task(acceptance.came.wait())
    try:
        await asyncio.wait({scoring, accepted}, return_when=asyncio.FIRST_COMPLETED)
        if not scoring.done():
            return True
        return not all(isinstance(result, Failed) for result in scoring.result())
    finally:
        scoring.cancel()
        accepted.cancel()
        await asyncio.gather(scoring, accepted, return_exceptions=True)
        acceptance.close_all()
        await source.aclose()


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
            asyncio.run(self._look_at(due))

    async def _look_at(self, due: Sequence[Job]) -> None:
        await all_of(map(self._look, due))

    async def _look(self, job: Job) -> None:
        """Look at one job, and note at once what was seen: the others may take long."""
        is_back = await self._ask(job)
        if not self._stop.is_set():
            self._note(job, is_back=is_back)

    async def _ask(self, job: Job) -> bool:
        """Whether the reward services of a job give the rewards without which it cannot go on."""
        try:
            return await self._are_back(job)
        except DARError as error:
            log.info("reward service is not back", job_id=job.id, code=error.error_code)
        except Exception:
            # Outermost frame of one job's look: whatever is wrong with its spec or rows must not keep the other jobs paused.
            log.exception("look at the reward services of a job failed by a mistake", job_id=job.id)
        return False

    async def _are_back(self, job: Job) -> bool:
        """See `_ask`.

        Raises:
            RewardMisconfiguredError: One of the services refuses us for good, which pauses a job whatever the component counts.
        """
        rewards = JobSpec.model_validate(job.spec).dar.rewards
        remote = (
            [] if rewards is None else [one for one in rewards.components if one.kind == "http"]
        )
        if rewards is None or not remote:
            return False  # what is computed beside the trainer does not come back by itself
        found = [(one, self._access_of(job, one)) for one in remote]
        reached = [(one, access) for one, access in found if access is not None]
        if len(reached) < len(remote):
            return False
        samples = self._samples(job)
        context = RewardContext(step=max(1, job.step), mode="validate", job_id=job.id)
        answers = await all_of(
            self._answers(one, access, samples, context) for one, access in reached
        )
        names = [component.name for component in remote]
        return _suffice(rewards, dict(zip(names, answers, strict=True)))

    async def _answers(
        self,
        component: RewardComponent,
        access: ComponentAccess,
        samples: Sequence[RewardSample],
        context: RewardContext,
    ) -> bool:
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                is_back = await self._probe(component, access, samples, context)
        except TimeoutError:
            is_back = False
        if not is_back:
            log.info("reward service is not back", job_id=context.job_id, component=component.name)
        return is_back

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


def _suffice(rewards: Rewards, is_back: Mapping[str, bool]) -> bool:
    """Whether no sample need become an error for want of the services that are not back.

    Args:
        rewards: The job's.
        is_back: Whether each remote component answers, by name.
    """
    counting = [one for one in rewards.components if one.weight != 0]  # a gate has the weight 1
    needed = [one for one in counting if one.required]
    if not all(is_back.get(one.name, True) for one in needed):
        return False
    if any(one.role == "term" for one in needed):
        return True
    # Where no term is required, a sample is an error only if all of them fail.
    optional = [is_back[one.name] for one in counting if one.name in is_back and not one.required]
    return not optional or any(optional)
