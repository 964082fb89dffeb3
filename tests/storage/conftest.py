"""Storages of both kinds: a folder, and a bucket of a real S3 server."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dar.settings import load_settings
from fakes.seaweed import SERVICE, Identity, SeaweedFS
from service.storage.opening import open_storage
from service.storage.storage import Storage


@pytest.fixture(params=["folder", "bucket"])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


Place = Callable[[str], str]


@pytest.fixture
def place(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    """For a kind of storage: the URL of an empty one; the environment has the keys to it."""

    def make(kind: str) -> str:
        if kind == "folder":
            return str(tmp_path / "stored")
        seaweed: SeaweedFS = request.getfixturevalue("seaweed")
        use(monkeypatch, seaweed)
        return seaweed.url()

    return make


def use(
    monkeypatch: pytest.MonkeyPatch,
    seaweed: SeaweedFS,
    identity: Identity = SERVICE,
    endpoint: str | None = None,
) -> None:
    """Give this process the keys of a bucket."""
    for name, value in seaweed.environment(identity, endpoint).items():
        monkeypatch.setenv(name, value)


def opened(url: str) -> Storage:
    """The storage at a URL, not prepared."""
    return open_storage(load_settings(storage_url=url))


@pytest.fixture
def storage(kind: str, place: Place) -> Storage:
    """An empty storage that is ready."""
    made = opened(place(kind))
    made.prepare()
    return made
