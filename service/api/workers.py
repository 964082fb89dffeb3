"""Workers of the installation: what they are, what they do, and orders of an operator."""

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends

from dar.protocol.base import Page
from dar.protocol.workers import Worker, WorkerOrder
from service.api.paging import seconds, whole
from service.http import errors
from service.http.auth import Administrator, Reader
from service.http.bodies import body_of, schema_of
from service.runtime import CurrentRuntime, Runtime
from service.store import fence, outcomes, workers
from service.store.database import Transaction
from service.store.workers import Duty, WorkerView

router = APIRouter(prefix="/v1/workers", tags=["workers"])
OrderBody = Annotated[WorkerOrder, Depends(body_of(WorkerOrder))]
UNKNOWN = errors.may_answer(404)


@router.get("")
def list_workers(runtime: CurrentRuntime, user: Reader) -> Page[Worker]:
    """All workers that were seen in the last seven days, by node and slot."""
    with runtime.database.read() as transaction:
        found = workers.list_all(transaction)
    return _page(found, user.project_id)


@router.post("/drain", openapi_extra=schema_of(WorkerOrder), responses=UNKNOWN)
def drain_workers(runtime: CurrentRuntime, user: Administrator, body: OrderBody) -> Page[Worker]:
    """Let workers write a checkpoint, give their jobs back and claim no more, until admitted."""
    return _ordered(runtime, user.project_id, "drain", body)


@router.post("/ban", openapi_extra=schema_of(WorkerOrder), responses=UNKNOWN)
def ban_workers(runtime: CurrentRuntime, user: Administrator, body: OrderBody) -> Page[Worker]:
    """Take jobs from workers at once, and give them no more, until admitted.

    The jobs continue on other workers from their newest checkpoints. Nothing that a banned worker
    reports about their state is stored.
    """
    return _ordered(runtime, user.project_id, "ban", body)


@router.post("/admit", openapi_extra=schema_of(WorkerOrder), responses=UNKNOWN)
def admit_workers(runtime: CurrentRuntime, user: Administrator, body: OrderBody) -> Page[Worker]:
    """End a drain or a ban, and the wait after faults: the workers may claim again."""
    return _ordered(runtime, user.project_id, "work", body)


def _ordered(runtime: Runtime, project_id: str, duty: Duty, body: WorkerOrder) -> Page[Worker]:
    def work(transaction: Transaction) -> list[WorkerView]:
        rows = workers.order(transaction, duty, body.node, body.slot, body.reason)
        for lease_id in workers.leases_of(transaction, rows):
            job_id = fence.find(transaction, lease_id).job_id
            if duty == "ban":
                _take_back(transaction, lease_id, body)
            transaction.after_commit(partial(runtime.notifier.notify, job_id))
        if duty != "drain":
            transaction.after_commit(runtime.waker.wake)
        names = {(row.node, row.slot) for row in rows}
        listed = workers.list_all(transaction)
        return [view for view in listed if (view.row.node, view.row.slot) in names]

    return _page(runtime.database.transact(work), project_id)


def _take_back(transaction: Transaction, lease_id: str, body: WorkerOrder) -> None:
    held = fence.lock(transaction, lease_id)
    why = f"the worker on {body.node} was banned"
    if body.reason is not None:
        why = f"{why}: {body.reason}"
    if held.attempt.status == "running":
        outcomes.take_back(transaction, held, why)


def _page(found: list[WorkerView], project_id: str) -> Page[Worker]:
    shown = [show(view, project_id) for view in found]
    return whole(shown, lambda worker: f"{worker.node}/{worker.slot}")


def show(view: WorkerView, project_id: str) -> Worker:
    row, report = view.row, view.row.report or {}
    models = report.get("models") or {}
    return Worker.model_validate(
        {
            "object": "worker",
            "node": row.node,
            "slot": row.slot,
            "version": report.get("version"),
            "devices": report.get("devices"),
            "disk_free": report.get("disk_free"),
            "disk_total": report.get("disk_total"),
            "memory_free": report.get("memory_free"),
            "models": models.get("names"),
            "model_cache_bytes": models.get("cache_bytes"),
            "model_cache_limit": models.get("cache_limit"),
            "state": view.state,
            "reason": view.reason,
            "job": view.job_id if view.project_id == project_id else None,
            "faults": row.faults,
            "retry_at": None if row.retry_at is None else seconds(row.retry_at),
            "started_at": seconds(row.started_at),
            "seen_at": seconds(row.seen_at),
        }
    )
