"""Keys, retries and errors of the SDK."""

import json
import math
import re
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from pydantic import HttpUrl, SecretStr, TypeAdapter

import dar
from dar.client import Client
from dar.client.arguments import opened
from dar.client.download import Download
from dar.errors import (
    ConfigurationError,
    ConflictError,
    DARError,
    InvalidRequestError,
    RateLimitError,
    ServiceConnectionError,
    ServiceUnavailableError,
)
from dar.protocol.checkpoints import CheckpointFile
from dar.rewards.http.endpoint import default_tls
from dar.settings import CERTIFICATES, PROXIES
from fakes.loopback import LoopbackServer, Manner, Request

EMPTY = {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("DAR_API_KEY", "DAR_BASE_URL", "DAR_HOST", "DAR_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DAR_HOME", str(tmp_path))
    return tmp_path


def test_the_key_of_the_installation_is_found(no_settings: Path) -> None:
    (no_settings / "api_key").write_text("dar-sk-1\n")
    with dar.Client() as client:
        assert client.base_url == "http://127.0.0.1:8321"


def test_a_missing_key_says_what_to_do(no_settings: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"DAR_API_KEY.*dar up"):
        Client()


KEY = "dar-sk-abcdefgh-" + 43 * "x"
LINE_IN_IT = KEY[:20] + "\n" + KEY[20:]


@pytest.mark.parametrize("key", [KEY, "operators-own-key", "sk-" + 20 * "a", "hf_" + 20 * "b"])
def test_a_key_in_the_place_of_the_url_is_not_shown(key: str) -> None:
    with pytest.raises(ConfigurationError, match="the key first and then the URL") as caught:
        Client("http://127.0.0.1:8321", key)
    assert key not in "".join(traceback.format_exception(caught.value))


def test_a_key_given_as_the_url_alone_is_not_shown() -> None:
    with pytest.raises(ConfigurationError, match="is not a URL like") as caught:
        Client("key", KEY)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "url", "message"),
    [
        (KEY.encode(), "http://h", "api_key is of the type bytes"),
        (5, "http://h", "api_key is of the type int"),
        (KEY, Path("x"), "base_url is of the type PosixPath"),
        (KEY, b"http://h", "base_url is of the type bytes"),
    ],
)
def test_an_argument_of_another_type_is_named(key: Any, url: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        Client(key, url)
    assert KEY not in str(caught.value)


def test_a_secret_of_pydantic_and_a_url_of_httpx_are_taken() -> None:
    pydantics = TypeAdapter(HttpUrl).validate_python("http://127.0.0.1:9")
    urls: list[Any] = [httpx2.URL("http://127.0.0.1:9/v1"), pydantics]
    for url in urls:
        with Client(SecretStr(KEY), url) as client:
            assert client.base_url == "http://127.0.0.1:9"


def test_a_path_that_begins_with_a_tilde_is_in_the_home_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_bytes(b"{}")
    content, name = opened("~/rows.jsonl")
    with content:
        assert (content.read(), name) == (b"{}", "rows.jsonl")


@pytest.mark.parametrize("end", ["\n", "\r\n", " ", "\t"])
def test_a_line_break_after_the_key_is_not_sent(
    scripted: Callable[..., Any],
    answer: Any,
    no_settings: Path,
    monkeypatch: pytest.MonkeyPatch,
    end: str,
) -> None:
    server = scripted(answer(body=EMPTY), answer(body=EMPTY))
    with Client(KEY + end, server.url) as client:
        assert list(client.models.list()) == []
    monkeypatch.setenv("DAR_API_KEY", KEY + end)
    with Client(base_url=server.url) as client:
        assert list(client.models.list()) == []
    assert [sent[1]["authorization"] for sent in server.requests] == 2 * [f"Bearer {KEY}"]


@pytest.mark.parametrize("key", [LINE_IN_IT, KEY + "é", 5 * KEY, KEY + "\0", "my " + KEY, "\n"])
@pytest.mark.parametrize("way", ["argument", "variable", "file"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(
    no_settings: Path, monkeypatch: pytest.MonkeyPatch, key: str, way: str
) -> None:
    if way == "variable":
        if "\0" in key:
            pytest.skip("no variable can hold it")
        monkeypatch.setenv("DAR_API_KEY", key)
    elif way == "file":
        (no_settings / "api_key").write_text(key)
    with pytest.raises(ConfigurationError, match="key") as caught:
        Client(key if way == "argument" else None, "http://127.0.0.1:9")
    shown = "".join(traceback.format_exception(caught.value))
    assert "x" * 8 not in shown
    assert "abcdefgh" not in shown


def test_an_idempotency_key_that_no_header_can_carry_is_refused(quick: None) -> None:
    with (
        Client("key", "http://127.0.0.1:9") as client,
        pytest.raises(ConfigurationError, match="idempotency-key"),
    ):
        client.jobs.create(model="m", training_file="file-1", idempotency_key="été\n")


@pytest.mark.parametrize(
    "url",
    [
        *("localhost:8321", "ftp://x", "http://", "nonsense", "http://a..b", "http://[::1"),
        f"http://{64 * 'a'}.example",
    ],
)
def test_a_base_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="base_url"):
        Client("key", url)


def test_openais_base_url_works_too(scripted: Callable[..., Any], answer: Any) -> None:
    server = scripted(answer(body=EMPTY))
    with Client("key", f"{server.url}/v1/") as client:
        assert list(client.models.list()) == []
    assert server.requests[0][0] == "GET /v1/models"
    assert server.requests[0][1]["authorization"] == "Bearer key"


def test_an_unreachable_service_is_named_with_what_to_do(quick: None) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with Client("key", url) as client, pytest.raises(ServiceConnectionError) as caught:
            client.jobs.list().page()
    assert url in caught.value.message
    assert "dar up" in caught.value.message


def test_a_client_that_is_closed_during_a_request_does_not_blame_the_service(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = Client("key", "http://127.0.0.1:9", max_retries=0)

    def broken(*_: Any, **__: Any) -> Any:
        client.close()
        raise httpx2.ReadError("[Errno 9] Bad file descriptor")

    monkeypatch.setattr("httpx2.HTTPTransport.handle_request", broken)
    with pytest.raises(ServiceConnectionError, match="this client has been closed"):
        client.models.retrieve("any")


def test_the_traceback_of_an_unreachable_service_is_short_and_ends_with_what_to_do(
    quick: None,
) -> None:
    with (
        Client("key", "http://127.0.0.1:9") as client,
        pytest.raises(ServiceConnectionError) as caught,
    ):
        client.jobs.list().page()
    shown = traceback.format_exception(caught.value)
    assert isinstance(caught.value.__context__, httpx2.ConnectError)
    lines = "".join(shown).splitlines()
    assert len(lines) <= 16
    assert "httpx" not in "".join(shown)
    assert lines[-1].startswith("dar.errors.ServiceConnectionError: cannot reach the DAR service")


@pytest.mark.parametrize("status", [0, 408, 429, 500, 503])
def test_passing_failures_are_tried_again(
    scripted: Callable[..., Any], answer: Any, quick: None, status: int
) -> None:
    server = scripted(answer(status), answer(status), answer(body=EMPTY))
    with Client("key", server.url) as client:
        assert client.jobs.list().page().data == []
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("status", "headers", "count"),
    [
        (409, {}, 1),
        (400, {}, 1),
        (409, {"x-should-retry": "true"}, 3),
        (503, {"x-should-retry": "false"}, 1),
    ],
)
def test_the_service_says_what_is_worth_a_retry(
    scripted: Callable[..., Any],
    answer: Any,
    quick: None,
    status: int,
    headers: dict[str, str],
    count: int,
) -> None:
    server = scripted(answer(status, headers=headers))
    with Client("key", server.url) as client, pytest.raises(DARError):
        client.jobs.list().page()
    assert len(server.requests) == count


def test_retries_can_be_turned_off(scripted: Callable[..., Any], answer: Any) -> None:
    server = scripted(answer(503))
    with (
        Client("key", server.url, max_retries=0) as client,
        pytest.raises(ServiceUnavailableError),
    ):
        client.jobs.list().page()
    assert len(server.requests) == 1


@pytest.mark.parametrize("headers", [{"retry-after-ms": "150"}, {"retry-after": "0.15"}])
def test_the_wait_that_is_asked_for_is_kept(
    scripted: Callable[..., Any], answer: Any, quick: None, headers: dict[str, str]
) -> None:
    server = scripted(answer(429, headers=headers), answer(body=EMPTY))
    started = time.monotonic()
    with Client("key", server.url) as client:
        client.jobs.list().page()
    assert 0.14 < time.monotonic() - started < 5


@pytest.mark.parametrize("value", ["-1", "soon", "nan", "inf", ""])
def test_a_nonsensical_wait_is_not_kept(
    scripted: Callable[..., Any], answer: Any, quick: None, value: str
) -> None:
    server = scripted(answer(429, headers={"retry-after": value}), answer(body=EMPTY))
    started = time.monotonic()
    with Client("key", server.url) as client:
        client.jobs.list().page()
    assert time.monotonic() - started < 5


def test_one_idempotency_key_covers_all_retries_of_a_submission(
    scripted: Callable[..., Any], answer: Any, quick: None
) -> None:
    body = {"error": {"message": "busy", "type": "x", "param": None, "code": "busy"}}
    server = scripted(answer(429, body=body))
    with Client("key", server.url) as client:
        for _ in range(2):
            with pytest.raises(RateLimitError, match="busy"):
                client.jobs.create(model="m")
    keys = [headers["idempotency-key"] for _, headers, _ in server.requests]
    assert len(keys) == 6
    assert len(set(keys[:3])) == len(set(keys[3:])) == 1
    assert len(set(keys)) == 2
    assert {sent for _, _, sent in server.requests} == {json.dumps({"model": "m"}).encode()}


def test_an_upload_is_sent_whole_on_every_attempt(
    scripted: Callable[..., Any], answer: Any, quick: None, prompts: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(prompts)
    server = scripted(answer(500), answer(400))
    with Client("key", server.url) as client, pytest.raises(InvalidRequestError):
        client.files.create(path)
    assert len(server.requests) == 2
    assert all(prompts in sent and b"fine-tune" in sent for _, _, sent in server.requests)


def test_an_error_keeps_everything_that_the_service_said(
    scripted: Callable[..., Any], answer: Any
) -> None:
    error = {
        "message": "not now",
        "type": "conflict_error",
        "param": "p",
        "code": "finer_code",
        "errors": [{"param": "a.b", "message": "m", "code": "c", "row": 3}],
        "request_id": "req-1",
    }
    server = scripted(answer(409, body={"error": error}))
    with Client("key", server.url) as client, pytest.raises(ConflictError) as caught:
        client.jobs.cancel("ftjob-1")
    raised = caught.value
    assert (raised.message, raised.param, raised.error_code) == ("not now", "p", "finer_code")
    assert raised.request_id == "req-1"
    assert (raised.problems[0].row, raised.problems[0].param) == (3, "a.b")


def test_a_stranger_on_the_port_is_recognised(scripted: Callable[..., Any], answer: Any) -> None:
    server = scripted(answer(raw=b"<html>hello</html>"))
    with Client("key", server.url) as client, pytest.raises(DARError, match="is it a DAR service"):
        client.jobs.retrieve("ftjob-1")


def test_an_id_cannot_leave_its_place_in_the_path(
    scripted: Callable[..., Any], answer: Any
) -> None:
    server = scripted(answer(404))
    with Client("key", server.url) as client, pytest.raises(DARError):
        client.jobs.retrieve("../files/x?y=1")
    assert server.requests[0][0] == "GET /v1/fine_tuning/jobs/..%2Ffiles%2Fx%3Fy%3D1"


def some_job(status: str, **values: Any) -> dict[str, Any]:
    return {
        **dict.fromkeys(
            ("started_at", "finished_at", "estimated_finish", "status_detail", "status_message")
        ),
        **dict.fromkeys(
            (
                "fine_tuned_model",
                "validation_file",
                "suffix",
                "metadata",
                "method",
                "error",
                "forecast",
            )
        ),
        **dict.fromkeys(("integrations", "trained_tokens")),
        "id": "ftjob-1",
        "object": "fine_tuning.job",
        "created_at": 1,
        "model": "m",
        "training_file": "f",
        "result_files": [],
        "organization_id": "o",
        "seed": 1,
        "hyperparameters": {},
        "attempt": 1,
        "actions": [],
        "links": {},
        "progress": {"step": 1, "total_steps": 2, "percent": 50.0, "tokens": 1},
        "status": status,
        **values,
    }


@pytest.mark.parametrize(("kind", "ended"), [("http", "succeeded"), ("builtin", "paused")])
def test_waiting_outlasts_a_pause_only_where_the_service_ends_it(
    scripted: Callable[..., Any],
    answer: Any,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    ended: str,
) -> None:
    method = {"type": "dar", "dar": {"rewards": {"components": [{"kind": kind}]}}}
    paused = some_job("paused", status_detail="reward", status_message="HTTP 503", method=method)
    waits = some_job("running", status_detail="waiting_for_reward", status_message="slow")
    over = some_job("succeeded")
    server = scripted(*(answer(body=body) for body in (waits, waits, paused, paused, over)))
    with Client("key", server.url, max_retries=0) as client:
        assert client.jobs.wait("ftjob-1", poll_seconds=0.01).status == ended
    assert caplog.messages == [
        "job ftjob-1 is running (waiting_for_reward): slow",
        "job ftjob-1 is paused (reward): HTTP 503",
    ]


def test_waiting_survives_a_restart_of_the_service(
    scripted: Callable[..., Any], answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, over = some_job("running"), some_job("succeeded")
    server = scripted(answer(body=running), answer(0), answer(503), answer(body=over))
    with Client("key", server.url, max_retries=0) as client:
        assert client.jobs.wait("ftjob-1", poll_seconds=0.01).status == "succeeded"
        monkeypatch.setattr("dar.client.waiting.OUTAGE_SECONDS", 0.0)
        server.answers[:] = [answer(503)]
        with pytest.raises(ServiceUnavailableError):
            client.jobs.wait("ftjob-1", poll_seconds=0.01)


def redirected(request: Request, place: str) -> None:
    request.answer(b"", 307, location=place)


MANNERS: dict[str, Manner] = {
    "gzip that is none": lambda one: one.answer(b"none", content_encoding="gzip"),
    "an error in gzip that is none": lambda one: one.answer(b"none", 500, content_encoding="gzip"),
    "redirects without an end": lambda one: redirected(one, one.target),
    "a redirect to no host": lambda one: redirected(one, "http://a..b/"),
    "a redirect to no URL": lambda one: redirected(one, "http://[::1"),
    "a redirect to another scheme": lambda one: redirected(one, "ftp://x/"),
    "an error too deep to read": lambda one: one.answer(b"[" * 100_000, 500),
    "an error of other kinds": lambda one: one.json(
        {"error": {"message": 5, "param": [], "code": {}, "errors": 7, "request_id": {}}}, 400
    ),
    "problems of other kinds": lambda one: one.json(
        {"error": {"errors": [7, {"row": "x", "param": 1, "message": None}]}}, 400
    ),
}
"""What a proxy in front of a service may answer."""


@pytest.mark.parametrize("manner", MANNERS)
@pytest.mark.parametrize("ask", ["retrieve", "wait", "download"])
def test_whatever_answers_the_error_is_one_of_the_sdk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ask: str, manner: str
) -> None:
    monkeypatch.setattr("dar.client.waiting.OUTAGE_SECONDS", -1.0)
    files = [CheckpointFile(name="a.bin", bytes=5, sha256="0" * 64)]
    with (
        LoopbackServer(MANNERS[manner]) as server,
        Client("key", server.at(""), max_retries=0) as client,
    ):
        calls: dict[str, Callable[[], object]] = {
            "retrieve": lambda: client.jobs.retrieve("any"),
            "wait": lambda: client.jobs.wait("any"),
            "download": Download(client.jobs._transport, "/x", tmp_path, files, None).run,
        }
        with pytest.raises(DARError) as caught:
            calls[ask]()
    assert client.base_url in caught.value.message or caught.value.status in {400, 500}


def test_an_error_that_repeats_the_key_does_not_show_it() -> None:
    def echo(request: Request) -> None:
        said = f"I got {request.headers['authorization']}"
        problem = {"message": said, "param": said, "code": "x"}
        request.json({"error": {"message": said, "param": said, "errors": [problem]}}, 400)

    with (
        LoopbackServer(echo) as server,
        Client(KEY, server.at("")) as client,
        pytest.raises(InvalidRequestError, match="I got Bearer") as caught,
    ):
        client.jobs.retrieve("any")
    shown = f"{caught.value!r} {caught.value.message} {caught.value.param} {caught.value.problems}"
    assert KEY[-43:] not in shown


BAD_SURROUNDINGS = [
    ("ALL_PROXY", "socks5://user:pr0xyP4ss@127.0.0.1:1", "ALL_PROXY"),
    ("HTTP_PROXY", "http://user:pr0xyP4ss@[::1", "HTTP_PROXY"),
    ("https_proxy", "ftp://user:pr0xyP4ss@h", "https_proxy"),
    ("HTTP_PROXY", "http://user:pr0xyP4ss@h:port", "HTTP_PROXY"),
    ("SSL_CERT_FILE", "/nonexistent.pem", "SSL_CERT_FILE (/nonexistent.pem)"),
    ("SSL_CERT_FILE", __file__, f"SSL_CERT_FILE ({__file__})"),
]
"""Variables of other programs that no HTTP client can use."""


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*PROXIES, *CERTIFICATES):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(("name", "value", "said"), BAD_SURROUNDINGS)
def test_a_proxy_or_certificates_that_cannot_be_used_are_named(
    bare: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    bare.setenv(name, value)
    with pytest.raises(ConfigurationError) as caught:
        Client("key", "https://192.0.2.1:9")
    assert said in caught.value.message
    assert "pr0xyP4ss" not in caught.value.message


def test_a_proxy_whose_host_cannot_exist_is_a_failed_connection(bare: pytest.MonkeyPatch) -> None:
    bare.setenv("HTTPS_PROXY", "http://a..b:1")
    with (
        Client("key", "https://192.0.2.1:9", max_retries=0) as client,
        pytest.raises(ServiceConnectionError, match="a host on the way is not valid"),
    ):
        client.jobs.retrieve("any")


@pytest.mark.parametrize("name", ["SSL_CERT_FILE"])
def test_reward_sources_name_certificates_that_cannot_be_loaded(
    bare: pytest.MonkeyPatch, name: str
) -> None:
    bare.setenv(name, "/nonexistent.pem")
    default_tls.cache_clear()
    with pytest.raises(ConfigurationError, match=f"{name} .*nonexistent"):
        default_tls()


@pytest.mark.parametrize("extra", ["?x=1", "?", "#part", "#"])
def test_a_base_url_with_more_than_a_host_and_a_path_is_refused(extra: str) -> None:
    with pytest.raises(
        ConfigurationError, match=r"base_url 'http://h:1/p.*has a user name, a query"
    ):
        Client("key", f"http://h:1/p{extra}")


@pytest.mark.parametrize(
    "url", ["http://me:p4ssw0rdX@h:1", "http://p4ssw0rdX@h", "ftp://a:p4ssw0rdX@h"]
)
def test_a_password_in_a_base_url_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ConfigurationError, match="base_url") as caught:
        Client("key", url)
    assert "p4ssw0rdX" not in caught.value.message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("timeout", value) for value in (None, math.nan, math.inf, -1, 0, "5", True, 1e300)),
        *(("max_retries", value) for value in (-1, 1.5, "2", None, True)),
    ],
)
def test_an_argument_of_the_client_that_is_out_of_range_is_refused(name: str, value: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=re.escape(f"{name} is {value!r}, but it must be a")
    ):
        Client("key", "http://127.0.0.1:9", **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("poll_seconds", value) for value in (-1, math.nan, math.inf, "1", None)),
        *(("timeout_seconds", value) for value in (-1, math.nan, "1", True)),
        ("on_pause", "bogus"),
        ("on_pause", None),
    ],
)
def test_an_argument_of_a_wait_that_is_out_of_range_is_refused(name: str, value: Any) -> None:
    with (
        Client("key", "http://127.0.0.1:9", max_retries=0) as client,
        pytest.raises(ConfigurationError, match=re.escape(f"{name} is {value!r}, but it must be ")),
    ):
        client.jobs.wait("any", **{name: value})


FAILING: dict[str, Manner] = {
    "a proxy's 502": lambda one: one.answer(b"<html>", 502, "text/html"),
    "a proxy's 504": lambda one: one.answer(b"", 504),
    "too many requests": lambda one: one.answer(b"", 429, retry_after_ms="1"),
    "503": lambda one: one.answer(b"", 503, retry_after_ms="1"),
    "500": lambda one: one.answer(b"", 500),
    "no answer": lambda one: one.reset(),
    "damaged": lambda one: one.answer(b"none", content_encoding="gzip"),
}


@pytest.mark.parametrize("failing", FAILING)
def test_waiting_outlasts_every_failure_that_may_pass(failing: str) -> None:
    def answer(request: Request) -> None:
        if request.number <= 5:
            FAILING[failing](request)
        else:
            request.json(some_job("succeeded"))

    with (
        LoopbackServer(answer) as server,
        Client("key", server.at(""), max_retries=0) as client,
    ):
        assert client.jobs.wait("any", poll_seconds=0.001).status == "succeeded"


@pytest.mark.parametrize(
    "manner",
    [
        lambda one: one.answer(b"<html>log in</html>", 200, "text/html"),
        lambda one: one.answer(b"", 404),
        lambda one: one.answer(b"", 503, x_should_retry="false"),
    ],
)
def test_waiting_ends_at_once_with_a_failure_that_stays(manner: Manner) -> None:
    asked: list[Request] = []
    with (
        LoopbackServer(lambda one: (asked.append(one), manner(one))) as server,
        Client("key", server.at(""), max_retries=0) as client,
        pytest.raises(DARError),
    ):
        client.jobs.wait("any", poll_seconds=0.001)
    assert len(asked) == 1
