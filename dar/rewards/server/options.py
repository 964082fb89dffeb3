"""The options of a reward server, checked."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict
from urllib.parse import quote, unquote

from dar.errors import ConfigurationError
from dar.protocol.rewards import MAX_REQUEST_BYTES
from dar.rewards.http.signing import decode_secret, secrets_in_file

CALLS = 1
"""Default concurrency of a plain function, which need not be thread-safe."""
COROUTINE_CALLS = 64
"""Default concurrency of a coroutine function."""


class ServerOptions(TypedDict, total=False):
    """Keyword arguments of `reward_server` and `serve`."""

    secret: str | Sequence[str] | None
    """``whsec_…``, or several during a rotation. A request that none of them signed gets a 401;
    answers are signed with all."""
    secret_file: str | Path | Sequence[str | Path] | None
    """One or several files with one or several secrets, one a line; ``~`` is expanded."""
    path: str
    """Path of reward requests, with or without escapes; default ``/score``. Later results are at
    ``results/<request id>`` next to it."""
    max_calls: int | None
    """Most calls of the function at once; default 1 for a plain function, so that it need not be
    thread-safe, and 64 for a coroutine function. Raise it for a function that waits for a
    network."""
    max_waiting: int
    """Most requests waiting for their call; default 256. Others get a 503 with ``Retry-After``."""
    max_body_bytes: int
    """Largest request; default 8 MiB. A larger one gets a 413, and the client splits it."""
    max_answers: int
    """Most answers kept for repeated requests and polls; default 1024."""
    max_answer_bytes: int
    """Most bytes of all kept answers together; default 64 MiB."""
    remembered_seconds: float
    """How long an answer is kept, within these limits; default an hour, and at least until its
    deadline."""
    asynchronous: bool
    """Answer 202 if the request allows it; the result follows by poll or, with a secret, by
    callback."""
    answer_within_seconds: float | None
    """Answer 200 if the result is ready within this time, else 202; implies ``asynchronous``.
    Default 0 with ``asynchronous``: a 202 without waiting."""
    stop_seconds: float
    """Most seconds for running calls and promised results after SIGTERM or Ctrl-C; default 30."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedOptions:
    """`ServerOptions` with their defaults.

    Raises:
        ConfigurationError: An option is out of range, or a secret is malformed.
        OSError: A ``secret_file`` cannot be read.
    """

    secret: str | Sequence[str] | None = None
    secret_file: str | Path | Sequence[str | Path] | None = None
    path: str = "/score"
    max_calls: int | None = None
    max_waiting: int = 256
    max_body_bytes: int = MAX_REQUEST_BYTES
    max_answers: int = 1024
    max_answer_bytes: int = 64 * 1024**2
    remembered_seconds: float = 3600.0
    asynchronous: bool = False
    answer_within_seconds: float | None = None
    stop_seconds: float = 30.0

    def __post_init__(self) -> None:
        if not _is_usable(self.path):
            raise ConfigurationError(
                f"path is {self.path!r}, but must be a URL path like /score, without . and .. as parts, "
                "braces, ? and #"
            )
        for name in ("max_calls", "max_body_bytes", "max_answers", "max_answer_bytes"):
            _check(name, getattr(self, name), least=1)
        for name in ("max_waiting", "remembered_seconds", "answer_within_seconds", "stop_seconds"):
            _check(name, getattr(self, name), least=0)

    @property
    def decoded_path(self) -> str:
        """`path` without escapes: what a request for it has, however its client escapes it."""
        return unquote(self.path)

    @property
    def escaped_path(self) -> str:
        """`path` as a part of a URL."""
        return quote(self.decoded_path, safe="/:@!$&'()*+,;=~")

    def keys(self) -> tuple[bytes, ...]:
        """All secrets, decoded."""
        secrets = [self.secret] if isinstance(self.secret, str) else list(self.secret or ())
        files = self.secret_file
        for file in [files] if isinstance(files, str | Path) else files or ():
            secrets += secrets_in_file(Path(file).expanduser())
        return tuple(map(decode_secret, secrets))

    def calls(self, *, is_coroutine: bool) -> int:
        """Most calls at once of a plain or a coroutine function."""
        return self.max_calls or (COROUTINE_CALLS if is_coroutine else CALLS)

    @property
    def seconds_before_202(self) -> float | None:
        """How long a result is awaited before a 202 is sent; None: no 202 is sent."""
        within = self.answer_within_seconds
        return 0.0 if self.asynchronous and within is None else within


def _is_usable(path: str) -> bool:
    try:
        plain = unquote(path, errors="strict")
        plain.encode()
    except UnicodeError:
        return False
    parts = plain.split("/")
    return (
        path.startswith("/")
        and set(path).isdisjoint("?#")
        and set(plain).isdisjoint("{}")
        and plain.isprintable()
        and {".", ".."}.isdisjoint(parts)
    )


def _check(name: str, value: float | None, least: int) -> None:
    if value is not None and not (math.isfinite(value) and value >= least):
        raise ConfigurationError(f"{name} is {value}, but must be at least {least}")
