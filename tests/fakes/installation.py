"""A whole installation in a folder: real Valkey, real service, real worker, real reward service,
each its own process.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import pytest

from dar.cli.up import find_valkey, valkey_child
from dar.client import Client
from dar.processes import answers, launch
from dar.protocol.jobs import Job
from dar.protocol.status import TERMINAL
from dar.settings import environment as current_environment

REWARD_SERVICE = '''
import sys
from pathlib import Path
from dar.rewards.server import serve

def letters(prompts, completions, **columns):
    """Share of the letter e."""
    return [text.count("e") / max(1, len(text)) for text in completions]

if __name__ == "__main__":
    serve(letters, host="127.0.0.1", port=int(sys.argv[1]), secret=Path(sys.argv[2]).read_text().strip())
'''


KEY_FILES = {"api_key", "worker_key", "reward_secret"}
"""Where secrets of an installation belong."""


TOKENS = re.compile(
    rb"dar-(?:at|sk|wk)-[0-9A-Za-z]{8,40}-[\w-]{43}|rwt_[\w-]{43}|whsec_[\w+/=]{24,}"
)
"""Every secret that is made here begins in a way of its own."""


def eventually(check: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait until ``check`` gives something true, and return that."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := check():
            return found
        time.sleep(0.05)
    pytest.fail(f"not within {seconds} s: {what}")


def spilled(content: bytes, secrets: Sequence[str]) -> list[bytes]:
    """The secrets in ``content``: those given, and whatever looks like one of ours."""
    given = [text.encode() for text in secrets if text.encode() in content]
    return given + TOKENS.findall(content)


class BrokerLog:
    """Every command that reaches the broker while it is open."""

    def __init__(self, port: int) -> None:
        self._connection = socket.create_connection(("127.0.0.1", port))
        self._connection.sendall(b"AUTH secret\r\nMONITOR\r\n")
        self.content = b""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._connection.recv(65536):
                self.content += data

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._connection.close()


class Installation:
    """Processes that a test starts, kills and starts again."""

    def __init__(self, home: Path, free_port: Callable[[], int]) -> None:
        self.home = home
        self.port, self.reward_port, self.valkey_port = free_port(), free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.reward_url = f"http://127.0.0.1:{self.reward_port}/score"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        home.mkdir(parents=True, exist_ok=True)

    def start_broker(self) -> None:
        binary = find_valkey()
        assert binary is not None
        self.processes["valkey"] = launch(
            valkey_child(binary, self.home, self.valkey_port, "secret")
        )

    def start(self, name: str, *arguments: str, **settings: object) -> subprocess.Popen[bytes]:
        environment = {
            **current_environment(),
            "DAR_HOME": str(self.home),
            "DAR_PORT": str(self.port),
            "DAR_BROKER_URL": f"redis://:secret@127.0.0.1:{self.valkey_port}/0",
            "DAR_RECONCILE_SECONDS": "0.5",
            "DAR_EGRESS_ALLOW_CIDRS": "127.0.0.0/8",
            "DAR_EGRESS_ALLOW_HTTP": "127.0.0.1",
            "DAR_REWARD_PROBE_SECONDS": "0.5",
            **{f"DAR_{key.upper()}": str(value) for key, value in settings.items()},
        }
        with (self.home / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes[name] = process
        return process

    def start_service(self) -> None:
        self.start("service", "-m", "service", "serve")
        eventually(lambda: answers(f"{self.url}/readyz"), 60, "the service is ready")

    def start_worker(self, **settings: object) -> None:
        self.start("worker", "-m", "worker", **settings)

    def start_reward_service(self) -> None:
        program = self.home / "reward.py"
        program.write_text(REWARD_SERVICE)
        self.start("reward", str(program), str(self.reward_port), str(self.home / "reward_secret"))
        eventually(
            lambda: answers(f"http://127.0.0.1:{self.reward_port}/healthz"),
            30,
            "the reward service is ready",
        )

    def end(self, name: str, number: signal.Signals = signal.SIGTERM) -> int:
        process = self.processes.pop(name)
        process.send_signal(number)
        return process.wait(60)

    def stop(self) -> None:
        if "client" in self.__dict__:
            self.client.close()
        for name in ("worker", "reward", "service", "valkey"):
            if name in self.processes:
                with contextlib.suppress(ProcessLookupError):
                    self.end(name, signal.SIGKILL if name != "valkey" else signal.SIGTERM)

    def files_with_secrets(self, secrets: Sequence[str]) -> list[tuple[str, bytes]]:
        """What shows a secret among all files but those that are there to keep one: logs, database,
        spool, checkpoints.
        """
        shown: list[tuple[str, bytes]] = []
        for folder, _, names in os.walk(self.home):
            for name in set(names) - KEY_FILES:
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):  # the worker tidies up meanwhile
                    shown += [(str(path), found) for found in spilled(path.read_bytes(), secrets)]
        return shown

    def trainers(self) -> list[psutil.Process]:
        """Processes of the worker that are not itself."""
        return psutil.Process(self.processes["worker"].pid).children(recursive=True)

    def trainer_logs(self) -> list[Path]:
        """What the trainers of attempts that are under way have printed."""
        return list(self.home.glob("worker/slot-*/attempts/*/trainer.log"))

    @cached_property
    def client(self) -> Client:
        return Client(api_key=(self.home / "api_key").read_text().strip(), base_url=self.url)

    def install_model(self, base: Path, name: str = "base") -> None:
        shutil.copytree(base / "model", self.home / "models" / name)

    def spec(self, file_id: str, **changes: Any) -> dict[str, Any]:
        """A small job: 40 steps of 6 prompts with 4 completions each."""
        hyperparameters: Mapping[str, Any] = {
            "learning_rate": 2e-3,
            "batch_size": 6,
            "max_steps": 40,
            "alpha": 0.02,
            "beta": 0.03,
            **changes.pop("hyperparameters", {}),
        }
        return {
            "model": "base",
            "training_file": file_id,
            "seed": 11,
            "method": {
                "type": "dar",
                "dar": {
                    "hyperparameters": hyperparameters,
                    "sampling": {"max_new_tokens": 12},
                    "rewards": {"components": [{"name": "letters", "url": self.reward_url}]},
                    "checkpointing": {"every_steps": 5, "keep_last": 2},
                    **changes,
                },
            },
        }

    def until_step(self, job_id: str, step: int, seconds: float = 90) -> Job:
        def reached() -> Job | None:
            job = self.client.jobs.retrieve(job_id)
            assert job.status not in TERMINAL, job.error
            return job if job.progress.step >= step else None

        return eventually(reached, seconds, f"{job_id} reaches step {step}")  # type: ignore[no-any-return] # `eventually` returns what `reached` gave

    def until_done(self, job_id: str, seconds: float = 150) -> Job:
        def done() -> Job | None:
            job = self.client.jobs.retrieve(job_id)
            return job if job.status in TERMINAL else None

        return eventually(done, seconds, f"{job_id} ends")  # type: ignore[no-any-return] # `eventually` returns what `done` gave
