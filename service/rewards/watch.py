"""Probes the reward services of jobs that wait for rewards, queued or paused.

A job goes on when its services answer again.

A separate thread checks the services, and starts the check of a job that is due while others still
run, so that a service that hangs delays no other job. The checks of a job become less frequent
(`service.store.reward_pauses.wait_before_probe`). On PostgreSQL one replica at a time makes them.
"""

import asyncio
import functools
import itertools
import re
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import BinaryIO

import structlog
from sqlalchemy.exc import SQLAlchemyError

from dar.errors import DARError, RewardMisconfiguredError, RewardUnavailableError
from dar.protocol.reward_spec import RewardComponent, RewardLimits, Rewards
from dar.protocol.row_files import lines_of, parse_row
from dar.protocol.worker import ComponentAccess
from dar.rewards.base import Failed, RewardContext, RewardSample
from dar.rewards.http.egress import EgressPolicy
from dar.rewards.probe.callbacks import ProbeInbox
from dar.rewards.probe.client import ProbeClient, ProbeTarget
from dar.rewards.threads import all_of
from service.rewards.endpoints import access_for
from service.runtime import Runtime
from service.store import reward_endpoints, reward_pauses
from service.store.reward_pauses import RewardCheck
from service.store.tables import JobRow

log = structlog.get_logger()
ELECTION_KEY = 0x0DA2_0004
CHECKS_AT_ONCE = 64
"""Most jobs whose services are checked at the same time."""
PROBE_SECONDS = 90.0
"""Time limit for the check of one service, whatever its component allows."""
PROBE_ROWS: Sequence[Mapping[str, object]] = ({"prompt": "Hello"}, {"prompt": "Good evening"})
"""Used if the job's own rows are not on this host."""
COMPLETION = "This completion only asks whether rewards are given."

AccessOf = Callable[[JobRow, RewardComponent], ComponentAccess | None]
"""Returns the access to a component; None: unknown, so that only the user can resume the job."""
Probe = Callable[
    [RewardComponent, ComponentAccess, Sequence[RewardSample], RewardContext], Awaitable[bool]
]
"""Requests rewards once; whether there were any.

Raises `RewardMisconfiguredError` if the service rejects it, `RewardUnavailableError` if it fails.
"""
_UNREACHABLE = re.compile(r"connect|connect_timeout|dns|egress_denied|tls\..*")
"""Codes of failures before a request could be sent. A worker, elsewhere in the network and with
settings of its own, may do better."""


async def light_probe(
    component: RewardComponent,
    access: ComponentAccess,
    samples: Sequence[RewardSample],
    context: RewardContext,
    *,
    guard: EgressPolicy | None = None,
    inbox: ProbeInbox,
) -> bool:
    """Whether the service scores or skips any sample; each request is sent once.

    A service that accepts the request with a 202 is back: its result may take long, and may arrive
    at another replica.

    Raises:
        RewardMisconfiguredError: The service rejects every request.
        RewardUnavailableError: Every request failed.
    """
    own = component.timeouts
    bounds = {
        "attempt": min(own.attempt, PROBE_SECONDS),
        "deadline": min(own.deadline, PROBE_SECONDS),
    }
    changes = {"limits": RewardLimits(concurrency=1), "timeouts": own.model_copy(update=bounds)}
    component = component.model_copy(update=changes)
    target = ProbeTarget(component, access.url, access.secrets, access.headers, guard, inbox)
    failed: RewardUnavailableError | None = None
    async with ProbeClient(target) as client:
        waiting = deque(client.split(samples))
        while waiting:
            part = waiting.popleft()
            call = await client.send(part, context=context, stops_at_202=True)
            if call.failure is not None:
                # Without the answer's text: each probe of a service would show another one.
                message, code = f"{client.label}: {call.failure.reason}", call.failure.code
                if call.is_refused:
                    raise RewardMisconfiguredError(message, code=code)
                failed = RewardUnavailableError(message, code=code)
            is_answered = any(not isinstance(result, Failed) for result in call.results)
            if is_answered or (call.is_accepted and call.failure is None):
                return True
            if call.failure is not None and call.failure.kind == "too_large" and len(part) > 1:
                waiting.extend((sample,) for sample in part)
    if failed is not None:
        raise failed
    return False


def first_prompts(file: BinaryIO | None, count: int) -> list[RewardSample]:
    """The first rows of a training file with a built-in completion; none if the file is not here.

    Args:
        file: Checked JSON Lines; None: the data are on a hub, or missing. It is closed.
        count: Most rows.
    """
    if file is None:
        return []
    with file:
        lines = itertools.islice(filter(bytes.strip, lines_of(file)), count)
        return [as_sample(index, parse_row(line)) for index, line in enumerate(lines)]


def as_sample(index: int, row: Mapping[str, object]) -> RewardSample:
    """A row as a sample. Only the worker knows the chat template, so ``prompt_text`` is plain."""
    prompt = row.get("prompt")
    messages = prompt if isinstance(prompt, list) else None
    return RewardSample(
        id=f"s{index}",
        group_id=f"g{index}",
        index=0,
        prompt=None if messages is not None else str(prompt or ""),
        messages=messages,
        completion=COMPLETION,
        finish_reason="stop",
        completion_tokens=len(COMPLETION.split()),
        columns={name: value for name, value in row.items() if name != "prompt"},
        prompt_text=None if messages is None else _plain(messages),
    )


def _plain(messages: list[Mapping[str, object]]) -> str:
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in messages)


class RewardWatch:
    """Lets jobs go on whose reward services are back.

    Args:
        runtime: The runtime of this process.
        probe: Checks a reward service; replaced in tests.
        access_of: Default: the registered endpoints, and the reward secret for inline URLs.
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
        settings = runtime.settings
        self._pause_seconds = min(settings.reconcile_seconds, settings.reward_probe_seconds)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reward-watch", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop. A check in progress is abandoned; the next process repeats it."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=1)

    def run_once(self) -> None:
        """Check all jobs that are due, if this replica is elected, until no check runs any more."""
        with self._runtime.database.elected(ELECTION_KEY) as is_elected:
            if is_elected and (due := self._due(frozenset())):
                asyncio.run(self._check_all(due))

    def _due(self, running: Collection[str]) -> Sequence[JobRow]:
        """Jobs to check now, besides those with the ids ``running``."""
        with self._runtime.database.read() as transaction:
            return reward_pauses.due(transaction, CHECKS_AT_ONCE - len(running), running)

    async def _check_all(self, due: Sequence[JobRow]) -> None:
        """Check jobs, and those that become due meanwhile."""
        running: dict[str, asyncio.Task[None]] = {}
        try:
            while due or running:
                running |= {job.id: asyncio.create_task(self._check(job)) for job in due}
                await asyncio.wait(running.values(), timeout=self._pause_seconds)
                if self._stop.is_set():
                    return
                for job_id, check in list(running.items()):
                    if check.done():
                        del running[job_id]
                        check.result()
                due = self._due(running) if running else ()
        finally:
            for check in running.values():
                check.cancel()

    async def _check(self, job: JobRow) -> None:
        """Check one job and store the result at once: the other jobs may take long."""
        found = await self._found_of(job)
        if not self._stop.is_set():
            self._note(job, found)

    async def _found_of(self, job: JobRow) -> RewardCheck:
        """Whether the reward services of a job give the rewards that it needs."""
        try:
            found = await self._probe_all(job)
        except DARError as error:
            is_undecided = _UNREACHABLE.fullmatch(error.error_code) is not None
            found = RewardCheck(is_back=False, reason=error.message, is_undecided=is_undecided)
        except Exception:
            # Outermost frame of one job's check: a broken spec or row must not keep others paused.
            log.exception("unexpected error in the check of a job's rewards", job_id=job.id)
            return RewardCheck(is_back=False, reason="the check failed; the service's log says why")
        if not found.is_back:
            log.info("reward service is not back", job_id=job.id, reason=found.reason)
        return found

    async def _probe_all(self, job: JobRow) -> RewardCheck:
        """See `_found_of`.

        Raises:
            RewardMisconfiguredError: A service rejects every request, which pauses a job even if
                the component has no weight.
        """
        rewards = job.parsed_spec.dar.rewards
        remote = (
            [] if rewards is None else [one for one in rewards.components if one.kind == "http"]
        )
        if rewards is None or not remote:
            reason = "its rewards are computed by the worker"
            return RewardCheck(is_back=False, reason=reason, is_undecided=True)
        found = [(one, self._access_of(job, one)) for one in remote]
        reached = [(one, access) for one, access in found if access is not None]
        if len(reached) < len(remote):
            reason = "the secrets of its endpoint cannot be read"
            return RewardCheck(is_back=False, reason=reason, is_undecided=True)
        samples = self._samples(job)
        context = RewardContext(step=max(1, job.step), mode="validate", job_id=job.id)
        answers = await all_of(
            self._probe_one(one, access, samples, context) for one, access in reached
        )
        checks = dict(zip([component.name for component in remote], answers, strict=True))
        reasons = [one.reason for one in checks.values() if one.reason]
        return RewardCheck(
            is_back=_suffice(rewards, {name: one.is_back for name, one in checks.items()}),
            reason="; ".join(reasons),
            is_undecided=_suffice(
                rewards, {name: one.is_back or one.is_undecided for name, one in checks.items()}
            ),
        )

    async def _probe_one(
        self,
        component: RewardComponent,
        access: ComponentAccess,
        samples: Sequence[RewardSample],
        context: RewardContext,
    ) -> RewardCheck:
        """Whether one service is back.

        Raises:
            RewardMisconfiguredError: It rejects every request.
        """
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                is_back = await self._probe(component, access, samples, context)
        except TimeoutError:
            return RewardCheck(is_back=False, reason=f"component {component.name}: too slow")
        except RewardMisconfiguredError:
            self._set_state(access, "misconfigured")
            raise
        except RewardUnavailableError as error:
            is_undecided = _UNREACHABLE.fullmatch(error.error_code) is not None
            return RewardCheck(is_back=False, reason=error.message, is_undecided=is_undecided)
        if is_back:
            self._set_state(access, "ok")
            return RewardCheck(is_back=True)
        return RewardCheck(is_back=False, reason=f"component {component.name}: no reward")

    def _set_state(self, access: ComponentAccess, state: reward_endpoints.State) -> None:
        if access.endpoint_id is None or self._stop.is_set():
            return
        with self._runtime.database.write() as transaction:
            reward_endpoints.set_state(transaction, access.endpoint_id, access.revision, state)

    def _samples(self, job: JobRow) -> list[RewardSample]:
        """The first prompts of the job, as a reward service may need their columns."""
        file = self._runtime.artifacts.open_file(job.training_file)
        found = first_prompts(file, len(PROBE_ROWS))
        return found or [as_sample(index, row) for index, row in enumerate(PROBE_ROWS)]

    def _note(self, job: JobRow, check: RewardCheck) -> None:
        runtime = self._runtime
        seconds = runtime.settings.reward_probe_seconds
        with runtime.database.write() as transaction:
            transaction.after_commit(lambda: runtime.notifier.notify(job.id))
            if not reward_pauses.note_probe(transaction, job.id, job.attempt, check, seconds):
                return
            if check.is_back:
                log.info("reward service is back", job_id=job.id)
            transaction.after_commit(runtime.waker.wake)
            if job.status == "paused":
                transaction.after_commit(lambda: runtime.telemetry.note("reward_resumes"))

    def _run(self) -> None:
        while not self._stop.wait(self._pause_seconds):
            try:
                self.run_once()
            except (SQLAlchemyError, DARError, OSError) as error:
                log.warning("check of reward services failed; will retry", error=str(error))
            except Exception:
                # Outermost frame of the thread: without it no paused job resumes by itself.
                log.exception("unexpected error in the check of reward services; will retry")


def _suffice(rewards: Rewards, is_back: Mapping[str, bool]) -> bool:
    """Whether a sample can be scored without the services that are not back.

    Args:
        rewards: The job's rewards.
        is_back: Whether each remote component answers, by name.
    """
    counting = [one for one in rewards.components if one.weight != 0]  # a gate has the weight 1
    needed = [one for one in counting if one.required]
    if not all(is_back.get(one.name, True) for one in needed):
        return False
    if any(one.role == "term" for one in needed):
        return True
    # If no term is required, a sample fails only if all of them fail.
    optional = [is_back[one.name] for one in counting if one.name in is_back and not one.required]
    return not optional or any(optional)
