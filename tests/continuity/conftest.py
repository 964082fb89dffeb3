"""Files of an earlier version (see stored/README.md), and how strictly results are compared."""

import json
import logging
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
import structlog
import torch
import uvicorn

from dar.settings import Settings, environment
from service.app import create_app

STORED = Path(environment().get("CONTINUITY_STORED") or Path(__file__).parent / "stored")
IS_EXACT = bool(environment().get("CONTINUITY_EXACT"))
"""Whether weights must be equal to the last bit, as they are on the machine that made the files."""


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    """The service logs every request."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


@pytest.fixture(scope="session")
def stored() -> Path:
    return STORED


@pytest.fixture(scope="session")
def facts(stored: Path) -> dict[str, Any]:
    """What the API showed, and what its clients knew, when the database was stored."""
    found: dict[str, Any] = json.loads((stored / "service" / "facts.json").read_text())
    return found


@pytest.fixture(scope="session")
def same_numbers() -> Callable[[dict[str, float]], Any]:
    """Expected metrics: exact, or within the rounding of another machine."""
    return lambda values: values if IS_EXACT else pytest.approx(values, rel=1e-4, abs=1e-5)


@pytest.fixture(scope="session")
def differing() -> Callable[..., list[str]]:
    """Names of the tensors that differ."""

    def find(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
        assert one.keys() == other.keys()
        tolerance = 0.0 if IS_EXACT else 1e-5
        return [name for name in one if not torch.allclose(one[name], other[name], 0, tolerance)]

    return find


@dataclass
class Stored:
    """A service on a copy of the stored database."""

    home: Path
    url: str
    secrets: dict[str, str]
    opened: list[httpx2.Client] = field(default_factory=list)

    def client(self, key: str, path: str = "", **headers: str) -> httpx2.Client:
        headers["authorization"] = f"Bearer {self.secrets.get(key, key)}"
        made = httpx2.Client(base_url=self.url + path, headers=headers, trust_env=False, timeout=30)
        self.opened.append(made)
        return made

    def lease(self, held: dict[str, Any]) -> httpx2.Client:
        return self.client(held["token"], f"/v1/worker/leases/{held['lease_id']}")

    def claim(self) -> dict[str, Any]:
        slot = {"node": "node-2", "slot": "0", "incarnation": "life-1", "boot_id": "boot-2"}
        answer = self.client("worker_key").post("/v1/worker/leases/claim", json=slot)
        assert answer.status_code == 200, answer.text
        lease: dict[str, Any] = answer.json()
        return lease

    def row(self, statement: str, *values: str) -> Any:
        with sqlite3.connect(self.home / "dar.db") as connection:
            return connection.execute(statement, values).fetchone()


@pytest.fixture
def home(stored: Path, tmp_path: Path) -> Path:
    """A copy of the installation's folder, with the database of its dump."""
    home = tmp_path / "home"
    shutil.copytree(stored / "service", home)
    connection = sqlite3.connect(home / "dar.db")
    connection.executescript((home / "dar.sql").read_text())
    connection.close()
    return home


@pytest.fixture
def service(home: Path, facts: dict[str, Any]) -> Iterator[Stored]:
    settings = Settings(home=home, reconcile_seconds=3600, **facts["secrets"])
    app = create_app(settings)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive(), "the service did not start"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    made = Stored(home, f"http://127.0.0.1:{port}", facts["secrets"])
    yield made
    for client in made.opened:
        client.close()
    app.state.runtime.notifier.release()
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()
