"""``dar up``: one command starts everything, keeps it alive and stops it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from dar.cli.main import main
from dar.client import Client
from dar.processes import answers
from dar.settings import environment
from fakes.command_line import run_command


class Up:
    """A running ``dar up``."""

    def __init__(self, home: Path, port: int, workers: int = 0) -> None:
        self.home, self.url = home, f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "dar.cli", "up", "--home", str(home), "--port", str(port)]
        self.process = subprocess.Popen(
            [*command, "--workers", str(workers)],
            stderr=subprocess.PIPE,
            env=environment(),
            start_new_session=True,
        )

    def wait(self) -> "Up":
        deadline = time.monotonic() + 60
        while not answers(f"{self.url}/readyz"):
            assert time.monotonic() < deadline
            assert self.process.poll() is None, self.process.stderr and self.process.stderr.read()
            time.sleep(0.05)
        return self

    def child(self, word: str) -> psutil.Process:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next(child for child in children if any(word in part for part in child.cmdline()))

    def stop(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGINT)
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors.decode()


@pytest.fixture
def start_up(tmp_path: Path, free_port: Callable[[], int]) -> Iterator[Callable[..., Up]]:
    started: list[Up] = []

    def start(home: Path = tmp_path / "home", **options: int) -> Up:
        started.append(Up(home, options.pop("port", free_port()), **options))
        return started[-1]

    yield start
    for running in started:
        if running.process.poll() is None:
            running.process.kill()
        running.process.communicate()


def test_one_command_starts_all_and_one_interrupt_stops_all(start_up: Callable[..., Up]) -> None:
    running = start_up(workers=1).wait()
    while not (running.home / "worker").exists():  # the worker starts after the service is ready
        time.sleep(0.05)
    processes = psutil.Process(running.process.pid).children(recursive=True)
    assert {"service", "worker", "valkey-server"} <= {
        Path(part).name for process in processes for part in process.cmdline()
    }
    code, errors = running.stop()
    assert code == 0
    assert str(running.home / "api_key") in errors
    assert (running.home / "models").is_dir()
    assert not [process for process in processes if process.is_running()]


@pytest.mark.slow  # starts everything
def test_a_child_that_dies_is_started_again(start_up: Callable[..., Up]) -> None:
    running = start_up().wait()
    before = running.child("serve")
    before.kill()
    before.wait(5)
    running.wait()
    assert running.child("serve").pid != before.pid


@pytest.mark.slow  # starts everything
def test_children_die_with_their_parent(start_up: Callable[..., Up]) -> None:
    running = start_up().wait()
    children = psutil.Process(running.process.pid).children(recursive=True)
    running.process.kill()
    gone, alive = psutil.wait_procs(children, timeout=5)
    assert gone
    assert not alive


@pytest.mark.slow  # starts everything twice
def test_a_second_start_on_the_same_home_goes_on_where_it_was(start_up: Callable[..., Up]) -> None:
    first = start_up().wait()
    key = (first.home / "api_key").read_text()
    with Client(api_key=key.strip(), base_url=first.url) as client:
        file_id = client.files.create(b'{"prompt": "x"}\n', filename="one.jsonl").id
    assert first.stop()[0] == 0
    second = start_up().wait()
    assert (second.home / "api_key").read_text() == key
    with Client(api_key=key.strip(), base_url=second.url) as client:
        assert client.files.retrieve(file_id).id == file_id


def test_a_home_that_is_in_use_and_a_port_that_is_taken_are_refused(
    start_up: Callable[..., Up], tmp_path: Path
) -> None:
    running = start_up().wait()
    port = int(running.url.rpartition(":")[2])
    for other, said in (
        (start_up(), b"already up"),
        (start_up(tmp_path / "other", port=port), b"--port"),
    ):
        _, errors = other.process.communicate(timeout=30)
        assert other.process.returncode == 1
        assert said in errors
        assert b"Traceback" not in errors


@pytest.mark.parametrize("command", ["up", "demo"])
@pytest.mark.parametrize("below", [".", "home"])
def test_a_home_that_is_a_file_is_refused_in_one_sentence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    below: str,
) -> None:
    (tmp_path / "file").write_text("")
    home = tmp_path / "file" / below
    monkeypatch.setattr(sys, "argv", ["dar", command, "--home", str(home)])
    before = os.umask(0o077)  # the commands set it too
    try:
        with pytest.raises(SystemExit) as caught:
            main()
    finally:
        os.umask(before)
    assert caught.value.code == 1
    said = capsys.readouterr().err
    assert f"{home} cannot be used: it is not a folder" in said
    assert "--home or DAR_HOME" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("host", "why"),
    [
        ("192.0.2.1", "cannot listen on 192.0.2.1"),
        (f"{64 * 'x'}.example", "neither the name of a host"),
        ("", "neither the name of a host"),
        ("a..b", "neither the name of a host"),
        ("::g", "neither the name of a host"),
        ("[::1]", "brackets"),
    ],
)
def test_a_host_to_which_nothing_can_bind_is_refused_with_the_reason(
    tmp_path: Path, host: str, why: str
) -> None:
    before = os.umask(0o077)
    try:
        ended = run_command(
            *("up", "--workers", "0", "--host", host, "--home", str(tmp_path / "home")),
            environment={},
        )
    finally:
        os.umask(before)
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert why in ended.stderr
    assert "is taken" not in ended.stderr
    assert "--host" in ended.stderr or "DAR_HOST" in ended.stderr
