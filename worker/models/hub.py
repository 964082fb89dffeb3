"""Models of a hub: which files a commit has, and their download, resumed where it broke off.

The worker asks the hub itself, because the hub's library (2.4) starts each file anew in every
process: a worker that is killed after 60 of 70 GB would begin again. Only what a trainer reads is
downloaded: weights in safetensors, configs and tokenizer. Every file is verified.
"""

import contextlib
import hashlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import quote

import httpx2
import structlog
from huggingface_hub import constants
from pydantic import BaseModel, Field, ValidationError

from dar.client.transport import LOOPBACK, RetryPolicy, call_with_retries
from dar.disk import file_sha256, read_if_there
from dar.errors import DARError, HubUnreachableError, ModelNotFoundError
from dar.protocol import hub_refusals
from dar.rewards.http.redaction import Redactor
from dar.settings import Settings, unusable_surroundings
from worker.models.local import CONFIG, InputFetchError, arriving, safe_path, size_of

log = structlog.get_logger(__name__)

Result = TypeVar("Result")
CONNECT_SECONDS = 10.0
READ_SECONDS = 30.0
LONGEST_PAUSE_SECONDS = 8.0
FAILURES = 3
"""Failures in a row, without a byte in between, after which a request is not repeated."""
VERIFY_ATTEMPTS = 3
READ_BY_TRAINERS = re.compile(
    r"(?!consolidated)[^/]+\.(safetensors|json|txt|model|jinja|tiktoken|vocab|bpe|spm)"
    r"|additional_chat_templates/[^/]+\.jinja"
)
"""Files of a repository that a trainer may read. ``consolidated`` weights are those of the others
once more, in the format of another library."""


class Named(Protocol):
    """What a message says of a model."""

    @property
    def what(self) -> str: ...

    @property
    def param(self) -> str: ...


class _Blob(BaseModel):
    sha256: str


class _Sibling(BaseModel):
    rfilename: str
    size: int
    blob_id: str = Field(alias="blobId")
    lfs: _Blob | None = None


class _Repository(BaseModel):
    sha: str
    siblings: list[_Sibling]


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a commit."""

    name: str
    bytes: int
    sha256: str | None
    """None: a small file, of which the hub gives git's digest."""
    git_sha1: str

    def is_equal_to(self, path: Path) -> bool:
        """Whether a file on disk has this content."""
        if self.sha256 is not None:
            return file_sha256(path) == self.sha256
        digest = hashlib.sha1(f"blob {self.bytes}\0".encode(), usedforsecurity=False)
        digest.update(path.read_bytes())
        return digest.hexdigest() == self.git_sha1


@dataclass(frozen=True, slots=True)
class HubCommit:
    """What a repository had at one time."""

    commit: str
    files: tuple[HubFile, ...]
    """Those that trainers read."""

    @property
    def sizes(self) -> Mapping[str, int]:
        return {file.name: file.bytes for file in self.files}


class Hub:
    """A hub, asked by one attempt.

    Args:
        token: Token of an account; None: what everybody may read.
        check: Called often; raises if the attempt must stop.
        endpoint: URL of the hub.
    """

    def __init__(
        self, token: str | None, check: Callable[[], None], endpoint: str | None = None
    ) -> None:
        self._endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self._check = check
        self._redact = Redactor(() if token is None else (token,))
        # Without an encoding, as ranges count bytes of the file itself.
        headers = {"accept-encoding": "identity"}
        if token is not None:
            headers["authorization"] = f"Bearer {token}"
        try:
            self._client = httpx2.Client(
                headers=headers,
                timeout=httpx2.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
                follow_redirects=True,  # to storage on another host, which does not get the token
                trust_env=httpx2.URL(self._endpoint).host not in LOOPBACK,
            )
        except (ImportError, OSError, ValueError, httpx2.InvalidURL) as error:
            raise unusable_surroundings(error) from None

    def close(self) -> None:
        self._client.close()

    def find(self, name: str, model: Named, commit: str | None = None) -> HubCommit:
        """A commit of a model's repository; None: its newest one.

        Args:
            name: ``owner/name``.
            model: How messages name it.
            commit: The commit.

        Raises:
            ModelNotFoundError: There is none, or the account may not read it.
            HubUnreachableError: The hub does not answer.
        """
        url = f"{self._endpoint}/api/models/{name}/revision/{commit or 'main'}"

        def ask() -> HubCommit:
            with self._open(url, model, params={"blobs": "true"}) as response:
                return _listed(response.read(), model)

        return self._repeated(ask, lambda: 0)

    def download(self, name: str, model: Named, commit: str, file: HubFile, folder: Path) -> None:
        """Download a file into ``folder``, unless it is there, and verify it.

        Raises:
            InputFetchError: It arrives altered, or has a name that leads out of the folder.
            ModelNotFoundError: The account may not read it any more.
            HubUnreachableError: The hub does not answer.
        """
        target = safe_path(folder, file.name)
        if target.is_file() and target.stat().st_size == file.bytes:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        part = arriving(target)
        url = f"{self._endpoint}/{name}/resolve/{commit}/{quote(file.name)}"
        for _ in range(VERIFY_ATTEMPTS):
            part.touch()
            self._repeated(
                lambda: self._append(url, model, part, file.bytes), lambda: part.stat().st_size
            )
            if part.stat().st_size == file.bytes and file.is_equal_to(part):
                part.replace(target)
                return
            log.warning("file of a hub arrived altered", model=name, name=file.name)
            part.unlink()
        raise InputFetchError(
            f"{file.name} of {model.what} arrived altered {VERIFY_ATTEMPTS} times from the hub",
            code="network_failed",
        )

    def _append(self, url: str, model: Named, part: Path, size: int) -> None:
        """Download what is missing of a file."""
        with part.open("ab") as out:
            offset = out.tell()
            if offset >= size:
                return
            headers = {"range": f"bytes={offset}-"} if offset else {}
            with self._open(url, model, headers=headers) as response:
                if offset and response.status_code != httpx2.codes.PARTIAL_CONTENT:
                    out.truncate(0)  # a server that ignores ranges sends all of it
                for chunk in response.iter_bytes():
                    self._check()
                    out.write(chunk)

    @contextlib.contextmanager
    def _open(
        self,
        url: str,
        model: Named,
        *,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Iterator[httpx2.Response]:
        try:
            request = self._client.build_request("GET", url, params=params, headers=headers)
            response = self._client.send(request, stream=True)
            with contextlib.closing(response):
                if not response.is_success:
                    raise self._refusal(response, model)
                yield response
        except (httpx2.RequestError, httpx2.InvalidURL) as error:
            why = self._redact(str(error)) or type(error).__name__
            raise _unreachable(model, why) from None

    def _refusal(self, response: httpx2.Response, model: Named) -> DARError:
        """The error for an answer that is not what was requested."""
        what, param = model.what, model.param
        status, code = response.status_code, response.headers.get("x-error-code")
        message = self._redact(response.headers.get("x-error-message", ""))
        if hub_refusals.is_passing(status):
            why = f"HTTP {status}{f': {message}' if message else ''}"
            return _unreachable(model, why)
        if code == "RevisionNotFound":
            gone = f"the hub has {what}, but no longer the commit with which the job was begun"
            return ModelNotFoundError(f"{gone}; submit the job again", param=param)
        if code == "GatedRepo":
            return ModelNotFoundError(hub_refusals.gated(what), param=param)
        is_hidden = status == httpx2.codes.UNAUTHORIZED and not message
        if code == "RepoNotFound" or status == httpx2.codes.NOT_FOUND or is_hidden:
            return ModelNotFoundError(hub_refusals.missing(what), param=param)
        return ModelNotFoundError(hub_refusals.refused(what, status, message or None), param=param)

    def _repeated(self, call: Callable[[], Result], progress: Callable[[], int]) -> Result:
        """Call, and again after failures that may pass; progress in between starts their count."""
        last = progress()

        def has_failed(_: DARError) -> bool:
            nonlocal last
            before, last = last, progress()
            return last <= before

        def pause(seconds: float, error: DARError) -> None:
            log.warning("repeating", call="hub", seconds=round(seconds, 1), error=error.message)
            until = time.monotonic() + seconds
            while (left := until - time.monotonic()) > 0:
                self._check()
                time.sleep(min(0.1, left))

        self._check()
        policy = RetryPolicy(FAILURES, LONGEST_PAUSE_SECONDS, pause, has_failed)
        return call_with_retries(call, policy)


def _unreachable(model: Named, why: str) -> HubUnreachableError:
    return HubUnreachableError(hub_refusals.unreachable(model.what, why), param=model.param)


def _listed(content: bytes, model: Named) -> HubCommit:
    try:
        found = _Repository.model_validate_json(content)
    except ValidationError:
        why = "its answer is not that of a hub; correct HF_ENDPOINT"
        raise _unreachable(model, why) from None
    return HubCommit(
        found.sha,
        tuple(
            HubFile(
                one.rfilename, one.size, None if one.lfs is None else one.lfs.sha256, one.blob_id
            )
            for one in found.siblings
            if READ_BY_TRAINERS.fullmatch(one.rfilename)
        ),
    )


def hub_token(settings: Settings) -> str | None:
    """The token of this worker: that of its settings, else the one of ``hf auth login``."""
    if settings.hf_token is not None:
        return settings.hf_token.get_secret_value()
    stored = read_if_there(Path(constants.HF_TOKEN_PATH))
    return None if stored is None else stored.decode(errors="replace").strip() or None


def library_snapshot(name: str, commit: str, sizes: Mapping[str, int] | None) -> Path | None:
    """A model's folder in the cache of the hub's library; None: it is not there.

    Args:
        name: ``owner/name``.
        commit: The commit.
        sizes: Size of each of its files, which all must be there; None: they are not known.
    """
    folder = _library_folder(name) / "snapshots" / commit
    if sizes is None:
        return folder if (folder / CONFIG).is_file() else None
    is_there = all(size_of(folder / file) == size for file, size in sizes.items())
    return folder if sizes and is_there else None


def library_main(name: str) -> str | None:
    """The newest commit of a model that the hub's library knows; None: it knows none."""
    content = read_if_there(_library_folder(name) / "refs" / "main")
    return None if content is None else content.decode(errors="replace").strip() or None


def _library_folder(name: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
