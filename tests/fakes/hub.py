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
LARGE = (".safetensors", ".bin")
"""Ends of the names of files that a hub keeps in its large storage."""


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
        self.commit = COMMIT
        """The newest commit of every repository."""
        self.storage: str | None = None
        """URL to which it redirects requests for files of `LARGE` kinds; None: it sends them."""
        self.cuts: list[int] = []
        """After how many bytes the next answers with large files break off."""
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
            self._send_file(request, "/".join(rest[2:]), files)
        elif rest[:1] == ["tree"]:
            _send_tree(request, files)
        elif not rest or rest[0] == "revision":
            siblings = [_sibling(path, content) for path, content in files.items()]
            request.json(
                {"id": name.removeprefix("datasets/"), "sha": self.commit, "siblings": siblings}
            )
        else:
            _refuse(request, 404, "EntryNotFound", "no such entry")

    def _send_file(self, request: Request, path: str, files: Mapping[str, bytes]) -> None:
        content = files.get(path)
        if content is None:
            request.answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=self.commit)
            return
        if self.storage is not None and path.endswith(LARGE):
            request.answer(b"", 302, location=self.storage + request.path)
            return
        headers = {"ETag": f'"{_oid(content)}"', "X_Repo_Commit": self.commit}
        start = 0
        if "range" in request.headers:
            start = int(request.headers["range"].removeprefix("bytes=").rstrip("-"))
            headers["content_range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        headers["content_length"] = str(len(body))
        if path.endswith(LARGE) and self.cuts:
            headers["connection"] = "close"
            body = body[: self.cuts.pop(0)]
        sent = b"" if request.method == "HEAD" else body
        status = 206 if start else 200
        request.answer(sent, status, "application/octet-stream", **headers)

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


def _send_tree(request: Request, files: Mapping[str, bytes]) -> None:
    request.json(
        [
            {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
            for path, content in files.items()
        ]
    )


def _sibling(path: str, content: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": _oid(content)}
    if path.endswith(LARGE):
        sha256 = hashlib.sha256(content).hexdigest()
        found["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
    return found


def _oid(content: bytes) -> str:
    """Git's digest of a file."""
    blob = f"blob {len(content)}\0".encode() + content
    return hashlib.sha1(blob, usedforsecurity=False).hexdigest()


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
