"""What holds without any setting."""

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from packaging.requirements import Requirement
from pydantic import SecretStr

from dar.errors import ConfigurationError
from dar.settings import Settings
from fakes.live_service import Judge, Live
from service import keys
from service.background.waker import _producer
from worker.app import make_app

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HOLES = {
    "starlette": "1.2.1",  # CVE-2025-62727, CVE-2026-54283: denial of service by ranges and forms
    "python-multipart": "0.0.30",  # the headers of a part of a form are not limited
    "torch": "2.5.1",  # CVE-2025-32434: weights_only=True runs code
    "transformers": "5.2.0",  # CVE-2026-4372, CVE-2026-5241: a config.json runs code of the hub
}
"""The newest version of each library that has a known hole."""


def test_without_settings_the_service_listens_on_this_machine_alone() -> None:
    assert Settings.model_fields["host"].default == "127.0.0.1"
    assert Settings.model_fields["api_key"].default is None
    assert Settings.model_fields["worker_key"].default is None


@pytest.mark.parametrize("name", ["api_key", "worker_key"])
def test_a_key_that_can_be_guessed_is_refused_where_others_reach_the_service(
    tmp_path: Path, live: Live, name: str
) -> None:
    database = live.runtime.database

    def start(host: str, key: str) -> None:
        given = {name: SecretStr(key), "host": host, "home": tmp_path}
        keys.configure(Settings(**given), database)

    for host in ("0.0.0.0", "::", "dar.example.com", "10.0.0.7"):
        with pytest.raises(ConfigurationError, match=f"DAR_{name.upper()}.*16 characters") as said:
            start(host, "letmein")
        assert "letmein" not in said.value.message
    start("0.0.0.0", keys.new_api_key())
    for host in ("127.0.0.1", "127.0.0.9", "::1", "localhost"):
        start(host, "letmein")


def test_neither_documents_nor_other_origins_are_served_to_strangers(
    live: Live, error_of: Callable[..., Any]
) -> None:
    stranger = live.client(None)
    assert error_of(stranger.get("/openapi.json"))["code"] == "missing_api_key"
    for path in ("/docs", "/redoc", "/docs/oauth2-redirect"):
        assert stranger.get(path).status_code == live.http.get(path).status_code == 404
    asks = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    for answer in (
        stranger.options("/v1/files", headers=asks),
        live.http.get("/v1/files", headers={"origin": "https://evil.example"}),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_no_library_with_a_known_hole_may_be_installed() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [Requirement(text) for extra in extras.values() for text in extra]
    pinned = dict(
        re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    )
    for name, newest in HOLES.items():
        found = [one for one in wanted if one.name == name]
        assert found, name
        assert not [one for one in found if one.specifier.contains(newest)], name
        assert all(one.specifier.contains(pinned[name]) for one in found), name


def test_the_brokers_messages_are_json_and_carry_nothing() -> None:
    worker = make_app("redis://127.0.0.1:1/0", cast("Any", None))
    service = _producer("redis://127.0.0.1:1/0")
    for app in (worker, service):
        assert app.conf.accept_content == ["json"]
        assert app.conf.task_serializer == "json"
    assert worker.conf.result_backend is None


def test_a_dead_broker_neither_lifts_nor_closes_a_rate_limit(
    serve: Callable[..., Live], judge: Judge, error_of: Callable[..., Any]
) -> None:
    live = serve(broker_url=SecretStr("redis://127.0.0.1:1/0"))
    body = {"component": {"name": "letters", "url": judge.url}, "light": True}
    answers = [live.http.post("/v1/reward_endpoints/probe", json=body) for _ in range(7)]
    assert [answer.status_code for answer in answers] == [200] * 6 + [429]
    assert error_of(answers[-1])["code"] == "rate_limit_exceeded"
    assert int(answers[-1].headers["retry-after"]) > 0


def test_the_linter_refuses_pickles_and_shells() -> None:
    lint = PROJECT["tool"]["ruff"]["lint"]
    banned = lint["flake8-tidy-imports"]["banned-api"]
    assert {"torch.load", "pickle", "os.environ"} <= set(banned)
    assert {"S", "TID"} <= set(lint["select"])
    assert not {"S301", "S602", "S604", "S605", "S614", "TID251"} & set(lint["ignore"])
