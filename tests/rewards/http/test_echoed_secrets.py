"""A service that repeats the credentials it was sent, wherever its texts can appear: no fragment
of them is shown, in no case and no encoding, and no character that a terminal or a log obeys.
"""

import base64
import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import orjson
import pytest
from typer.testing import CliRunner

from dar.cli.main import app
from dar.errors import RewardError, RewardMisconfiguredError
from dar.protocol.reward_spec import RewardTimeouts
from dar.rewards.base import RewardContext
from dar.rewards.http.redaction import FRAGMENT
from dar.rewards.http_reward import HttpOptions, HttpReward
from dar.rewards.protocols.openai_grader import OpenAIGraderProtocol
from dar.rewards.scoring.scorer import RewardScorer, WeightedSource
from dar.rewards.scoring.step_report import StepObserver
from fakes.reward_server import RewardServer, ScoreRequest
from fakes.reward_types import MakeSamples

TOKEN = "Tq7-Zw4.Xk9_Vb2~Ns6/Lm3+Rd8"
ESCAPES = "\x1b[31m\n\u202e\u2066\x07"
"""Colours, a line break, a reversal of the direction of writing, a bell."""
DISGUISES: dict[str, Callable[[str], str]] = {
    "as it is": lambda token: token,
    "in capitals": str.upper,
    "its end": lambda token: f"…{token[9:]}",
    "quoted": lambda token: quote(token, safe=""),
    "encoded": lambda token: base64.b64encode(f"x{token}".encode()).decode(),
    "spread out": "\0".join,
    "as references": lambda token: "".join(f"&#{ord(ch)};" for ch in token),
}
Place = Callable[[ScoreRequest, str], None]


def _results(request: ScoreRequest, **fields: Any) -> bytes:
    results = [{"id": name, **fields} for name in request.ids]
    return orjson.dumps({"request_id": request.request_id, "results": results})


def _accepted(request: ScoreRequest, **fields: Any) -> None:
    content = {"request_id": request.request_id, "status": "accepted", **fields}
    request.answer(orjson.dumps(content), "202 Accepted")


def _polled(answer: Callable[[ScoreRequest, ScoreRequest, str], None]) -> Place:
    posts: list[ScoreRequest] = []

    def place(request: ScoreRequest, echo: str) -> None:
        if request.method == "POST":
            posts.append(request)
            _accepted(request, poll_url="/polled")
        else:
            answer(request, posts[-1], echo)

    return place


def _header_safe(text: str) -> str:
    return "".join(ch if " " <= ch <= "~" else "?" for ch in text)


PLACES: dict[str, Place] = {
    "error page": lambda r, echo: r.answer(echo.encode(), 422, "text/html"),
    "rejection": lambda r, echo: r.answer(echo.encode(), 401, "text/html"),
    "rejection in UTF-16": lambda r, echo: r.answer(echo.encode("utf-16"), 401, "text/html"),
    "rejection in UTF-32": lambda r, echo: r.answer(echo.encode("utf-32-le"), 401, "text/html"),
    "passing error": lambda r, echo: r.answer(echo.encode(), 500, "text/html"),
    "reason phrase": lambda r, echo: r.answer(b"{}", f"503 {_header_safe(echo)}"),
    "content type": lambda r, echo: r.answer(b"{}", 200, _header_safe(echo)),
    "content encoding": lambda r, echo: r.answer(b"{}", content_encoding=_header_safe(echo)),
    "another header": lambda r, echo: r.answer(
        _results(r, reward=1), x_echo=_header_safe(f"Bearer {echo}")
    ),
    "status line": lambda r, echo: r.send(f"HTTP/1.1 {echo}\r\n\r\n".encode()),
    "no header": lambda r, echo: r.send(
        f"HTTP/1.1 200 OK\r\n{_header_safe(echo)}\r\n\r\n".encode()
    ),
    "chunk size": lambda r, echo: r.send(
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
        + f"{_header_safe(echo)}\r\n".encode()
    ),
    "no JSON": lambda r, echo: r.answer(echo.encode()),
    "request id": lambda r, echo: r.answer(orjson.dumps({"request_id": echo, "rewards": [1]})),
    "sample id": lambda r, echo: r.answer(
        orjson.dumps({"request_id": r.request_id, "results": [{"id": echo, "reward": 1}]})
    ),
    "wrong type": lambda r, echo: r.answer(_results(r, reward=echo)),
    "name of a part": lambda r, echo: r.answer(_results(r, reward=1, components={echo: 0.5})),
    "plain name of a part": lambda r, _: r.answer(
        _results(r, reward=1, components={"tq7_zw4_xk9_vb2_ns6_lm3_rd8": 0.5})
    ),
    "feedback": lambda r, echo: r.answer(_results(r, reward=1, feedback=f"I got {echo}")),
    "reason of a skip": lambda r, echo: r.answer(_results(r, skip=True, reason=echo)),
    "error code": lambda r, echo: r.answer(_results(r, error={"code": echo[:64]})),
    "error message": lambda r, echo: r.answer(
        _results(r, error={"code": "x", "message": echo, "retryable": False})
    ),
    "request id of a 202": lambda r, echo: _accepted(r, request_id=echo),
    "status of a 202": lambda r, echo: _accepted(r, status=echo),
    "foreign poll_url": lambda r, echo: _accepted(r, poll_url=f"http://other.example/{echo}"),
    "refused poll": _polled(lambda poll, _, echo: poll.answer(echo.encode(), 404, "text/plain")),
    "polled request id": _polled(
        lambda poll, _, echo: poll.answer(orjson.dumps({"request_id": echo, "rewards": [1]}))
    ),
    "polled feedback": _polled(
        lambda poll, post, echo: poll.answer(_results(post, reward=1, feedback=echo))
    ),
}
SILENT = {
    "reason phrase",
    "another header",
    "no header",
    "chunk size",
    "status line",
    "name of a part",
    "no JSON",
    "wrong type",
    "status of a 202",
    "foreign poll_url",
}
"""Nothing of these places is shown, with or without secrets."""


def leaks(everything: str) -> list[str]:
    """Fragments of the token in a text, in any case, whatever stands between its letters."""
    lowered = everything.lower()
    letters, spread = re.sub(r"[^a-z0-9]", "", TOKEN.lower()), re.sub(r"[^a-z0-9]", "", lowered)
    pieces = (letters[at : at + FRAGMENT] for at in range(len(letters) - FRAGMENT))
    found = {piece for piece in pieces if piece in spread}
    for disguise in DISGUISES.values():
        form = disguise(TOKEN).lower()
        found |= {
            form[at : at + FRAGMENT]
            for at in range(2, len(form) - FRAGMENT)
            if form[at : at + FRAGMENT] in lowered
        }
    return sorted(found)


@pytest.fixture
def echoing(hostile: Callable[..., RewardServer]) -> Callable[..., RewardServer]:
    def start(place: str, disguise: str) -> RewardServer:
        def answer(request: ScoreRequest) -> None:
            sent = request.headers["authorization"].removeprefix("Bearer ")
            PLACES[place](request, ESCAPES.join(["", DISGUISES[disguise](sent), ""]))

        return hostile(answer)

    return start


@pytest.mark.parametrize("place", PLACES)
def test_what_a_service_repeats_is_shown_nowhere(
    echoing: Callable[..., RewardServer],
    fast: HttpOptions,
    make_samples: MakeSamples,
    caplog: pytest.LogCaptureFixture,
    place: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    options = replace(
        fast,
        headers={"Authorization": f"Bearer {TOKEN}"},
        allow_async=True,
        timeouts=RewardTimeouts(connect=10, read=20, attempt=20, deadline=20),
        retry=fast.retry.model_copy(update={"attempts": 2}),
    )
    shown: list[str] = []
    lines: list[str] = []
    """Texts that may not break a line."""

    def emit(level: str, message: str, data: object) -> None:
        lines.append(message)
        shown.append(f"{level} {json.dumps(data)}")

    for disguise in DISGUISES:
        observer = StepObserver(emit, shown.append)
        source = HttpReward("judge", echoing(place, disguise).url, options=options)
        with RewardScorer([WeightedSource(source)], observer=observer) as scorer:
            ticket = scorer.submit(make_samples(1, 1), RewardContext(step=1))
            try:
                [(_, [reward])] = scorer.collect([ticket], may_all_fail=True)
            except (RewardMisconfiguredError, RewardError) as error:
                lines.append(error.message)
                shown.append(repr(error))
            else:
                lines.append(reward.message or "")
                shown.append(str(reward))
        shown += [repr(failure) for failure in observer.take().failures]
    shown += [caplog.handler.format(record) for record in caplog.records]
    assert [line for line in lines if not line.isprintable()] == []
    everything = "\n".join([*lines, *shown])
    assert leaks(everything) == []
    assert "\x1b" not in everything
    assert "\u202e" not in everything
    if place not in SILENT:
        assert "redacted" in everything


@pytest.mark.parametrize("place", ["error page", "feedback", "error code", "request id", "no JSON"])
def test_the_report_of_a_check_shows_no_secret(
    echoing: Callable[..., RewardServer], place: str
) -> None:
    for disguise in ("in capitals", "its end"):
        url = echoing(place, disguise).url
        asked = ["reward", "check", url, "--unsigned", "--light"]
        given = [*asked, "--header", f"Authorization=Bearer {TOKEN}"]
        for command in (given, [*given, "--json"]):
            result = CliRunner().invoke(app, command)
            assert result.exception is None or isinstance(result.exception, SystemExit)
            assert leaks(result.output) == []
            assert "redacted" in result.output or command == given
            assert "\x1b[31m" not in result.output


async def test_a_code_of_a_service_has_letters_digits_and_little_else(
    hostile: Callable[..., RewardServer], ask: Callable[..., Any]
) -> None:
    codes = ["judge/down: now", "\x1b[2J\nERROR forged", "\u202egnp.exe", "ok.code-1", ""]

    def answer(request: ScoreRequest) -> None:
        results = [
            {"id": name, "error": {"code": code, "message": f"a\r\nb{code}"}}
            for name, code in zip(request.ids, codes, strict=True)
        ]
        request.answer(orjson.dumps({"request_id": request.request_id, "results": results}))

    found = await ask(hostile(answer).url, count=5)
    assert [result.code for result in found] == [
        "service.judge_down__now",
        "service.__2J_ERROR_forged",
        "service._gnp.exe",
        "service.ok.code-1",
        "service.",
    ]
    assert [result.message for result in found] == [
        "a bjudge/down: now",
        "a b [2J ERROR forged",
        "a b gnp.exe",
        "a bok.code-1",
        "a b",
    ]


async def test_the_flags_of_a_grader_make_a_plain_code(
    hostile: Callable[..., RewardServer], make_samples: MakeSamples, fast: HttpOptions
) -> None:
    errors = {"metadata": {"errors": {"\x1b[31m\nbroken": True}}}
    server = hostile(lambda request: request.answer(orjson.dumps(errors)))
    options = replace(fast, protocol=OpenAIGraderProtocol({}))
    source = HttpReward("r", server.url, options=options)
    [result] = await source.score(make_samples(1), RewardContext(step=1))
    await source.aclose()
    assert result.code == "grader.__31m_broken"
    assert result.message.isprintable()
