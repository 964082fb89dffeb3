"""Whose fault a failed attempt is, and the sentence about it that the job's user reads.

Every exception that leaves a trainer or ends an attempt gets one owner. Failures of the user and of
a reward service end or pause the job; all others are tried again.
A sentence holds no traceback and no path of this machine: the trainer's log has those.
"""

import errno
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from dar.errors import (
    CheckpointError,
    DARError,
    HubUnreachableError,
    RewardBudgetError,
    RewardError,
)
from dar.protocol.worker import FailureOwner
from dar.rewards.http.responses import CLIENT_FAULT

CODE_LENGTH = 64
SERVER_ERROR = 500
"""First HTTP status of errors that no other request would have avoided."""
DATABASE_AWAY = "database_unavailable"
"""Code of the service's errors while its database is away."""
STORAGE_CODES = frozenset({"storage_full", "storage_unavailable", "missing", "input_altered"})
"""Codes of errors about files of the service."""
MESSAGE_LENGTH = 2000
"""Longest message; the same as that of a `dar.protocol.worker.Release`."""
QUOTE_LENGTH = 300
"""Longest quotation of an exception that was not written for users."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
IN_THE_LOG = "the worker's log of this attempt has the details"
OUT_OF_MEMORY_HINT = (
    "the usual reason is that the machine ran out of memory: use a smaller batch_size, dar_k, "
    "max_new_tokens or model, or give the worker more memory"
)
PROCESS_FAILED = "process_failed"
"""Code of the report that one of several processes has ended."""
TRACEBACK = "Traceback (most recent call last)"
PATH = re.compile(r"(?:file://|(?<![\w./~-]))/([^\s/'\"<>|:;,()\[\]]+)(?:/[^\s/'\"<>|:;,()\[\]]+)+")
"""An absolute path of two or more parts, which does not continue a URL or another word."""


@dataclass(frozen=True, slots=True)
class AttemptFailure:
    """The failure of an attempt, as its user reads it."""

    owner: FailureOwner
    code: str
    message: str
    param: str | None = None
    is_outage: bool = False
    """Whether rewards are missing for a cause that may pass by itself."""


class _Known(NamedTuple):
    owner: FailureOwner
    code: str
    words: str


MEMORY = _Known("worker", "out_of_memory", "the worker ran out of memory")
NETWORK = _Known("worker", "network_failed", "the worker's network failed")
DEVICE = _Known("worker", "device_failed", "a device of the worker failed")
DISK = _Known("worker", "disk_full", "the worker's disk is full")
MACHINE = _Known("worker", "machine_failed", "the worker's machine failed")
INSTALLATION = _Known("worker", "installation_broken", "the worker's installation is incomplete")
UNKNOWN = _Known("service", "trainer_failed", "the trainer failed by a fault of its own")

BY_CLASS: Mapping[str, _Known] = {
    "builtins.MemoryError": MEMORY,
    "torch.OutOfMemoryError": MEMORY,
    "torch.AcceleratorError": DEVICE,
    "torch.distributed.DistError": DEVICE,
    "sqlite3.OperationalError": MACHINE,
    "builtins.ConnectionError": NETWORK,
    "builtins.TimeoutError": NETWORK,
    "httpx.HTTPError": NETWORK,
    "httpx2.HTTPError": NETWORK,
    "requests.exceptions.RequestException": NETWORK,
    "builtins.ImportError": INSTALLATION,
    "builtins.OSError": MACHINE,
}
"""Exceptions by the name of their class or of a base class. Names, because nothing here may import
torch. The first class of an exception's resolution order that has an entry decides."""

BY_TEXT: tuple[tuple[re.Pattern[str], _Known], ...] = (
    (re.compile(r"no space left on device|disk is full|disk quota exceeded", re.IGNORECASE), DISK),
    (
        re.compile(r"out of memory|can't allocate memory|cannot allocate memory", re.IGNORECASE),
        MEMORY,
    ),
    (re.compile(r"\b(CUDA|HIP|cuDNN) error\b|_STATUS_[A-Z_]+|\bNCCL\b"), DEVICE),
)
"""Exceptions that libraries raise as a plain RuntimeError, by their text."""


def failure_of(
    error: BaseException, *, names: Mapping[str, str] | None = None, has_begun: bool = False
) -> AttemptFailure:
    """The failure that an exception means.

    Args:
        error: What left the trainer, or ended the attempt.
        names: What the user calls files of this machine, by their path.
        has_begun: Whether an earlier attempt wrote a checkpoint, so that the spec, the data and the
            model have worked before.
    """
    if isinstance(error, DARError):
        is_outage = isinstance(error, RewardBudgetError) and error.is_outage
        owner = _owner_of(error, has_begun=has_begun)
        found = AttemptFailure(owner, error.error_code, error.message, error.param, is_outage)
    else:
        known = _known(error)
        message = f"{known.words} ({_quoted(error)}); {IN_THE_LOG}"
        found = AttemptFailure(known.owner, known.code, message)
    message = presentable(found.message, names or {})
    return replace(found, code=found.code[:CODE_LENGTH], message=message)


def _owner_of(error: DARError, *, has_begun: bool) -> FailureOwner:
    if isinstance(error, RewardBudgetError) and set(error.errors) == {CLIENT_FAULT}:
        return "service"
    if isinstance(error, RewardError):
        return "reward"
    if isinstance(error, HubUnreachableError):
        return "worker" if has_begun else "user"
    known = {one.code: one.owner for one in (DISK, MEMORY, NETWORK, INSTALLATION)}
    if error.retryable and error.error_code in known:
        return known[error.error_code]
    if isinstance(error, CheckpointError) or error.error_code in STORAGE_CODES:
        return "storage"
    if error.error_code == DATABASE_AWAY:
        return "database"
    if error.retryable or error.status >= SERVER_ERROR:
        return "service"
    return "user"


def _known(error: BaseException) -> _Known:
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return DISK
    text = str(error)
    for pattern, known in BY_TEXT:
        if pattern.search(text):
            return known
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in type(error).__mro__)
    return next((BY_CLASS[name] for name in names if name in BY_CLASS), UNKNOWN)


def _quoted(error: BaseException) -> str:
    """The class and the first line of an exception; of one about a file, not which file."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    name = type(error).__name__
    return (f"{name}: {first}" if first else name)[:QUOTE_LENGTH]


def presentable(message: str, names: Mapping[str, str] | None = None) -> str:
    """A message as one paragraph, without tracebacks and without paths of this machine.

    Args:
        message: Any text.
        names: What the user calls files of this machine, by their path; other paths are cut to
            their last part.
    """
    for path, name in sorted((names or {}).items(), key=lambda item: -len(item[0])):
        message = message.replace(path, name)
    message = " ".join(message.partition(TRACEBACK)[0].split())
    return PATH.sub(_last_part, message)[:MESSAGE_LENGTH]


def _last_part(found: re.Match[str]) -> str:
    """The last part of a path of this machine; a path of a URL or of a reward service stays."""
    is_of_this_machine = os.path.lexists(f"/{found[1]}")
    return found[0].rpartition("/")[2] if is_of_this_machine else found[0]
