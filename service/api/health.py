"""Liveness, readiness and Prometheus metrics of the process."""

from fastapi import APIRouter, Depends, Response
from prometheus_client import CONTENT_TYPE_LATEST
from sqlalchemy.exc import SQLAlchemyError

from dar.protocol.health import Health, Ready
from dar.version import __version__
from service import migrate
from service.http import auth
from service.runtime import CurrentRuntime, Runtime

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> Health:
    """Whether the process runs. It checks nothing else, so a database outage causes no restart."""
    return Health(status="ok", version=__version__)


@router.get("/readyz", responses={503: {"model": Ready}})
def readyz(runtime: CurrentRuntime, response: Response) -> Ready:
    """Whether requests can be served. The broker is not needed: without it, workers poll."""
    checks = {
        **_database(runtime),
        "storage": runtime.artifacts.check(),
        "storage_room": _room(runtime),
        "broker": runtime.waker.check(),
    }
    needed = (checks["database"], checks["migrations"], checks["storage"])
    if any(check != "ok" for check in needed):
        response.status_code = 503
        return Ready(status="unavailable", checks=checks)
    is_whole = checks["broker"] in {"ok", "off"} and checks["storage_room"].startswith("ok")
    status = "ok" if is_whole else "degraded"
    return Ready.model_validate({"status": status, "checks": checks})


@router.get("/metrics", dependencies=[Depends(auth.principal)], response_class=Response)
def get_prometheus_metrics(runtime: CurrentRuntime) -> Response:
    """Metrics of this process in the text format of Prometheus. Any API key is accepted."""
    return Response(runtime.telemetry.render(), media_type=CONTENT_TYPE_LATEST)


def _room(runtime: Runtime) -> str:
    """The room of the artifact store: without any, all but uploads works."""
    try:
        room = runtime.artifacts.room()
    except OSError as error:
        return f"unknown: {error.strerror}"
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
