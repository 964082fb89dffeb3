"""A model hub on loopback: it serves repositories of files, some of them gated or private."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import constants
from transformers.utils import hub as transformers_hub

from fakes.loopback import LoopbackServer, Request

COMMIT = "b" * 40
GATED = "Access to this repository is restricted. You must accept its conditions to access it."
INVALID = "Invalid credentials in Authorization header"


def files_in(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path in it."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


class Hub(LoopbackServer):
    """Answers reads as the hub does; ``datasets/owner/name`` is a data set, others are models.

    Args:
        repositories: The files of each repository.
        gated: Repositories that only accounts that accepted their conditions may read.
        private: Repositories that others do not see.
        readers: Tokens, and what the account of each may read of these two kinds.
    """

    def __init__(
        self,
        repositories: Mapping[str, Mapping[str, bytes]],
        *,
        gated: frozenset[str] = frozenset(),
        private: frozenset[str] = frozenset(),
        readers: Mapping[str, frozenset[str]] | None = None,
    ) -> None:
        self.repositories = repositories
        self.gated = gated
        self.private = private
        self.readers = dict(readers or {})
        self.complaint = INVALID
        """What it says about a token of no account."""
        super().__init__(self._reply)

    @property
    def endpoint(self) -> str:
        """What ``HF_ENDPOINT`` is for it."""
        return self.url.rstrip("/")

    def asked(self) -> dict[tuple[str, str | None], int]:
        """How often each repository was read, by its name and the token of the request."""
        found: dict[tuple[str, str | None], int] = {}
        for request in self.requests:
            name, _ = self._named(request.path)
            token = _token(request)
            if name is not None:
                found[name, token] = found.get((name, token), 0) + 1
        return found

    def _named(self, path: str) -> tuple[str | None, list[str]]:
        """The repository in a path, and what follows its name."""
        parts = path.strip("/").removeprefix("api/").removeprefix("models/").split("/")
        size = 3 if parts[0] == "datasets" else 2
        return ("/".join(parts[:size]) if len(parts) >= size else None), parts[size:]

    def _reply(self, request: Request) -> None:
        name, rest = self._named(request.path)
        if name is None or request.method not in ("GET", "HEAD"):
            _refuse(request, 404, "NotFound", "no such page")
            return
        if (refusal := self._refusal(name, _token(request))) is not None:
            _refuse(request, *refusal)
            return
        files = self.repositories[name]
        if rest[:1] == ["resolve"]:
            _send_file(request, files.get("/".join(rest[2:])))
        elif rest[:1] == ["tree"]:
            _send_tree(request, files)
        elif not rest or rest[0] == "revision":
            siblings = [{"rfilename": path} for path in files]
            request.json(
                {"id": name.removeprefix("datasets/"), "sha": COMMIT, "siblings": siblings}
            )
        else:
            _refuse(request, 404, "EntryNotFound", "no such entry")

    def _refusal(self, name: str, token: str | None) -> tuple[int, str, str] | None:
        if token is not None and token not in self.readers:
            return 401, "", self.complaint
        is_reader = token is not None and name in self.readers[token]
        if name not in self.repositories or (name in self.private and not is_reader):
            return (401 if token is None else 404), "RepoNotFound", "Repository not found"
        if name in self.gated and not is_reader:
            return (401 if token is None else 403), "GatedRepo", GATED
        return None


def _token(request: Request) -> str | None:
    given = request.headers.get("authorization")
    return None if given is None else given.removeprefix("Bearer ")


def _refuse(request: Request, status: int, code: str, message: str) -> None:
    headers = {"X_Error_Code": code} if code else {}
    request.answer(b"", status, X_Error_Message=message, **headers)


def _send_file(request: Request, content: bytes | None) -> None:
    if content is None:
        request.answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        return
    headers: dict[str, Any] = {
        "ETag": f'"{_oid(content)}"',
        "X_Repo_Commit": COMMIT,
        "content_length": str(len(content)),
    }
    body = b"" if request.method == "HEAD" else content
    request.answer(body, 200, "application/octet-stream", **headers)


def _send_tree(request: Request, files: Mapping[str, bytes]) -> None:
    request.json(
        [
            {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
            for path, content in files.items()
        ]
    )


def _oid(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


def use_hub(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Path) -> None:
    """Have the libraries of this process use a hub, as with ``HF_ENDPOINT`` in their environment.

    They read the variables when they are imported, which another test has done.
    """
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for module, name, value in (
        (constants, "ENDPOINT", endpoint),
        (constants, "HUGGINGFACE_CO_URL_TEMPLATE", template),
        (constants, "HF_HUB_CACHE", str(cache / "hub")),
        (constants, "HF_TOKEN_PATH", str(cache / "token")),
        (constants, "HF_HUB_OFFLINE", False),
        (transformers_hub, "_hf_api", None),
        (datasets.config, "HF_ENDPOINT", endpoint),
        (datasets.config, "HF_HUB_OFFLINE", False),
        (datasets.config, "HF_DATASETS_CACHE", cache / "datasets"),
    ):
        monkeypatch.setattr(module, name, value)
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "DAR_HF_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
