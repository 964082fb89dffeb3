"""What errors of loaders mean: the hub, this machine, or the files are at fault."""

import errno
import re
from collections.abc import Iterator, Sequence
from typing import NoReturn

import httpx2
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from dar.errors import DARError, HubUnreachableError, TrainingError
from dar.protocol import hub_refusals

MACHINE_ERRORS = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM),
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    }
)
"""Errors of a file system that other files would not have avoided."""
OTHER_SHAPES = "its weights have other shapes than its config.json says"
NO_MEMORY = re.compile(r"[Tt]ried to allocate \d[\d.]* ?\w+")
"""What torch says when a GPU or a CPU lacks memory, with the size."""
GATED_ROWS = "is a gated dataset on the Hub"
NO_ROWS = "doesn't exist on the Hub or cannot be accessed"
"""What `datasets` says in place of the hub's answer, which it drops."""


def blame(error: Exception, what: str, failed: str, *, param: str, is_offline: bool) -> NoReturn:
    """Raise what an error of a loader means; its cause if this machine is at fault.

    Args:
        error: The loader's.
        what: What it should load, such as ``the model 'owner/name'``.
        failed: What did not work; the reason is appended.
        param: The parameter that names it.
        is_offline: Whether access to the hub is forbidden.

    Raises:
        TrainingError: The files are at fault.
        HubUnreachableError: The hub cannot be reached.
    """
    if isinstance(error, DARError):
        raise error
    for cause in _chain(error):
        is_of_machine = isinstance(cause, OSError) and cause.errno in MACHINE_ERRORS
        if is_of_machine or is_lack_of_memory(cause):
            raise cause
    words = OTHER_SHAPES if "ignore_mismatched_sizes" in str(error) else first_line(error)
    reason = _of_hub(error, what, param=param, is_offline=is_offline) or TrainingError(
        f"{failed}: {words}", param=param
    )
    raise reason from error


def _of_hub(error: BaseException, what: str, *, param: str, is_offline: bool) -> DARError | None:
    """The error for a user, if the hub or the way to it is the cause; otherwise None."""
    chain = list(_chain(error))
    if (refusal := _refusal(chain, what)) is not None:
        return TrainingError(refusal, param=param)
    if not any(_is_unreachable(one) for one in chain):
        return None
    if is_offline:
        return TrainingError(
            f"{what} is not in this machine's cache, and this process may not call the hub; use a "
            "local copy",
            param=param,
        )
    return HubUnreachableError(hub_refusals.unreachable(what, first_line(chain[-1])), param=param)


def _refusal(chain: Sequence[BaseException], what: str) -> str | None:
    """Why the hub does not give ``what`` to this account; None if that is not the cause."""
    if any(isinstance(one, GatedRepoError) or GATED_ROWS in str(one) for one in chain):
        return hub_refusals.gated(what)
    if any(isinstance(one, RepositoryNotFoundError) or NO_ROWS in str(one) for one in chain):
        return hub_refusals.missing(what)
    for one in chain:
        if isinstance(one, HfHubHTTPError):
            status = one.response.status_code
            if status in hub_refusals.REFUSALS:
                return hub_refusals.refused(what, status, one.server_message)
    return None


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether a GPU or this machine has too little memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or bool(
        isinstance(error, RuntimeError) and NO_MEMORY.search(str(error))
    )


TERSE = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, TypeError)
"""Errors whose text says little without their class."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text without its full stop; its class if it has no text.

    A first line that ends in a colon is a heading, so the next one follows it.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    is_heading = len(lines) > 1 and lines[0].endswith(":")
    text = " ".join(lines[: 2 if is_heading else 1]).rstrip(".:")
    if not text or isinstance(error, TERSE):
        return f"{type(error).__name__}: {text}".rstrip(": ")
    return text


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it, the first cause last."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_unreachable(error: BaseException) -> bool:
    """Whether only the network or the hub's servers failed, and the files may exist."""
    if isinstance(error, HfHubHTTPError):
        return hub_refusals.is_passing(error.response.status_code)
    return isinstance(error, LocalEntryNotFoundError | ConnectionError | httpx2.TransportError)
