"""Folders of models: no file of this machine gets into a job through a symbolic link."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from fakes.live_service import Live

SECRET = "not for anybody else"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder beside the installation, with a file in it."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret").write_text(SECRET)
    return folder


def file_link(model: Path, outside: Path) -> str:
    (model / "chat_template.jinja").symlink_to(outside / "secret")
    return "chat_template.jinja"


def relative_link(model: Path, outside: Path) -> str:
    (model / "merges.txt").symlink_to(os.path.relpath(outside / "secret", model))
    return "merges.txt"


def folder_link(model: Path, outside: Path) -> str:
    (model / "additional_chat_templates").symlink_to(outside)
    return "additional_chat_templates"


def deep_link(model: Path, outside: Path) -> str:
    (model / "deep").mkdir()
    (model / "deep" / "way").symlink_to(outside)
    return "deep/way"


def chain_of_links(model: Path, outside: Path) -> str:
    (model / "deep").mkdir()
    (model / "deep" / "way").symlink_to(outside)
    (model / "vocab.json").symlink_to(model / "deep" / "way" / "secret")
    return "vocab.json"


def the_config(model: Path, outside: Path) -> str:
    (outside / "config.json").write_text("{}")
    (model / "config.json").unlink()
    (model / "config.json").symlink_to(outside / "config.json")
    return "config.json"


def dead_link(model: Path, outside: Path) -> str:
    (model / "model.safetensors").symlink_to(outside / "comes later")
    return "model.safetensors"


LINKS = (file_link, relative_link, folder_link, deep_link, chain_of_links, the_config, dead_link)


@pytest.mark.parametrize("link", LINKS)
def test_a_model_with_a_link_out_of_its_folder_is_refused_by_name(
    serve: Callable[..., Live],
    error_of: Callable[[httpx2.Response], dict[str, Any]],
    outside: Path,
    link: Callable[[Path, Path], str],
) -> None:
    live = serve()
    name = link(live.settings.models_path / "base", outside)
    assert live.http.get("/v1/models").json()["data"] == []
    answers = [
        live.http.get("/v1/models/base"),
        live.http.post("/v1/fine_tuning/jobs", json=live.spec()),
    ]
    for answer in answers:
        assert f"{name} in its folder is a symbolic link" in error_of(answer)["message"]
    assert [answer.status_code for answer in answers] == [404, 400]
    assert error_of(answers[1])["param"] == "model"


def test_a_reward_model_with_a_link_out_of_its_folder_is_refused(
    live: Live, error_of: Callable[[httpx2.Response], dict[str, Any]], outside: Path
) -> None:
    judge = live.settings.models_path / "judge"
    judge.mkdir()
    (judge / "config.json").write_text("{}")
    file_link(judge, outside)
    component = {"name": "rm", "kind": "hf_model", "model": "judge"}
    spec = live.spec(dar={"rewards": {"components": [component]}})
    error = error_of(live.http.post("/v1/fine_tuning/jobs", json=spec))
    assert error["param"] == "method.dar.rewards.components[0].model"
    assert "symbolic link" in error["message"]


@pytest.mark.parametrize("link", [file_link, folder_link])
def test_a_link_that_comes_after_the_submission_is_not_sent_to_a_worker(
    live: Live, outside: Path, link: Callable[[Path, Path], str]
) -> None:
    _, lease = live.running()
    name = link(live.settings.models_path / "base", outside)
    for path in ("/inputs", f"/inputs/model/{name}", f"/inputs/model/{name}/secret"):
        answer = lease.http.get(path)
        assert answer.status_code == 400
        assert SECRET not in answer.text
        assert "symbolic link" in answer.text


def test_links_inside_a_folder_and_into_the_cache_of_a_hub_are_followed(
    live: Live, tmp_path: Path
) -> None:
    base = live.settings.models_path / "base"
    (base / "weights").write_text("inside")
    (base / "model.safetensors").symlink_to("weights")
    (base / ".hidden").symlink_to(tmp_path)
    cached = tmp_path / "hub" / "models--owner--name"
    snapshot = cached / "snapshots" / "1a2b"
    for folder in (snapshot, cached / "blobs"):
        folder.mkdir(parents=True)
    (cached / "blobs" / "c0ffee").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/c0ffee")
    (live.settings.models_path / "cached").symlink_to(snapshot)
    assert [model["id"] for model in live.http.get("/v1/models").json()["data"]] == [
        "base",
        "cached",
    ]
    for model, name, content in (
        ("base", "model.safetensors", "inside"),
        ("cached", "config.json", "{}"),
    ):
        _, lease = live.running(model=model)
        assert lease.http.get(f"/inputs/model/{name}").text == content
        lease.post("/release", reason="paused_reward")
