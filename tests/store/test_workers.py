"""Workers: one of each name, none that cannot run a job, and a pause after faults of their own."""

from typing import Any

import pytest

from dar.errors import ConflictError
from dar.protocol.worker import (
    Complete,
    Fail,
    FailureOwner,
    ModelInventory,
    Release,
    WorkerReport,
)
from fakes.world import World
from service.store import fence, leases, outcomes, tables, workers


def end(world: World, held: fence.Held, said: Complete | Fail | Release) -> None:
    with world.database.write() as transaction:
        outcomes.end(transaction, held.attempt.lease_id, said)


def fail(world: World, held: fence.Held, owner: FailureOwner = "worker") -> None:
    said = {"kind": "transient", "code": "disk_full", "message": "the worker's disk is full"}
    end(world, held, Fail.model_validate({"attempt": held.attempt.number, "owner": owner, **said}))


def worker(world: World, node: str = "node-1", slot: str = "0") -> tables.WorkerRow:
    with world.database.read() as transaction:
        return transaction.get_one(tables.WorkerRow, (node, slot))


def heartbeat(world: World, held: fence.Held) -> None:
    with world.database.write() as transaction:
        now = fence.hold(transaction, held.attempt.lease_id, held.attempt.number)
        leases.renew(transaction, now, leases.timedelta(seconds=600), None)


# --- one of each name -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"boot_id": "boot-2"}),
        ({"report": "one"}, {"report": "two", "boot_id": "boot-2"}),
        ({"report": "one"}, {"report": "two"}),  # two containers of one kernel
        ({"report": "one"}, {"report": "two", "boot_id": "boot-2", "slot": "1"}),
    ],
    ids=["earlier version", "hosts", "containers", "slots"],
)
def test_a_second_machine_of_a_name_is_refused_and_ends_no_lease(
    world: World, first: dict[str, Any], second: dict[str, Any]
) -> None:
    def made(values: dict[str, Any], incarnation: str, slot: str = "0") -> dict[str, Any]:
        name = values.get("report")
        report = None if name is None else world.report(name)
        return {"slot": slot, **values, "incarnation": incarnation, "report": report}

    world.submit()
    held = world.claim(**made(first, "life-1"))
    for _ in range(3):
        world.clock.advance(10)
        with pytest.raises(ConflictError, match="another worker with the name node 'node-1'") as no:
            world.claim(**made(second, "life-2"))
        assert no.value.error_code == "worker_name_taken"
        heartbeat(world, held)
    world.clock.advance(300)  # the first one is silent, but holds a lease
    with pytest.raises(ConflictError):
        world.claim(**made(second, "life-2"))
    assert world.attempt(held).status == "running"
    fail(world, held, "service")
    world.clock.advance(3)
    assert world.claim(**made(second, "life-2")).attempt.number == 2
    if "slot" not in second:
        with pytest.raises(ConflictError, match="was started after this one"):
            world.claim(**made(first, "life-1"))


def test_a_worker_that_left_frees_its_name_at_once(world: World) -> None:
    world.claim(report=world.report("one"))
    with pytest.raises(ConflictError):
        world.claim(report=world.report("two"), incarnation="life-2")
    world.claim(report=world.report("one", is_leaving=True), wants_job=False)
    world.claim(report=world.report("two"), incarnation="life-2")
    assert worker(world).machine == "two"


def test_a_reboot_and_a_restart_keep_the_name(world: World) -> None:
    for number in range(1, 5):
        world.submit()
        reported = world.report()
        held = world.claim(report=reported, incarnation=f"life-{number}", boot_id=f"boot-{number}")
        assert held.job.id == "ftjob-0001", "the lease of the predecessor was ended"


def test_two_copies_of_one_machine_do_not_take_turns(world: World) -> None:
    job_id = world.submit()
    world.claim(report=world.report(), incarnation="copy-1", boot_id="boot-1")
    held = world.claim(report=world.report(), incarnation="copy-2", boot_id="boot-2")
    for _ in range(3):
        with pytest.raises(ConflictError):
            world.claim(report=world.report(), incarnation="copy-1", boot_id="boot-1")
    assert world.attempt(held).status == "running"
    assert world.job(job_id).attempt == 2


# --- none that cannot run a job -------------------------------------------------------------------


@pytest.mark.parametrize("is_known", [True, False], ids=["reports", "earlier version"])
def test_one_sick_worker_harms_no_job(world: World, is_known: bool) -> None:
    jobs = [world.submit() for _ in range(6)]
    tries = 0
    for _ in range(40):
        world.clock.advance(5)
        sick = world.claim(node="sick", report=world.report("sick") if is_known else None)
        if sick is not None:
            tries += 1
            fail(world, sick)
        well = world.claim(node="well", report=world.report("well") if is_known else None)
        if well is not None:
            final = world.publish(well, 10)
            said = Complete(attempt=well.attempt.number, last_seq=0, checkpoint_id=final.id)
            end(world, well, said)
    assert [world.job(job_id).status for job_id in jobs] == ["succeeded"] * 6
    assert tries <= 4, "it waits longer after each fault"
    assert (worker(world, "sick").faults, worker(world, "well").faults) == (tries, 0)


def test_a_worker_backs_off_longer_after_each_fault_of_its_own_and_forgets_them(
    world: World,
) -> None:
    world.submit()
    pauses = []
    for _ in range(9):
        world.clock.advance(700)
        fail(world, world.claim())
        row = worker(world)
        assert row.fault == {"code": "disk_full", "message": "the worker's disk is full"}
        pauses.append((row.retry_at - world.clock.now).total_seconds())
        world.clock.advance(pauses[-1] - 1)
        assert world.claim() is None
    assert pauses == [10, 20, 40, 80, 160, 320, 600, 600, 600]
    world.clock.advance(700)
    held = world.claim()
    end(world, held, Release(attempt=held.attempt.number, reason="drained"))
    assert (worker(world).faults, worker(world).retry_at) == (0, None)


def test_failures_of_deleted_jobs_are_not_counted(world: World) -> None:
    kept, gone = world.running(), world.running()
    for held in (kept, gone):
        fail(world, held, "service")
    with world.database.write() as transaction:
        assert workers.failures_by_owner(transaction) == {"service": 2}
        job = transaction.get_one(tables.JobRow, gone.job.id)
        job.deleted_at = transaction.now
        transaction.flush()
        assert workers.failures_by_owner(transaction) == {"service": 1}


def test_a_worker_with_a_fault_gets_no_job_before_its_check_passes(world: World) -> None:
    job_id = world.submit()
    fault = {"code": "disk_full", "message": "200 MB are free"}
    assert world.claim(report=world.report(fault=fault), wants_job=False) is None
    assert world.claim(report=world.report(fault=fault)) is None
    assert world.claim(report=world.report(), wants_job=False) is None
    assert world.claim(report=world.report()).job.id == job_id


def test_losses_on_a_node_that_fails_its_check_are_not_the_jobs(world: World) -> None:
    fault = {"code": "device_failed", "message": "no GPU"}
    world.claim("1", report=world.report(fault=fault), wants_job=False)
    world.submit()
    for number in range(9):
        held = world.claim(report=world.report(), incarnation=f"life-{number}")
        assert held.attempt.number == number + 1


def test_a_slot_leaves_jobs_to_larger_slots_that_it_cannot_run(world: World) -> None:
    spec = {"method": {"dar": {"resources": {"processes": 2}}}}
    large = world.submit(spec=spec)
    small = world.submit()
    world.claim(node="b", report=world.report("b", devices=["0", "1"]), wants_job=False)
    one = world.report("a", devices=["0"])
    assert world.claim(node="a", report=one).job.id == small
    assert world.claim(node="a", slot="1", report=one) is None
    world.clock.advance(100)  # the larger slot is gone: the attempt fails with both numbers
    assert world.claim(node="a", slot="1", report=one).job.id == large


def test_a_worker_leaves_a_job_whose_checkpoints_do_not_fit_on_its_disk(world: World) -> None:
    job_id = world.submit()
    held = world.claim(node="a", report=world.report("a", disk_free=10**9))
    world.publish(held, 5)
    with world.database.write() as transaction:
        made = transaction.query(tables.CheckpointRow).one()
        made.bytes = 10**9
    end(world, held, Release(attempt=1, reason="drained"))
    assert world.claim(node="b", report=world.report("b", disk_free=2 * 10**9)) is None
    said = world.job(job_id).status_message
    assert said == "waiting for a worker with 3,000,000,000 bytes of free disk for its checkpoints"
    assert world.claim(node="c", report=world.report("c", disk_free=4 * 10**9)).job.id == job_id


def test_a_job_waits_for_a_worker_that_is_busy_and_not_for_memory(world: World) -> None:
    world.submit()
    large = world.report("gpu", devices=["0"], memory_free=100)
    assert world.claim(node="gpu", report=large) is not None
    job_id = world.submit(memory_bytes=400, loading_bytes=80)

    def said(**values: Any) -> str | None:
        assert world.claim(node="cpu", report=world.report("cpu", **values)) is None
        return world.job(job_id).status_message

    said(memory_free=50)
    assert not (world.job(job_id).status_message or "").startswith(leases.NO_ROOM)
    world.clock.advance(100)  # that worker is gone
    least = f"{leases.NO_ROOM}400 bytes of free memory, the least that its trainer needs there"
    assert said(memory_free=50) == least
    small = world.report("gpu-2", devices=["0"], memory_free=70)
    assert world.claim(node="gpu-2", report=small) is None
    both = world.job(job_id).status_message
    assert both == least.replace("400", "80"), "what is the least that helps"
    assert said(memory_free=50) == both, "workers of two kinds do not overwrite each other"
    world.claim(
        node="gpu-3", report=world.report("gpu-3", devices=["0"], memory_free=80), wants_job=False
    )
    assert said(memory_free=50) == "waiting for a worker"


def test_a_job_that_failed_on_a_node_goes_to_another_first(world: World) -> None:
    world.submit()  # what has failed at the other node is another job
    bad = Fail(attempt=1, kind="user", code="bad_row", message="a row is bad", owner="user")
    end(world, world.claim(node="b", report=world.report("b")), bad)
    job_id = world.submit()
    fail(world, world.claim(node="a", report=world.report("a")), "service")
    world.claim(node="b", report=world.report("b"), wants_job=False)
    world.clock.advance(2)
    assert world.claim(node="a", report=world.report("a")) is None
    held = world.claim(node="b", report=world.report("b"))
    assert held.job.id == job_id
    fail(world, held, "service")
    world.clock.advance(4)
    assert world.claim(node="a", report=world.report("a")).attempt.number == 3, (
        "nobody else is left"
    )


@pytest.mark.parametrize("why", ["gone", "busy", "patience", "not of the node", "lost once"])
def test_a_job_that_failed_on_a_node_does_not_wait_for_others_in_vain(
    world: World, why: str
) -> None:
    world.submit()
    held = world.claim(node="a")
    world.claim(node="b", report=world.report("b"), wants_job=False)
    if why == "lost once":
        assert world.claim(node="a", incarnation="life-2").attempt.number == 2
        assert world.claim(node="a", incarnation="life-3") is None, "it was lost there twice"
        return
    fail(world, held, "storage" if why == "not of the node" else "service")
    world.clock.advance({"gone": 60, "patience": 30}.get(why, 2))
    if why == "busy":
        world.submit()
        assert world.claim(node="c", report=world.report("c")) is not None
        assert world.claim(node="b", report=world.report("b")) is not None
        return
    if why == "patience":
        world.claim(node="b", report=world.report("b"), wants_job=False)
    assert world.claim(node="a").attempt.number == 2


def test_a_claim_whose_reply_was_lost_is_no_loss(world: World) -> None:
    """The same process claims again, and has sent no heartbeat."""
    job_id = world.submit()
    for number in range(1, 8):
        assert world.claim().attempt.number == number
    assert world.job(job_id).failures is None
    held = world.claim()
    heartbeat(world, held)
    world.claim()
    assert world.attempt(held).status == "lost"


def test_missing_rewards_are_the_reward_services(world: World) -> None:
    job_id = world.submit()
    held = world.claim()
    end(world, held, Release(attempt=1, reason="waiting_for_reward", message="refused"))
    attempt = world.attempt(held)
    assert (attempt.owner, attempt.failure["message"]) == ("reward", "refused")
    assert world.job(job_id).failures == {"reward": 1}


def test_workers_that_are_gone_for_a_week_are_forgotten(world: World) -> None:
    for slot in ("a", "b"):
        world.claim(slot)
    with world.database.write() as transaction:
        workers.order(transaction, "drain", "node-1", "b", None)
    world.clock.advance(8 * 86_400)
    with world.database.write() as transaction:
        workers.forget(transaction)
        assert [view.row.slot for view in workers.list_all(transaction)] == ["b"]


# --- models ---------------------------------------------------------------------------------------


def has(world: World, *names: str, machine: str = "machine-1") -> WorkerReport:
    models = {"names": list(names), "cache_bytes": 1, "cache_limit": 2}
    return world.report(machine, models=models)


def source(kind: str, name: str, checkpoint_id: str | None = None) -> dict[str, Any]:
    return {"kind": kind, "name": name, "checkpoint_id": checkpoint_id, "adapter_ids": []}


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (source("folder", "tiny"), "tiny"),
        (source("hub", "team/policy"), "team/policy"),
        (source("folder", "", "ckpt-1"), "ckpt-1"),
    ],
    ids=["folder", "hub", "checkpoint"],
)
def test_a_job_goes_to_an_idle_worker_that_has_its_model_and_soon_to_any(
    world: World, model: dict[str, Any], name: str
) -> None:
    def lacks(node: str = "node-1") -> fence.Held | None:
        return world.claim(node=node, report=has(world, "another"))

    def holder(**values: Any) -> fence.Held | None:
        report = has(world, name, "another", machine="machine-2")
        return world.claim(node="node-2", report=report, **values)

    assert holder() is None
    job_id = world.submit(model_source=model)
    assert lacks() is None, "it is left to the idle worker that has the model"
    assert world.claim(node="old") is not None, "a worker of an earlier version takes any job"
    job_id = world.submit(model_source=model)
    held = holder()
    assert held is not None
    assert held.job.id == job_id
    busy = world.submit(model_source=model)
    held = lacks()
    assert held is not None, "nobody idle has the model"
    assert held.job.id == busy
    assert world.claim(node="node-4", report=has(world, name, machine="machine-4")) is None
    unknown = world.submit(model_source=source("folder", "unknown"))
    held = lacks("node-5")
    assert held is not None, "an idle worker has a model, but not that of this job"
    assert held.job.id == unknown
    waiting = world.submit(model_source=model)
    assert lacks("node-3") is None
    world.clock.advance(21)
    held = lacks("node-3")
    assert held is not None, "the preference is short"
    assert held.job.id == waiting


@pytest.mark.parametrize(
    ("values", "is_left"),
    [
        ({"memory_free": 5 * 10**9}, False),
        ({"memory_free": 7 * 10**9}, True),
        ({"memory_free": 5 * 10**9, "devices": ["0", "1"]}, True),
        ({"devices": ["0"]}, False),
        ({"disk_free": 10**10}, False),
        ({"disk_free": 4 * 10**10}, True),
    ],
)
def test_a_job_is_left_to_a_holder_of_its_model_only_if_that_could_run_it(
    world: World, values: dict[str, Any], is_left: bool
) -> None:
    spec = world.limited()
    spec["method"]["dar"]["resources"] = {"processes": 2}
    model = source("folder", "tiny")
    needs = {"memory_bytes": 6 * 10**9, "loading_bytes": 10**9, "spec": spec}
    world.submit(model_source=model, **needs)
    held = world.claim(node="a", report=world.report("a"))
    assert held is not None
    world.publish(held, 5)
    with world.database.write() as transaction:
        transaction.query(tables.CheckpointRow).one().bytes = 10**10
    end(world, held, Release(attempt=1, reason="drained"))
    models = {"names": ["tiny"], "cache_bytes": 1, "cache_limit": 2}
    report = world.report("machine-2", models=models, **values)
    assert world.claim(node="node-2", report=report, wants_job=False) is None
    taken = world.claim(node="node-1", report=has(world, "another"))
    assert (taken is None) == is_left


def test_a_heartbeat_renews_the_list_of_models_and_a_worker_that_is_gone_has_none(
    world: World,
) -> None:
    def names(node: str) -> set[str]:
        with world.database.read() as transaction:
            query = transaction.query(tables.WorkerModelRow).filter_by(node=node)
            return {row.name for row in query.all()}

    world.submit()
    held = world.claim(node="node-2", report=has(world, "a"))
    assert held is not None
    assert names("node-2") == {"a"}
    news = ModelInventory(names=["a", "b"], cache_bytes=5, cache_limit=9)
    with world.database.write() as transaction:
        now = fence.hold(transaction, held.attempt.lease_id, held.attempt.number)
        leases.renew(transaction, now, leases.timedelta(seconds=600), None, news)
    assert names("node-2") == {"a", "b"}
    row = worker(world, "node-2")
    assert row.report is not None
    assert row.report["models"]["cache_bytes"] == 5
    heartbeat(world, held)
    assert names("node-2") == {"a", "b"}, "a heartbeat without a list changes nothing"
    world.clock.advance(8 * 86_400)
    with world.database.write() as transaction:
        workers.forget(transaction)
    assert names("node-2") == set()


def test_the_first_commit_of_a_hub_model_is_that_of_all_attempts(world: World) -> None:
    model = source("hub", "team/policy")
    held = world.running(model_source=model)
    with world.database.write() as transaction:
        now = fence.hold(transaction, held.attempt.lease_id, 1)
        leases.pin_revisions(transaction, now, {"team/policy": "b" * 40})
    with world.database.write() as transaction:
        now = fence.hold(transaction, held.attempt.lease_id, 1)
        given = {"team/policy": "c" * 40, "team/judge": "d" * 40}
        pinned = leases.pin_revisions(transaction, now, given)
    assert pinned == {"team/policy": "b" * 40, "team/judge": "d" * 40}
    assert world.job(held.job.id).model_source == {**model, "revisions": pinned}
