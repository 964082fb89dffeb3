"""The other processes of a trainer, which the first process starts and watches.

They run in its process group. Each gets its launch on stdin, as the trainer does from its worker,
but without reward secrets, because only the first process requests rewards. The hub's token is in
it, because each process loads the model. Three mechanisms end
them with the first: the end of their stdin, the kernel, and a signal to the group.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from dar.disk import write_atomically
from dar.settings import own_environment
from worker.failures import IN_THE_LOG, OUT_OF_MEMORY_HINT, PROCESS_FAILED
from worker.folders import AttemptFolder
from worker.launch import ExitCode, Launch, TrainerResult, signal_name

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.1
LOG_TAIL_BYTES = 2048
AGREED = frozenset(ExitCode) - {ExitCode.CRASHED}
"""Exit codes with which all processes end together."""
AGREED_SECONDS = 60.0
"""Time for the first process to end in the same way."""
CRASHED_SECONDS = 10.0
"""Time for it to end after another one crashed.

It learns the reason through the store, unless it is inside a collective of torch.
"""
FINISH_SECONDS = 20.0


class Siblings:
    """The processes 1, 2, … of a trainer.

    The thread that trains creates them, and must live as long as they do.

    Args:
        launch: The launch of the trainer.
    """

    def __init__(self, launch: Launch) -> None:
        self._folder = AttemptFolder(launch.folder)
        self._is_finished = False
        self._ended_at: dict[int, float] = {}
        self._listener = socket.create_server(("127.0.0.1", 0)) if launch.processes > 1 else None
        self.launch = launch
        """The launch of the trainer, with the port at which the processes meet."""
        if self._listener is not None:
            port = int(self._listener.getsockname()[1])
            self.launch = launch.model_copy(
                update={"port": port, "listener": self._listener.detach()}
            )
        self._processes = {number: self._start(number) for number in range(1, launch.processes)}
        if self._processes:
            threading.Thread(target=self._watch, name="siblings", daemon=True).start()

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        launch = self.launch.model_copy(
            update={
                "process": number,
                "listener": None,
                "reward_secret": None,
                "reward_access": {},
                "outbox": None,
            }
        )
        with self._folder.log_of(number).open("ab") as output:
            process = subprocess.Popen(
                sys.orig_argv,
                env=own_environment({"RANK": str(number), "LOCAL_RANK": str(number)}),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        assert process.stdin is not None
        process.stdin.write(f"{launch.model_dump_json()}\n".encode())
        process.stdin.flush()
        return process

    def finish(self) -> None:
        """Wait until they have ended, after training."""
        self._is_finished = True
        until = time.monotonic() + FINISH_SECONDS
        for number, process in self._processes.items():
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.warning("process %d does not end; the worker will kill it", number)

    def _watch(self) -> None:
        while not self._is_finished:
            for number, process in self._processes.items():
                code = process.poll()
                if code is not None and self._is_overdue(number, code):
                    self._end_like(number, code)
            time.sleep(LOOK_SECONDS)

    def _is_overdue(self, number: int, code: int) -> bool:
        """Whether the trainer had enough time to end by itself after a process ended."""
        waited = time.monotonic() - self._ended_at.setdefault(number, time.monotonic())
        if code in AGREED:
            return waited > AGREED_SECONDS
        return code < 0 or waited > CRASHED_SECONDS

    def _end_like(self, number: int, code: int) -> None:
        """End the trainer in the same way as one of its processes.

        The trainer cannot continue without it, and may block in a collective.
        """
        how = f"exit code {code}" if code >= 0 else signal_name(-code)
        log.error(
            "process %d of this trainer ended with %s, so training cannot continue; "
            "the end of its log:\n%s",
            number,
            how,
            self._log_tail(number),
        )
        words = f"process {number} of the job ended with {how}, and the others cannot continue"
        hint = OUT_OF_MEMORY_HINT if code == -signal.SIGKILL else IN_THE_LOG
        result = TrainerResult(
            last_seq=0, code=PROCESS_FAILED, message=f"{words}; {hint}", owner="worker"
        )
        write_atomically(self._folder.result, result.model_dump_json().encode())
        logging.shutdown()
        if code < 0:
            os.kill(os.getpid(), -code)
            time.sleep(1.0)  # in case the signal does not end this process
        os._exit(ExitCode.CRASHED)

    def _log_tail(self, number: int) -> str:
        return self._folder.log_of(number).read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
