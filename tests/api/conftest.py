"""A live service: a real uvicorn on a real socket, on a migrated SQLite of its own."""

import asyncio
import logging
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import structlog
import uvicorn

from dar.protocol.base import ErrorBody
from dar.settings import Settings
from fakes.live_service import Judge, Live
from fakes.postgres import Postgres
from fakes.reward_server import RewardServer
from service import migrate
from service.app import create_app
from service.http.connections import ConnectionConfig
from service.store.database import Database

LOOPBACK = {"egress_allow_cidrs": ("127.0.0.0/8",), "egress_allow_http": ("127.0.0.1",)}
"""Reward services of tests are on this machine."""


class PromptServer(uvicorn.Server):
    """A server that stops at once; uvicorn notices a stop within a tenth of a second."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        await super().startup(sockets)

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self._stop.wait()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    """Logs of provoked failures are no news, and structlog's own default prints every local
    variable.
    """
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server of its own."""
    folder = Path(tempfile.mkdtemp(prefix="dar-pg-"))
    folder.chmod(0o755)  # PostgreSQL runs as a user of its own
    server = Postgres(folder)
    try:
        server.wait()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database to copy."""
    settings = Settings(home=tmp_path_factory.mktemp("migrated"))
    database = Database(settings.sqlalchemy_url)
    migrate.upgrade(settings, database)
    database.close()
    return settings.home / "dar.db"


@pytest.fixture
def home(tmp_path: Path, migrated: Path) -> Path:
    home = tmp_path / "home"
    model = home / "models" / "base"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    shutil.copy(migrated, home / "dar.db")
    return home


@pytest.fixture
def serve(home: Path) -> Iterator[Callable[..., Live]]:
    """Starts services; the settings are those of a test, the home is its own."""
    stops: list[Callable[[], None]] = []

    def start(**values: Any) -> Live:
        most = values.pop("max_connections", 200)
        settings = Settings(home=home, **{"reconcile_seconds": 60, **LOOPBACK, **values})
        app = create_app(settings)
        config = ConnectionConfig(
            app,
            max_connections=most,
            port=0,
            log_level="error",
            log_config=None,
            timeout_graceful_shutdown=2,
        )
        server = PromptServer(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        deadline = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive(), "the service did not start"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        live = Live(app, settings, f"http://127.0.0.1:{port}", httpx2.Client(verify=False))
        live.http.close()
        live.http = live.client(live.key("api_key"))

        def stop() -> None:
            for client in live.opened:
                client.close()
            app.state.runtime.notifier.release()
            server.stop()
            thread.join(20)
            assert not thread.is_alive()

        stops.append(stop)
        return live

    yield start
    for stop in stops:
        stop()


@pytest.fixture
def live(serve: Callable[..., Live]) -> Live:
    return serve()


@pytest.fixture
def error_of() -> Callable[[httpx2.Response], dict[str, Any]]:
    """The error of an answer, after checking that its shape is the one of every failure."""

    def check(answer: httpx2.Response) -> dict[str, Any]:
        assert answer.status_code >= 400, answer.text
        body = answer.json()
        assert list(body) == ["error"]
        error: dict[str, Any] = body["error"]
        ErrorBody.model_validate(body)
        assert set(error) == {"message", "type", "param", "code", "errors", "request_id"}
        assert error["request_id"] == answer.headers["x-request-id"]
        assert error["message"]
        for problem in error["errors"]:
            assert (
                {"param", "message", "code"} <= set(problem) <= {"param", "message", "code", "row"}
            )
        should_retry = answer.headers.get("x-should-retry")
        assert (should_retry == "false") is (answer.status_code == 409)
        return error

    return check


@pytest.fixture
def judge() -> Iterator[Judge]:
    made = Judge()
    with RewardServer(made) as server:
        made.url = server.url
        yield made
