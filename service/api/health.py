"""Liveness, readiness and Prometheus metrics of the process."""

from collections.abc import Mapping

from fastapi import APIRouter, Depends, Response
from prometheus_client import CONTENT_TYPE_LATEST
from sqlalchemy.exc import SQLAlchemyError

from dar.protocol.health import Health, Ready
from dar.version import __version__
from service import migrate
from service.background.bounded_checks import Check
from service.http import auth
from service.runtime import CurrentRuntime, Runtime
from service.store import workers

router = APIRouter(tags=["health"])
SILENT = {
    "database": "does not answer",
    "migrations": "unknown",
    "storage": "does not answer",
    "storage_room": "unknown",
    "broker": "does not answer",
    "workers": "unknown",
}
"""The checks of what has not answered in time."""


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz")
async def healthz() -> Health:
    """Whether the process runs. It checks nothing else, so a database outage causes no restart."""
    return Health(status="ok", version=__version__)


@router.head("/readyz", include_in_schema=False)
@router.get("/readyz", responses={503: {"model": Ready}})
async def readyz(runtime: CurrentRuntime, response: Response) -> Ready:
    """Whether requests can be served. The broker is not needed: without it, workers poll."""
    checks = {**SILENT, **await runtime.readiness.run(_checks(runtime))}
    needed = (checks["database"], checks["migrations"], checks["storage"])
    if any(check != "ok" for check in needed):
        response.status_code = 503
        return Ready(status="unavailable", checks=checks)
    is_roomy = checks["storage_room"].startswith("ok")
    is_whole = checks["broker"] in {"ok", "off"} and checks["workers"] == "ok" and is_roomy
    status = "ok" if is_whole else "degraded"
    return Ready.model_validate({"status": status, "checks": checks})


@router.get("/metrics", dependencies=[Depends(auth.principal)], response_class=Response)
def get_prometheus_metrics(runtime: CurrentRuntime) -> Response:
    """Metrics of this process in the text format of Prometheus. Any API key is accepted."""
    return Response(runtime.telemetry.render(), media_type=CONTENT_TYPE_LATEST)


def _checks(runtime: Runtime) -> Mapping[str, Check]:
    return {
        "database": lambda: _database(runtime),
        "storage": lambda: {
            "storage": runtime.artifacts.storage.check(),
            "storage_room": _room(runtime),
        },
        "broker": lambda: {"broker": runtime.waker.check()},
        "workers": lambda: {"workers": _workers(runtime)},
    }


def _room(runtime: Runtime) -> str:
    """The room of the artifact store: without any, all but uploads works."""
    try:
        room = runtime.artifacts.room()
    except OSError as error:
        return f"unknown: {error.strerror}"
    if room is None:
        return "ok: a bucket has no size"
    said = f"{room.free:,} of {room.total:,} bytes are free"
    if room.is_full:
        return f"full: {said}, and uploads must leave {room.reserved:,}; make room"
    return f"ok: {said}"


def _database(runtime: Runtime) -> dict[str, str]:
    try:
        found = migrate.current(runtime.database)
    except SQLAlchemyError:
        return {"database": "does not answer", "migrations": "unknown"}
    head = migrate.head()
    return {"database": "ok", "migrations": "ok" if found == head else f"at {found}, needs {head}"}


def _workers(runtime: Runtime) -> str:
    """``ok``, or how many workers can run no job, and why. Their names need a key."""
    try:
        with runtime.database.read() as transaction:
            fleet = workers.fleet(transaction)
    except SQLAlchemyError:
        return "unknown"
    if not fleet.failing:
        return "ok"
    codes = ", ".join(sorted({code for _, _, code in fleet.failing}))
    count = sum(fleet.states.values()) - fleet.states.get("gone", 0)
    return f"{len(fleet.failing)} of {count} can run no job: {codes}; GET /v1/workers says more"
