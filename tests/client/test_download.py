"""Downloads: verified, resumable, and never outside their folder."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dar.client import Client
from dar.errors import CheckpointError, ServiceConnectionError

DATA = bytes(range(256)) * 100


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_checkpoint_arrives_whole_and_without_the_optimizer(
    client: Client, trained: Any, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    folder = client.checkpoints.download(
        trained.job_id,
        trained.checkpoint.id,
        tmp_path / "new" / "weights",
        on_bytes=lambda done, total: seen.append((done, total)),
    )
    found = files_in(folder)
    assert found.keys() == {"config.json", "model.safetensors", "MANIFEST.json"}
    assert found["model.safetensors"] == trained.content["model.safetensors"]
    total = sum(len(content) for content in found.values())
    assert seen[-1] == (total, total)
    assert sorted(seen) == seen


def test_the_optimizer_comes_on_demand(client: Client, trained: Any, tmp_path: Path) -> None:
    client.checkpoints.download(
        trained.job_id, trained.checkpoint.id, tmp_path, include_optimizer=True
    )
    found = files_in(tmp_path)
    found.pop("MANIFEST.json")
    assert found == trained.content


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_partial_file_is_continued_or_if_damaged_replaced(
    client: Client, trained: Any, tmp_path: Path, is_damaged: bool
) -> None:
    content = trained.content["model.safetensors"]
    digest = hashlib.sha256(content).hexdigest()
    partial = tmp_path / f".model.safetensors.{digest[:16]}.part"
    partial.write_bytes(bytes(2_000_000) if is_damaged else content[:2_000_000])
    seen: list[int] = []
    client.checkpoints.download(
        trained.job_id,
        trained.checkpoint.id,
        tmp_path,
        on_bytes=lambda done, _: seen.append(done),
    )
    assert (tmp_path / "model.safetensors").read_bytes() == content
    assert not partial.exists()
    assert any(100_000 < done < 1_900_000 for done in seen) == is_damaged  # fetched from the start


def test_what_is_there_and_right_is_not_fetched_again(
    client: Client, trained: Any, tmp_path: Path
) -> None:
    client.checkpoints.download(trained.job_id, trained.checkpoint.id, tmp_path)
    (tmp_path / "config.json").write_bytes(b"[]")
    before = (tmp_path / "model.safetensors").stat().st_mtime_ns
    client.checkpoints.download(trained.job_id, trained.checkpoint.id, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == trained.content["config.json"]
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == before


@pytest.fixture
def listing() -> Callable[..., dict[str, Any]]:
    def make(name: str = "model.safetensors", data: bytes = DATA) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        return {
            "id": "ckpt-1",
            "object": "fine_tuning.job.checkpoint",
            "created_at": 1,
            "fine_tuning_job_id": "ftjob-1",
            "fine_tuned_model_checkpoint": "m",
            "step_number": 1,
            "metrics": {},
            "kind": "full",
            "bytes": len(data),
            "sha256": "0" * 64,
            "has_optimizer": False,
            "files": [{"name": name, "bytes": len(data), "sha256": digest}],
        }

    return make


def test_a_broken_connection_is_taken_up_where_it_broke(
    scripted: Callable[..., Any],
    answer: Any,
    listing: Any,
    tmp_path: Path,
    quick: None,
) -> None:
    rest = answer(206, raw=DATA[9000:])
    server = scripted(answer(body=listing()), answer(raw=DATA[:9000], declared_bytes=25_600), rest)
    with Client("key", server.url) as client:
        client.checkpoints.download("ftjob-1", "ckpt-1", tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == DATA
    assert server.requests[-1][1]["range"] == "bytes=9000-"
    assert "if-range" not in server.requests[-1][1], "a store knows another ETag than the service"


@pytest.mark.parametrize("wrong", [DATA[:-1] + b"?", DATA + b"more", DATA[:-1]])
def test_a_wrong_content_is_not_kept(
    scripted: Callable[..., Any], answer: Any, listing: Any, tmp_path: Path, wrong: bytes
) -> None:
    server = scripted(answer(body=listing()), answer(raw=wrong))
    with Client("key", server.url) as client, pytest.raises(CheckpointError, match="SHA-256"):
        client.checkpoints.download("ftjob-1", "ckpt-1", tmp_path)
    assert not files_in(tmp_path)


@pytest.mark.parametrize("name", ["../up", "/etc/x", "a/b/c", ".hidden", "a/../../x", "a\\b", ""])
def test_a_name_that_leads_elsewhere_is_refused(
    scripted: Callable[..., Any], answer: Any, listing: Any, tmp_path: Path, name: str
) -> None:
    server = scripted(answer(body=listing(name)), answer(raw=DATA))
    folder = tmp_path / "a" / "folder"
    with (
        Client("key", server.url) as client,
        pytest.raises(CheckpointError, match="not a valid name"),
    ):
        client.checkpoints.download("ftjob-1", "ckpt-1", folder)
    assert not files_in(tmp_path)


def test_a_link_out_of_the_folder_is_not_followed(
    scripted: Callable[..., Any], answer: Any, listing: Any, tmp_path: Path
) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (folder / "resume").symlink_to(outside)
    server = scripted(answer(body=listing("resume/x")), answer(raw=DATA))
    with (
        Client("key", server.url) as client,
        pytest.raises(CheckpointError, match="links to a place outside"),
    ):
        client.checkpoints.download("ftjob-1", "ckpt-1", folder, include_optimizer=True)
    assert not files_in(outside)


def test_a_download_that_cannot_be_finished_leaves_its_part(
    scripted: Callable[..., Any], answer: Any, listing: Any, tmp_path: Path, quick: None
) -> None:
    first = answer(raw=DATA[:9000], declared_bytes=25_600)
    server = scripted(answer(body=listing()), first, answer(0))
    with Client("key", server.url) as client, pytest.raises(ServiceConnectionError):
        client.checkpoints.download("ftjob-1", "ckpt-1", tmp_path)
    (name,) = files_in(tmp_path)
    assert name.endswith(".part")
    assert files_in(tmp_path)[name] == DATA[:9000]
