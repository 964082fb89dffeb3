"""The ASGI application: its routes, and the threads that start and stop with it."""

import functools
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.routing import BaseRoute

from dar.rewards.probe.callbacks import ProbeInbox
from dar.settings import Settings
from dar.version import __version__
from service import keys, migrate, storage_owner
from service.api import (
    api_keys,
    attempts,
    checkpoints,
    events,
    file_uploads,
    file_validation,
    files,
    graders,
    health,
    inputs,
    jobs,
    leases,
    logs,
    metrics,
    models,
    query,
    retention,
    reward_callbacks,
    reward_endpoints,
    reward_requests,
    reward_secret,
    reward_stats,
    samples,
    stream,
    uploads,
    workers,
)
from service.artifacts import Artifacts
from service.background.feeds import JobFeeds
from service.background.notifier import Notifier
from service.background.reconciler import Reconciler
from service.background.retention import Retention
from service.background.scrubber import Scrubber
from service.background.waker import Waker
from service.http import auth, errors
from service.http.connections import BodyTimeouts
from service.http.log import RequestMiddleware
from service.openapi import describe
from service.rewards.watch import RewardWatch
from service.runtime import Runtime
from service.secret_box import SecretBox
from service.storage.opening import open_storage
from service.store import jobs as jobs_store
from service.store import leases as leases_store
from service.store import metrics as metrics_store
from service.store import workers as workers_store
from service.store.database import Database
from service.telemetry import MAX_JOBS, Telemetry

ROUTERS = (
    *(
        files,
        file_uploads,
        file_validation,
        jobs,
        attempts,
        events,
        logs,
        metrics,
        samples,
        stream,
        reward_stats,
        checkpoints,
        models,
    ),
    *(
        reward_endpoints,
        graders,
        workers,
        reward_callbacks,
        leases,
        inputs,
        uploads,
        reward_requests,
        retention,
        api_keys,
        reward_secret,
    ),
)


def create_app(settings: Settings, runtime: Runtime | None = None) -> FastAPI:
    """The service as an ASGI application.

    Args:
        settings: Of this installation.
        runtime: Result of `prepare`; by default `prepare` runs when the application starts.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        ready = await run_in_threadpool(prepare, settings) if runtime is None else runtime
        app.state.runtime = ready
        reconciler = Reconciler(
            ready.database,
            ready.artifacts,
            ready.waker,
            ready.notifier,
            ttl_seconds=settings.lease_ttl_seconds,
            pause_seconds=settings.reconcile_seconds,
            after_pass=lambda: ready.key_uses.store(ready.database),
        )
        scrubber = Scrubber(
            ready.database,
            ready.artifacts,
            ready.notifier,
            period_seconds=settings.scrub_seconds,
            bytes_per_second=settings.scrub_bytes_per_second,
        )
        retention_thread = Retention(ready.database, ready.artifacts, settings)
        watch = RewardWatch(ready)
        ready.notifier.at_release.append(ready.feeds.release)
        ready.notifier.start()
        ready.feeds.start()
        ready.waker.start()
        reconciler.start()
        scrubber.start()
        retention_thread.start()
        watch.start()
        try:
            yield
        finally:
            await ready.notifier.close()
            await ready.feeds.close()
            await run_in_threadpool(watch.close)
            await run_in_threadpool(scrubber.close)
            await run_in_threadpool(retention_thread.close)
            await run_in_threadpool(reconciler.close)
            await run_in_threadpool(ready.waker.close)
            ready.database.close()
            ready.artifacts.storage.close()

    def count_response(status: int, seconds: float) -> None:
        ready: Runtime | None = getattr(app.state, "runtime", None)
        if ready is not None:
            ready.telemetry.count_request(status, seconds)

    app = FastAPI(
        title="DAR training service",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        generate_unique_id_function=_name_of,
    )
    errors.install(app)
    app.add_middleware(BodyTimeouts)
    app.add_middleware(RequestMiddleware, count=count_response)
    app.router.routes.extend(_routes())

    @app.get("/openapi.json", include_in_schema=False, dependencies=[Depends(auth.principal)])
    def openapi() -> dict[str, Any]:
        return describe(app)

    return app


def _name_of(route: APIRoute) -> str:
    return route.name


@functools.cache
def _routes() -> Sequence[BaseRoute]:
    """The routes of the API. They depend on no setting, so that all applications share them.

    FastAPI examines a route at its first request, and with it all others of its router.
    """
    api = APIRouter(generate_unique_id_function=_name_of)
    api.include_router(health.router)
    for module in ROUTERS:
        api.include_router(module.router, dependencies=[Depends(query.refuse_unusable)])
    return api.routes


def prepare(settings: Settings) -> Runtime:
    """Upgrade the schema, make missing folders and keys, and assemble the runtime.

    Raises:
        ServiceUnavailableError: The database does not respond.
        ConfigurationError: A setting cannot be used.
    """
    database = Database(settings.sqlalchemy_url)
    migrate.upgrade(settings, database)
    artifacts = Artifacts(open_storage(settings), settings.min_free_bytes)
    storage_owner.claim(artifacts.storage, database)
    broker = settings.broker_url

    def count_jobs() -> Mapping[str, int]:
        with database.read() as transaction:
            return jobs_store.count_by_status(transaction)

    def running_values() -> Mapping[str, Mapping[str, float | None]]:
        with database.read() as transaction:
            return metrics_store.newest_of_running(transaction, MAX_JOBS)

    def count_workers() -> tuple[workers_store.Fleet, Mapping[str, int]]:
        with database.read() as transaction:
            failures = workers_store.failures_by_owner(transaction)
            return workers_store.fleet(transaction), failures

    def queue() -> leases_store.QueueState:
        with database.read() as transaction:
            return leases_store.queue_state(transaction)

    feeds = JobFeeds(database, stream.render)
    telemetry = Telemetry(
        count_jobs, running_values, count_workers, artifacts.room, queue, lambda: feeds.readers
    )
    return Runtime(
        settings=settings,
        database=database,
        artifacts=artifacts,
        waker=Waker(None if broker is None else broker.get_secret_value()),
        notifier=Notifier(database),
        feeds=feeds,
        telemetry=telemetry,
        reward_secrets=keys.checked_reward_secrets(keys.configure(settings, database)),
        secrets=SecretBox(keys.secret_keys(settings, database)),
        probe_inbox=ProbeInbox(settings.callback_url),
    )
