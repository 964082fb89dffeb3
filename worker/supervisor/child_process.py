"""The trainer process, which runs in its own session and never outlives its worker.

Three mechanisms end it with its worker: the kernel (`die_with_parent`), the end of its stdin, and
the next worker of the slot, which kills a remaining trainer (`kill_leftover`).
"""

import contextlib
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from dar.disk import read_if_there, write_atomically
from dar.settings import inherited_environment
from worker.folders import AttemptFolder
from worker.launch import Launch, Order, RewardNews, signal_name

LOG_TAIL_BYTES = 4096
KILL_SECONDS = 10.0
PASSED_ON = (
    *("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH"),
    *("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "XDG_CACHE_HOME"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
    "DAR_FAULT_POINTS",
)
"""Variables of the worker's environment that its trainers get; no key is among them."""


def trainer_environment(
    devices: str | None, threads: int, *, is_offline: bool, processes: int = 1
) -> dict[str, str]:
    """The whole environment of a trainer.

    Args:
        devices: ``CUDA_VISIBLE_DEVICES``; None: all.
        threads: CPU threads of each of its processes.
        is_offline: Whether it must not use the model hub.
        processes: Processes that train together; the others inherit this environment from the
            first (`worker.attempt.siblings`).
    """
    environment = inherited_environment(PASSED_ON) | {
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
    }
    if processes > 1:
        environment |= {
            **dict.fromkeys(("RANK", "LOCAL_RANK"), "0"),
            **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes)),
            **dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), "lo"),
            "MASTER_ADDR": "127.0.0.1",
        }
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = devices
    if is_offline:
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    return environment


def start_ticks(pid: int) -> int | None:
    """Start of process ``pid`` in clock ticks since boot; None: it has ended.

    Together with the pid it identifies a process, because the system reuses pids.
    """
    content = read_if_there(Path(f"/proc/{pid}/stat"))
    if content is None:
        return None
    fields = content.rpartition(b")")[2].split()  # the command before it may contain spaces
    return None if fields[0] == b"Z" else int(fields[19])


@dataclass(frozen=True, slots=True)
class TrainerExit:
    """How a trainer process ended."""

    code: int
    """Exit code, or the negative number of the signal that killed it."""
    log_tail: str

    @property
    def signal_name(self) -> str | None:
        """Name of the signal that killed it; None: it ended by itself."""
        return None if self.code >= 0 else signal_name(-self.code)


class TrainerProcess:
    """A running trainer.

    The thread that creates it must live until the trainer has ended, because the kernel treats the
    end of that thread as the death of the parent.
    """

    def __init__(
        self,
        command: Sequence[str],
        folder: AttemptFolder,
        launch: Launch,
        environment: Mapping[str, str],
    ) -> None:
        self._folder = folder
        self._redact = launch.redactor()
        self.notes, outbox = os.pipe()
        """Read end of the pipe with a `RewardNote` per line; its reader closes it."""
        with folder.log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                cwd=folder.path,
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(outbox,),
            )
        os.close(outbox)
        self.pid = self._process.pid
        identity = {"pid": self.pid, "started": start_ticks(self.pid)}
        write_atomically(folder.trainer, orjson.dumps(identity))
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="trainer-stdin", daemon=True)
        self._writer.start()
        self._lines.put(launch.model_copy(update={"outbox": outbox}).model_dump_json())

    def _write(self) -> None:
        # A thread of its own: a trainer that does not read must not block the thread that ends it.
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it died, and `poll` returns how
            while (line := self._lines.get()) is not None:
                self._process.stdin.write(f"{line}\n".encode())
                self._process.stdin.flush()
        with contextlib.suppress(OSError):  # the buffer cannot be written any more
            self._process.stdin.close()

    def order(self, order: Order) -> None:
        """Send an order to the trainer, without waiting."""
        self._lines.put(order.model_dump_json())

    def send_news(self, news: RewardNews) -> None:
        """Send the state of a reward request to the trainer, without waiting."""
        self._lines.put(news.model_dump_json())

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the trainer and all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def poll(self) -> TrainerExit | None:
        """How the trainer ended; None while it runs. Its remaining processes are killed first."""
        if self._process.returncode is None:
            how = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if how is None:
                return None
            # Before the leader is reaped, because until then no other group can get its id.
            self.signal(signal.SIGKILL)
            self._process.wait()
            self._close_stdin()
            self._folder.trainer.unlink(missing_ok=True)
        return TrainerExit(self._process.returncode, self.log_tail())

    def kill(self) -> TrainerExit:
        """Kill the trainer and all its processes."""
        while (ended := self.poll()) is None:
            self.signal(signal.SIGKILL)
            time.sleep(0.01)
        return ended

    def _close_stdin(self) -> None:
        self._lines.put(None)
        self._writer.join()  # all readers of the pipe are dead, so no write blocks

    def log_tail(self) -> str:
        """The end of the trainer's log, without the secrets of its rewards."""
        with self._folder.log.open("rb") as file:
            file.seek(max(0, self._folder.log.stat().st_size - LOG_TAIL_BYTES))
            return self._redact(file.read().decode(errors="replace"))


def kill_leftover(folder: AttemptFolder) -> bool:
    """Kill the trainer that a dead worker left in ``folder``, if the same process still runs.

    Returns:
        Whether a trainer was killed.
    """
    content = read_if_there(folder.trainer)
    if content is None:
        return False
    identity = orjson.loads(content)
    pid, started = identity["pid"], identity["started"]
    if started is None or start_ticks(pid) != started:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    until = time.monotonic() + KILL_SECONDS
    while start_ticks(pid) == started and time.monotonic() < until:
        time.sleep(0.02)
    return True
