"""Random users, workers, losses of messages and crashes against a model of what must come of it.

A message is delivered at once, later, again after its reply was lost, or to a service that crashes
before it commits. After each one the store has what the model has, and the auditor finds nothing.
In the end every job that was not deleted can be finished.
"""

import contextlib
import hashlib
import itertools
import shutil
import tempfile
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dar.errors import DARError
from dar.protocol.checkpoints import MANIFEST_NAME
from dar.protocol.status import TERMINAL
from dar.protocol.worker import Claim, Complete, Fail, MetricsRow, Release
from fakes.histories.job_model import STEPS, JobModel, ModelAttempt, ModelJob, Place
from fakes.row_audit import audit_rows
from fakes.world import TTL, FakeClock, World
from service.artifacts import Artifacts
from service.audit import Acknowledged, audit
from service.background.notifier import Notifier
from service.background.reconciler import Reconciler
from service.background.waker import Waker
from service.storage.folder import FolderStorage
from service.store import (
    checkpoints,
    deletion,
    fence,
    jobs,
    leases,
    outcomes,
    reward_pauses,
    rows,
    tables,
)
from service.store.database import Database, Transaction

PLACES = (("node-1", "0"), ("node-1", "1"), ("node-2", "0"), ("node-3", "0"))
SLICE = 10.0
"""Seconds between two passes of the reconciler."""
LEFT_TO_OTHERS = 21.0
"""Seconds for which a job that has failed on a node may be left to workers of others."""
NEXT = st.sampled_from(["now"] * 5 + ["now and again", "later", "crash"])
"""How a message travels."""
FAILURES: Mapping[str, tuple[Any, Any]] = {
    "user": ("user", None),
    "own": ("transient", None),
    "storage": ("transient", "storage"),
}
"""Kinds of failures with what a worker reports: kind and owner."""
ENDS = ["complete", "complete", "own", *FAILURES]
ENDS += ["drained", "waiting_for_reward", "cancelled", "paused", "paused_reward"]
ANY = st.integers(0, 9999)
ROUNDS = 50
"""In which every job has an attempt that nothing disturbs."""


class CrashError(Exception):
    """The service is killed with a transaction that it has not committed."""


Work = Callable[[Transaction], Any]


def value_of(step: int) -> float:
    return 1 / step


class Jobs(RuleBasedStateMachine):
    """An installation without processes."""

    open_database: Callable[[FakeClock], Any]
    """Opens an empty database; a context manager."""

    def __init__(self) -> None:
        super().__init__()
        self.clock, self.elapsed, self.started_at = FakeClock(), 0.0, 0.0
        self.opened = type(self).open_database(self.clock)
        self.database: Database = self.opened.__enter__()
        self.world = World(self.database, self.clock)
        with self.database.write() as transaction:
            file = {"id": "file-1", "project_id": self.world.project_id, "filename": "rows.jsonl"}
            file |= {"purpose": "fine-tune", "bytes": 2, "sha256": "0" * 64, "num_rows": 1}
            file |= {"columns": {}, "created_at": self.clock.now}
            transaction.add(tables.FileRow(**file))
        self.folder = Path(tempfile.mkdtemp(prefix="dar-jobs-"))
        self.artifacts = Artifacts(FolderStorage(self.folder / "artifacts"))
        self.artifacts.storage.prepare()
        self.model = JobModel()
        self.processes = dict.fromkeys(PLACES, 1)
        self.late: list[Callable[[], Any]] = []
        self.acknowledged: list[Acknowledged] = []
        self.count = itertools.count(1)
        self.start_service()

    # --- delivery ---

    def send(self, how: str, on_model: Callable[[], Any], work: Work) -> Any:
        """Let a message arrive, which the model and the store must answer alike."""

        def deliver() -> Any:
            self.tick()
            expected = outcome_of(on_model)
            assert outcome_of(lambda: self.database.transact(work)) == expected
            return expected

        if how == "crash":
            self.crash(work)
        elif how == "later":
            self.late.append(deliver)
        else:
            if how == "now and again":
                self.late.append(deliver)
            return deliver()
        return None

    def new_id(self) -> str:
        return f"ftjob-{next(self.count):04}"

    def tick(self) -> None:
        """No two messages arrive at the same instant."""
        self.clock.advance(0.01)
        self.elapsed += 0.01

    def crash(self, work: Work) -> None:
        def crashing(transaction: Transaction) -> None:
            outcome_of(lambda: work(transaction))
            raise CrashError

        with contextlib.suppress(CrashError):
            self.database.transact(crashing)

    @precondition(lambda self: self.late)
    @rule(which=ANY)
    def a_late_message_arrives(self, which: int) -> None:
        self.late.pop(which % len(self.late))()

    # --- users ---

    @initialize()
    def two_jobs_run(self) -> None:
        for key, place in (("a", PLACES[0]), ("b", PLACES[2])):
            self.submit(key, "now")
            self.give(place, 1)

    @rule(key=st.sampled_from("abc"), how=NEXT)
    def submit(self, key: str, how: str) -> None:
        ids = [self.new_id()]

        def on_model() -> str:
            # The key of a deleted job is free again, so a repeated message then makes another one.
            ids.append(self.new_id())
            return self.model.submit(key, ids[-1])

        def work(transaction: Transaction) -> str:
            known = jobs.find_by_key(transaction, self.world.project_id, key)
            if known is not None:
                return known.id
            self.world.store(transaction, id=ids[-1], total_steps=STEPS, idempotency_key=key)
            return ids[-1]

        answer = self.send(how, on_model, work)
        if answer is not None:
            self.acknowledged.append(Acknowledged(answer, answer))

    @precondition(lambda self: self.model.jobs)
    @rule(
        which=ANY,
        verb=st.sampled_from(["cancel", "pause", "pause", "resume", "resume", "stop", "delete"]),
        how=NEXT,
    )
    def ask(self, which: int, verb: str, how: str) -> None:
        job = pick(list(self.model.jobs.values()), which)

        def work(transaction: Transaction) -> str:
            if verb == "delete":
                deletion.mark_job(transaction, self.world.project_id, job.id)
                return "deleted"
            asked = getattr(jobs, verb)(transaction, self.world.project_id, job.id)
            return str(asked.status)

        self.send(how, lambda: getattr(self.model, verb)(job), work)

    @precondition(lambda self: any(job.is_waiting_for_reward for job in self.model.jobs.values()))
    @rule()
    def the_reward_service_answers(self) -> None:
        for job in self.model.jobs.values():
            if job.is_waiting_for_reward:
                self.pass_probe(job)

    def pass_probe(self, job: ModelJob) -> None:
        check = reward_pauses.RewardCheck(is_back=True)
        number = len(job.attempts)
        self.send(
            "now",
            lambda: self.model.pass_probe(job),
            lambda it: reward_pauses.note_probe(it, job.id, number, check, base_seconds=5),
        )

    # --- workers ---

    @rule(place=st.sampled_from(PLACES), how=NEXT)
    def claim(self, place: Place, how: str) -> None:
        process = self.processes[place]
        if how == "crash":
            self.crash(lambda it: self.take(it, place, process, "lease-crash"))
        elif how == "later":
            self.late.append(lambda: self.give(place, process))
        else:
            self.give(place, process)

    def take(
        self, transaction: Transaction, place: Place, process: int, lease_id: str
    ) -> fence.Held | None:
        asks = {"node": place[0], "incarnation": f"life-{process}", "boot_id": "boot-1"}
        claim = Claim(slot=place[1], **asks)
        return leases.claim(transaction, claim, leases.Credential(lease_id, "0" * 64), TTL)

    def give(self, place: Place, process: int) -> None:
        """A claim gets a job that is due, and none is passed over that every worker may run."""
        lease_id = f"lease-{next(self.count):04}"
        self.tick()
        expected = outcome_of(lambda: self.model.check_in(place, process))
        found = outcome_of(
            lambda: self.database.transact(lambda it: self.take(it, place, process, lease_id))
        )
        if expected is not None:
            assert found == expected
            return
        assert found is None or isinstance(found, fence.Held), found
        waiting = self.queue()
        if found is not None:
            job = self.model.jobs[found.job.id]
            assert job.status == "queued"
            assert not job.is_waiting_for_reward
            place_in_queue = (found.job.queued_at, job.id)
            waiting = [one for one in waiting if one < place_in_queue and one[1] != job.id]
        assert not waiting, f"jobs that are due were passed over: {waiting}"
        if found is not None:
            started = self.model.start(job, place, process, lease_id, self.elapsed)
            assert (found.attempt.number, found.attempt.start_step) == (
                started.number,
                started.start,
            )

    def queue(self) -> list[tuple[Any, str]]:
        """Jobs that are due for every worker, with their places in the queue."""
        now = self.clock.now
        with self.database.read() as transaction:
            found = []
            for job in self.model.jobs.values():
                if job.status != "queued" or job.is_waiting_for_reward:
                    continue
                row = transaction.get_one(tables.JobRow, job.id)
                wait = timedelta(seconds=LEFT_TO_OTHERS if job.failed else 0)
                if row.not_before + wait <= now:
                    found.append((row.queued_at, job.id))
            return found

    @precondition(lambda self: self.model.attempts)
    @rule(which=ANY, how=NEXT)
    def heartbeat(self, which: int, how: str) -> None:
        attempt = self.attempt(which)

        def work(transaction: Transaction) -> str:
            held = fence.hold(transaction, attempt.lease_id, attempt.number)
            leases.renew(transaction, held, TTL, None)
            return "renewed"

        self.send(how, lambda: self.model.renew(attempt, self.elapsed), work)

    @precondition(lambda self: self.model.attempts)
    @rule(which=ANY, how=NEXT, how_announced=NEXT, how_published=NEXT, is_saved=st.booleans())
    def train(
        self, which: int, how: str, how_announced: str, how_published: str, is_saved: bool
    ) -> None:
        attempt = self.attempt(which)
        attempt.trained += attempt.step < STEPS
        self.send_rows(attempt, how)
        if is_saved:
            self.save(attempt, how_announced, how_published)

    def send_rows(self, attempt: ModelAttempt, how: str) -> None:
        """The rows that the worker does not know to be stored, and sometimes only the last."""
        last = attempt.trained
        if last == 0:
            return
        first = last if how == "later" else 1
        sent = [
            MetricsRow(
                type="metrics",
                seq=seq,
                step=attempt.start + seq,
                at=0.0,
                values={"dar/loss": value_of(attempt.start + seq)},
            )
            for seq in range(first, last + 1)
        ]

        def work(transaction: Transaction) -> Any:
            return rows.add(transaction, fence.lock(transaction, attempt.lease_id), sent)

        self.send(how, lambda: self.model.append(attempt, first, last), work)

    def save(self, attempt: ModelAttempt, how: str, how_published: str) -> None:
        step, last_seq = attempt.step, attempt.trained
        if last_seq == 0:
            return
        content = f"{attempt.lease_id} step {step}".encode()
        file = {"name": "model.safetensors", "bytes": len(content)}
        file["sha256"] = hashlib.sha256(content).hexdigest()
        manifest = self.world.manifest(step, files=[file], last_seq=last_seq)
        text = manifest.model_dump_json(indent=1).encode()
        digest = hashlib.sha256(text).hexdigest()

        def announce(transaction: Transaction) -> str:
            held = fence.hold(transaction, attempt.lease_id, attempt.number)
            made = checkpoints.register(transaction, held.job, held.attempt, manifest, digest)
            attempt.announced[step] = made.id
            return "announced"

        def publish(transaction: Transaction) -> str:
            held = fence.hold(transaction, attempt.lease_id, attempt.number)
            made = checkpoints.find(transaction, held.job.id, attempt.announced[step])
            if made.status == "pending":
                key = self.artifacts.checkpoint(held.job.id, attempt.number, step)
                folder = self.folder / "artifacts" / key
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "model.safetensors").write_bytes(content)
                (folder / MANIFEST_NAME).write_bytes(text)
                checkpoints.publish(transaction, held.job, made, manifest_bytes=len(text))
            return "published"

        answer = self.send(how, lambda: self.model.announce(attempt, step, last_seq), announce)
        if answer == "announced":
            self.send(how_published, lambda: self.model.publish(attempt, step), publish)

    @precondition(lambda self: self.model.attempts)
    @rule(which=ANY, how=NEXT, what=st.sampled_from(ENDS))
    def an_attempt_ends(self, which: int, how: str, what: str) -> None:
        attempt = self.attempt(which)
        number = attempt.number
        if what == "complete":
            on_model, body = self.complete(attempt)
        elif what in FAILURES:
            kind, owner = FAILURES[what]
            on_model = partial(self.model.fail, attempt, what)
            body = Fail(attempt=number, kind=kind, code="broken", message="it broke", owner=owner)
        else:
            on_model = partial(self.model.release, attempt, what)
            body = Release.model_validate({"attempt": number, "reason": what})
        self.end(attempt, how, on_model, body)

    @rule(times=st.integers(1, 4), place=st.sampled_from(PLACES))
    def a_trainer_fails_again_and_again(self, times: int, place: Place) -> None:
        for _ in range(times):
            self.clock.advance(LEFT_TO_OTHERS)
            self.give(place, self.processes[place])
            for attempt in self.model.attempts:
                if attempt.status == "running" and attempt.place == place:
                    on_model = partial(self.model.fail, attempt, "own")
                    kind, owner = FAILURES["own"]
                    body = Fail(
                        attempt=attempt.number, kind=kind, code="broken", message="no", owner=owner
                    )
                    self.end(attempt, "now", on_model, body)

    def complete(self, attempt: ModelAttempt) -> tuple[Callable[[], str], Complete]:
        last_seq, made = attempt.trained, attempt.job.newest_id
        body = Complete(attempt=attempt.number, last_seq=last_seq, checkpoint_id=made)
        return partial(self.model.complete, attempt, last_seq, made), body

    def end(
        self,
        attempt: ModelAttempt,
        how: str,
        on_model: Callable[[], str],
        body: Complete | Fail | Release,
    ) -> None:
        def work(transaction: Transaction) -> str:
            return outcomes.end(transaction, attempt.lease_id, body).status

        self.send(how, on_model, work)

    # --- time ---

    @rule(slices=st.integers(1, 9))
    def time_passes(self, slices: int) -> None:
        for _ in range(slices):
            self.clock.advance(SLICE)
            self.elapsed += SLICE
            self.reconciler.run_once()
            self.compare_leases()

    def compare_leases(self) -> None:
        """No lease ends before its holder had one TTL to renew it, and none lives much longer."""
        with self.database.read() as transaction:
            held = leases.running(transaction)
        for attempt in self.model.attempts:
            if attempt.status != "running":
                continue
            if attempt.lease_id not in held:
                silence = self.elapsed - attempt.seen
                assert silence > TTL.total_seconds(), f"a lease ended after {silence} s"
                self.model.lose(attempt)
            else:
                silence = self.elapsed - max(attempt.seen, self.started_at)
                assert silence <= TTL.total_seconds() + 2 * SLICE, f"it lives after {silence} s"

    @rule(what=st.sampled_from(["service", "clock", *PLACES]))
    def something_is_restarted(self, what: Any) -> None:
        if what == "service":
            self.start_service()
        elif what == "clock":  # set forward
            self.clock.advance(3600)
        else:
            self.processes[what] += 1

    def start_service(self) -> None:
        self.started_at = self.elapsed
        self.reconciler = Reconciler(
            self.database,
            self.artifacts,
            Waker(None),
            Notifier(self.database),
            ttl_seconds=TTL.total_seconds(),
            pause_seconds=1,
            monotonic=lambda: self.elapsed,
        )

    # --- what must be true ---

    @invariant()
    def store_and_model_agree(self) -> None:
        with self.database.read() as transaction:
            for job in self.model.jobs.values():
                row = transaction.get_one(tables.JobRow, job.id)
                found = (row.status, row.attempt, row.deleted_at is not None)
                assert found == (job.status, len(job.attempts), job.is_deleted)
                is_waiting = row.status_detail == "waiting_for_reward"
                assert is_waiting == job.is_waiting_for_reward
            for attempt in self.model.attempts:
                stored = fence.find(transaction, attempt.lease_id)
                assert (stored.status, stored.acked_seq) == (attempt.status, attempt.acked)

    @invariant()
    def the_auditor_finds_nothing(self) -> None:
        self.audit(is_quiet=False)

    def audit(self, *, is_quiet: bool) -> None:
        found = audit(
            self.database,
            self.artifacts,
            self.acknowledged,
            is_quiet=is_quiet,
            is_hashing=is_quiet,
        )
        assert not found.findings, found.findings

    def teardown(self) -> None:
        try:
            self.finish()
        finally:
            self.opened.__exit__(None, None, None)
            shutil.rmtree(self.folder, ignore_errors=True)

    def finish(self) -> None:
        """Every job that was not deleted can end, and then has each step once."""
        self.store_and_model_agree()  # a fault of the history is shown before those that follow
        self.drive_to_the_end()
        while self.late:
            self.late.pop()()
        self.drive_to_the_end()
        self.audit(is_quiet=True)
        for job in self.model.jobs.values():
            if job.status == "succeeded" and not job.is_deleted:
                assert audit_rows(self.database, job.id, "dar/loss", value_of) == []

    def drive_to_the_end(self) -> None:
        for _ in range(ROUNDS):
            left = [
                job
                for job in self.model.jobs.values()
                if job.status not in TERMINAL and not job.is_deleted
            ]
            if not left:
                return
            self.clock.advance(3600)
            for job in left:
                if job.status == "paused":
                    self.send_now(job, "resume")
                if job.is_waiting_for_reward:
                    self.pass_probe(job)
            self.give(("node-9", "0"), 1)
            for attempt in self.model.attempts:
                if attempt.status == "running":
                    self.finish_attempt(attempt)
        raise AssertionError(f"jobs do not end: {left}")

    def finish_attempt(self, attempt: ModelAttempt) -> None:
        if attempt.job.is_cancelling:
            said = Release(attempt=attempt.number, reason="cancelled")
            self.end(attempt, "now", partial(self.model.release, attempt, "cancelled"), said)
            return
        attempt.trained = STEPS - attempt.start
        self.send_rows(attempt, "now")
        self.save(attempt, "now", "now")
        self.end(attempt, "now", *self.complete(attempt))
        assert attempt.job.status == "succeeded"

    def send_now(self, job: ModelJob, verb: str) -> None:
        def work(transaction: Transaction) -> str:
            return str(getattr(jobs, verb)(transaction, self.world.project_id, job.id).status)

        self.send("now", lambda: getattr(self.model, verb)(job), work)

    def attempt(self, which: int) -> ModelAttempt:
        """An attempt: of two in three calls one that runs, if there is one."""
        running = [one for one in self.model.attempts if one.status == "running"]
        return pick(running if which % 3 and running else self.model.attempts, which // 3)


def pick(items: list[Any], which: int) -> Any:
    return items[which % len(items)]


def outcome_of(call: Callable[[], Any]) -> Any:
    """What a call returns, or the class of its error."""
    try:
        return call()
    except DARError as error:
        return type(error)


def explore(
    open_database: Callable[[FakeClock], Any],
    examples: int,
    steps: int,
    *,
    is_random: bool,
    is_shortened: bool = True,
) -> None:
    """Let the machine run.

    Args:
        open_database: Opens a migrated database without any row; a context manager.
        examples: Number of histories.
        steps: Messages and other happenings in each.
        is_random: Whether they are other ones in each call; a failing one is printed.
        is_shortened: Whether a failing one is made as short as possible first, which takes minutes.
    """
    machine = type("Jobs", (Jobs,), {"open_database": staticmethod(open_database)})
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=not is_random,
        database=None,
        print_blob=True,
        phases=[Phase.generate, Phase.shrink] if is_shortened else [Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=chosen)  # type: ignore[no-untyped-call] # of hypothesis
