"""Test processes that are copies of one process, which has imported the product once.

Each test process of pytest-xdist is a new Python, and imports torch, transformers and the product
for several seconds. When all tests run, the process that starts them imports all that first, and
becomes the test processes by forks.
"""

import atexit
import contextlib
import gc
import importlib
import logging
import os
import signal
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from execnet import XSpec, gateway_io
from execnet.gateway_base import ExecModel, Popen2IO

IMPORTED = (
    "dar.cli.main",
    "dar.rewards.server",
    "dar.training.from_spec",
    "dar.training.script.main",
    "service.app",
    "worker.app",
    "peft",
    "openai",
    "wandb",
)
"""What many tests import, directly or not."""


@dataclass(frozen=True, slots=True)
class Fork:
    """A copy of this process that waits for the first line of a test process."""

    pid: int
    stdin: int
    """Write end of its standard input."""
    stdout: int
    """Read end of its standard output."""


class ForkedIO(Popen2IO):  # type: ignore[misc] # execnet is not typed
    """The pipes to a fork, as execnet has them to a process that it has started."""

    def __init__(self, fork: Fork, execmodel: ExecModel) -> None:
        super().__init__(os.fdopen(fork.stdin, "wb"), os.fdopen(fork.stdout, "rb"), execmodel)
        self._pid = fork.pid

    def wait(self) -> int | None:
        with contextlib.suppress(ChildProcessError):
            return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)


def fork_test_processes(specs: Sequence[XSpec]) -> Callable[[], None]:
    """Let the test processes of ``specs`` be forks of this one; returns what ends that.

    It has to be called before execnet has threads. A test process that is started later, as one
    has crashed, is a new Python.
    """
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    forks: list[Fork] = []
    for _ in specs:
        forks.append(_fork(forks))
    create = gateway_io.create_io

    def create_io(spec: XSpec, execmodel: ExecModel) -> Any:
        return ForkedIO(forks.pop(), execmodel) if forks else create(spec, execmodel)

    def restore() -> None:
        gateway_io.create_io = create

    gateway_io.create_io = create_io
    return restore


def _fork(others: Sequence[Fork]) -> Fork:
    stdin, to_stdin = os.pipe()
    from_stdout, stdout = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        # A pipe ends when nobody has its other end any more.
        for fd in (
            to_stdin,
            from_stdout,
            *(fd for one in others for fd in (one.stdin, one.stdout)),
        ):
            os.close(fd)
        _serve(stdin, stdout)
    os.close(stdin)
    os.close(stdout)
    return Fork(pid, to_stdin, from_stdout)


def _serve(stdin: int, stdout: int) -> None:
    """Do what execnet lets a new Python do; never returns."""
    status = 1
    try:
        for old, new in ((stdin, 0), (stdout, 1)):
            os.dup2(old, new)
            os.close(old)
        sys.stdin = os.fdopen(0, "r", 1, closefd=False)
        sys.stdout = os.fdopen(1, "w", 1, closefd=False)
        sys.argv = ["-c"]
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        logging.getLogger().handlers.clear()  # those of the session that starts the tests
        exec(eval(sys.stdin.readline()), main.__dict__)
        status = 0
    except BaseException:  # noqa: BLE001 - outermost frame of a process
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stderr.flush()
        os._exit(status)
