"""Two services of this version start at once on the database of an earlier one."""

import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from dar.settings import environment


def ready(log: Path, process: subprocess.Popen[bytes]) -> str:
    """Wait for a service; gives its URL."""
    deadline = time.monotonic() + 60
    while True:
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        for line in lines:
            if line["event"] == "ready":
                return str(line["url"])
        assert process.poll() is None, lines
        assert time.monotonic() < deadline, lines
        time.sleep(0.05)


@pytest.mark.slow  # two processes
def test_replicas_that_start_together_migrate_once_and_running_jobs_go_on(
    home: Path, facts: dict[str, Any], free_port: Callable[[], int], tmp_path: Path
) -> None:
    variables = environment(home=home, reconcile_seconds=0.2, **facts["secrets"])
    logs = [tmp_path / "one.log", tmp_path / "two.log"]
    started = []
    for log in logs:
        command = [sys.executable, "-m", "service", "serve", "--port", str(free_port())]
        with log.open("wb") as output:
            started.append(subprocess.Popen(command, env=variables, stderr=output))
    try:
        urls = [ready(log, process) for log, process in zip(logs, started, strict=True)]
        time.sleep(1)  # several passes of both reconcilers
        held = facts["attempts"]["running"]
        headers = {"authorization": f"Bearer {held['token']}"}
        for url in urls:
            assert httpx2.get(f"{url}/readyz", trust_env=False).json()["status"] == "ok"
            path = f"{url}/v1/worker/leases/{held['lease_id']}/heartbeat"
            body = {"attempt": held["attempt"]}
            answer = httpx2.post(path, json=body, headers=headers, trust_env=False)
            assert answer.status_code == 200, "its lease, which ended long ago, was not ended"
    finally:
        for process in started:
            process.terminate()
        assert [process.wait(20) for process in started] == [0, 0]
    with sqlite3.connect(home / "dar.db") as connection:
        assert connection.execute("SELECT count(*) FROM alembic_version").fetchone() == (1,)
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
