"""A reward server made of a function, over real sockets."""

import asyncio
import contextlib
import logging
import math
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest

from dar.errors import ConfigurationError, RewardMisconfiguredError
from dar.protocol.ids import new_id
from dar.protocol.reward_spec import RewardRetry
from dar.protocol.rows import ARGUMENTS
from dar.rewards.base import Failed, RequestBatch, RewardContext, RewardSample, Scored, Skipped
from dar.rewards.functions import StepState
from dar.rewards.http.signing import decode_secret, signed_headers
from dar.rewards.http_reward import HttpOptions, HttpReward
from dar.rewards.protocols.native import NativeProtocol
from dar.rewards.scoring.scorer import scorer_from_functions
from dar.rewards.server import reward_server, serve
from fakes.reward_types import MakeSamples, Score


@pytest.fixture
async def score(
    serve_app: Callable[..., str],
    secret: str,
    fast: HttpOptions,
    make_samples: MakeSamples,
    context: RewardContext,
) -> AsyncIterator[Callable[..., Any]]:
    """Score samples by a function behind a signed server."""
    sources: list[HttpReward] = []

    async def run(function: Any, count: int = 4, sent: Any = None, **fields: Any) -> Any:
        url = serve_app(reward_server(secret=secret)(function)) + "/score"
        options = HttpOptions(sent, fast.batch, fast.limits, fast.timeouts, fast.retry)
        sources.append(HttpReward("r", url, secret=secret, options=options))
        return await sources[-1].score(make_samples(count, **fields), context)

    yield run
    for source in sources:
        await source.aclose()


def length(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


async def test_a_function_is_served_with_its_columns(score: Score) -> None:
    seen: list[Any] = []

    def reward(
        prompts: list[str], completions: list[str], ground_truth: Any, level: Any
    ) -> list[float | None]:
        seen.append((prompts, completions, ground_truth, level))
        return [1, None, math.nan, -2.5]

    columns = {"ground_truth": "a", "level": {"n": 1}, "private": 1}
    found = await score(reward, 4, ["ground_truth", "level"], columns=columns)
    assert seen == [(["p"] * 4, ["c0", "c1", "c2", "c3"], ["a"] * 4, [{"n": 1}] * 4)]
    assert [type(result) for result in found] == [Scored, Skipped, Failed, Scored]
    assert (found[2].code, found[2].is_transient) == ("service.nonfinite", False)
    assert (found[0].reward, found[3].reward) == (1.0, -2.5)


async def test_a_served_function_gets_the_step_at_which_the_policy_sampled(
    score: Score, context: RewardContext
) -> None:
    steps: list[int] = []

    def reward(completions: list[str], trainer_state: StepState) -> list[float]:
        steps.append(trainer_state.global_step)
        return [1.0] * len(completions)

    assert await score(reward, 2) == [Scored(1.0)] * 2
    assert steps == [context.steps_done]


async def test_a_request_with_a_column_of_a_reserved_name_is_refused(
    asking: Callable[..., Any], content: Callable[..., dict[str, Any]]
) -> None:
    for name in ARGUMENTS:
        asked = content()
        asked["samples"][1]["columns"] = {name: 1}
        answer = await asking(length).post(asked)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "reserved_column"


async def test_messages_arrive_as_trl_passes_them(score: Score) -> None:
    async def reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        assert prompts[0] == [{"role": "user", "content": "hi"}]
        assert completions[0] == [{"role": "assistant", "content": "c0"}]
        return [float(len(completions))] * len(completions)

    messages = [{"role": "user", "content": "hi"}]
    assert await score(reward, prompt=None, messages=messages) == [Scored(4.0)] * 4


async def test_a_wrong_length_is_a_failure_with_a_clear_message(score: Score) -> None:
    found = await score(lambda prompts, completions, **_: [1.0])
    assert {(result.code, result.is_transient) for result in found} == {("http_500", True)}
    assert "returned 1 reward for 4 completions" in found[0].message


async def test_an_exception_is_a_failure_that_names_its_class(score: Score) -> None:
    def reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        raise ZeroDivisionError("private")

    found = await score(reward)
    assert {result.code for result in found} == {"http_500"}
    assert "ZeroDivisionError" in found[0].message
    assert "private" not in found[0].message


class Requests:
    """Hand-made requests to a server."""

    def __init__(self, url: str, samples: list[RewardSample], secret: str | None) -> None:
        now = datetime.now(UTC)
        batch = RequestBatch(new_id("rwq_"), "r", RewardContext(1), tuple(samples), None, now, now)
        self.body = NativeProtocol().encode(batch)
        keys = [] if secret is None else [decode_secret(secret)]
        stamp = int(now.timestamp())
        self.headers = {
            "content-type": "application/json",
            **signed_headers(keys, batch.request_id, stamp, self.body),
        }
        self.client = httpx2.AsyncClient(base_url=url, trust_env=False)

    async def post(
        self, path: str = "/score", content: bytes | None = None, **headers: str
    ) -> httpx2.Response:
        changed = {name.replace("_", "-"): value for name, value in headers.items()}
        body = self.body if content is None else content
        return await self.client.post(path, content=body, headers={**self.headers, **changed})


@pytest.fixture
async def requests(
    serve_app: Callable[..., str],
    make_samples: MakeSamples,
    secret: str,
) -> AsyncIterator[Callable[..., Requests]]:
    made: list[Requests] = []

    def make(function: Any = length, signing: str | None = secret, **options: Any) -> Requests:
        url = serve_app(reward_server(**{"secret": secret, **options})(function))
        made.append(Requests(url, make_samples(2), signing))
        return made[-1]

    yield make
    for item in made:
        await item.client.aclose()


OTHER = "whsec_" + "b" * 32


@pytest.mark.parametrize(
    ("signing", "change", "code"),
    [
        (None, {}, "missing_signature"),
        (OTHER, {}, "invalid_signature"),
        ("ours", {"webhook_id": "rwq_other"}, "invalid_signature"),
        ("ours", {"webhook_timestamp": "1"}, "stale_signature"),
    ],
)
async def test_a_request_with_a_bad_signature_is_not_scored(
    requests: Any, secret: str, signing: str | None, change: Any, code: str
) -> None:
    calls: list[int] = []

    def reward(prompts: Any, completions: Any, **_: Any) -> list[float]:
        calls.append(1)
        return [0.0] * len(completions)

    server = requests(reward, signing=secret if signing == "ours" else signing)
    answer = await server.post(**change)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == code
    assert not calls


async def test_an_altered_body_is_not_scored(requests: Any) -> None:
    server = requests()
    assert (await server.post(content=server.body + b" ")).status_code == 401


async def test_one_of_several_secrets_is_enough(requests: Any, secret: str) -> None:
    server = requests(secret=[OTHER, secret])
    assert (await server.post()).status_code == 200


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
async def test_a_secret_may_lie_in_a_file(
    requests: Any, secret: str, tmp_path: Path, encoding: str
) -> None:
    (tmp_path / "secret").write_text(f"{secret}\n", encoding=encoding)
    server = requests(secret=None, secret_file=tmp_path / "secret")
    assert (await server.post()).status_code == 200
    assert (await server.post(webhook_signature="v1,x")).status_code == 401


async def test_without_a_secret_it_says_loudly_that_it_verifies_nothing(
    requests: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        server = requests(secret=None, signing=None)
    assert "does not verify signatures" in caplog.text
    assert (await server.post()).status_code == 200


async def test_a_repetition_gets_the_first_answer_and_is_not_scored_again(requests: Any) -> None:
    calls: list[int] = []

    def reward(prompts: Any, completions: Any, **_: Any) -> list[float]:
        calls.append(1)
        time.sleep(0.05)
        return [float(len(calls))] * len(completions)

    server = requests(reward)
    answers = await asyncio.gather(*(server.post() for _ in range(4)))
    answers.append(await server.post())
    assert len({answer.content for answer in answers}) == 1
    assert len(calls) == 1


async def test_a_failure_is_logged_and_not_remembered(
    requests: Any, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    def reward(prompts: Any, completions: Any, **_: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("my own")
        return [1.0] * len(completions)

    server = requests(reward)
    with caplog.at_level(logging.ERROR, logger="dar.rewards.server.app"):
        answers = [await server.post() for _ in range(3)]
    assert [answer.status_code for answer in answers] == [500, 200, 200]
    assert len(calls) == 2
    assert "RuntimeError: my own" in caplog.text
    # Over one connection: the failure did not break it.
    assert len({a.extensions["network_stream"] for a in answers}) == 1


async def test_an_attempt_that_was_given_up_is_answered_at_the_next(
    serve_app: Any, make_samples: MakeSamples, impatient: HttpOptions, context: RewardContext
) -> None:
    calls: list[int] = []
    given_up = threading.Event()

    def slow(prompts: Any, completions: Any, **_: Any) -> list[float]:
        calls.append(1)
        given_up.wait(20)
        return [1.0] * len(completions)

    options = replace(impatient, retry=RewardRetry(attempts=20, cap=0.01))
    url = serve_app(reward_server(slow)) + "/score"
    source = HttpReward("r", url, options=options, on_wait=lambda _: given_up.set())
    assert await source.score(make_samples(2), context) == [Scored(1.0)] * 2
    assert len(calls) == 1
    await source.aclose()


@pytest.mark.parametrize(
    ("path", "content", "headers", "status", "code"),
    [
        ("/else", None, {}, 404, "not_found"),
        ("/healthz", None, {}, 405, "method_not_allowed"),
        ("/score", None, {"content_type": "text/plain"}, 415, "unsupported_media_type"),
        ("/score", None, {"content_encoding": "gzip"}, 415, "unsupported_media_type"),
        ("/score", b" " * 3000, {}, 413, "payload_too_large"),
        ("/score", b"[1]", {}, 400, "invalid_request"),
        ("/score", b"nonsense", {}, 400, "invalid_json"),
    ],
)
async def test_every_refusal_has_the_one_error_shape(
    requests: Any, path: str, content: Any, headers: Any, status: int, code: str
) -> None:
    server = requests(secret=None, signing=None, max_body_bytes=2000)
    answer = await server.post(path, content, **headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.json()["error"]["message"]


async def test_health_needs_no_signature(requests: Any) -> None:
    answer = await requests().client.get("/healthz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize(("options", "most"), [({}, 1), ({"max_calls": 3}, 3)])
async def test_a_plain_function_is_called_one_at_a_time_unless_told_otherwise(
    serve_app: Any,
    make_samples: MakeSamples,
    fast: HttpOptions,
    context: RewardContext,
    options: Any,
    most: int,
) -> None:
    changed, running, peak = threading.Condition(), 0, 0

    def reward(prompts: Any, completions: Any, **_: Any) -> list[float]:
        nonlocal running, peak
        with changed:
            running += 1
            peak = max(peak, running)
            changed.notify_all()
            changed.wait_for(lambda: peak >= most, timeout=20)
        time.sleep(0.02)  # in which one too many could come in
        with changed:
            running -= 1
        return [1.0] * len(completions)

    url = serve_app(reward_server(**options)(reward) if options else reward_server(reward))
    source = HttpReward("r", f"{url}/score", options=fast)
    assert len(await source.score(make_samples(64, 16), context)) == 64
    assert peak == most
    await source.aclose()


def test_a_function_that_needs_token_ids_is_refused() -> None:
    def by_tokens(completions: Any, completion_ids: list[list[int]]) -> list[float]:
        return [-float(len(ids)) for ids in completion_ids]

    with pytest.raises(ConfigurationError, match="completion_ids, which are not sent"):
        reward_server(by_tokens)


@pytest.mark.parametrize(
    "options", [{"secret": "whsec_x"}, {"secret_file": "secret"}, {"max_calls": 2}]
)
def test_an_application_is_not_served_with_options_that_it_would_ignore(options: Any) -> None:
    with pytest.raises(ConfigurationError, match="to reward_server, not to serve"):
        serve(reward_server(length), port=-1, **options)  # a port that cannot be bound


async def test_a_wrong_path_is_told_to_the_job(
    serve_app: Any, make_samples: MakeSamples, context: RewardContext
) -> None:
    source = HttpReward("r", serve_app(reward_server(length)) + "/scores")
    with pytest.raises(RewardMisconfiguredError, match="POST to its path"):
        await source.score(make_samples(2), context)
    await source.aclose()


SCRIPT = """
from dar.rewards.server import serve

def brevity(prompts, completions, **columns):
    return [-len(text) / 100 for text in completions]

if __name__ == "__main__":
    serve(brevity, port={port}, secret_file="{secret_file}")
"""


def test_a_script_of_ten_lines_serves_until_it_is_stopped(
    tmp_path: Path, secret: str, make_samples: MakeSamples
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "secret").write_text(secret)
    script = tmp_path / "reward.py"
    script.write_text(SCRIPT.format(port=port, secret_file=tmp_path / "secret"))
    process = subprocess.Popen([sys.executable, script], stderr=subprocess.PIPE)
    url = f"http://127.0.0.1:{port}"
    try:
        while process.poll() is None:
            with contextlib.suppress(httpx2.TransportError):
                httpx2.get(f"{url}/healthz", trust_env=False, verify=False)
                break
            time.sleep(0.05)
        with scorer_from_functions(f"{url}/score", secret=secret) as scorer:
            assert scorer.score(make_samples(1), RewardContext(1))[0].reward == -0.02
    finally:
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=20)
    assert f"Reward server at {url}/score".encode() in log
    assert process.returncode == 0


def needs_level(completions: list[str], level: list[int]) -> list[float]:
    return [1.0 for _ in completions]


class Judge:
    def score(self, completions: list[str], **columns: Any) -> list[float]:
        return [1.0 for _ in completions]


@pytest.mark.parametrize(
    ("function", "column", "message"),
    [
        (needs_level, "other", "needs the column 'level'"),
        (Judge().score, "self", "'self' has the name of the first argument"),
    ],
)
async def test_columns_that_the_function_cannot_take_are_refused_and_not_its_failure(
    asking: Callable[..., Any],
    content: Callable[..., dict[str, Any]],
    function: Any,
    column: str,
    message: str,
) -> None:
    asked = content()
    for sample in asked["samples"]:
        sample["columns"] = {column: 1}
    answer = await asking(function).post(asked)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def positional(completions: list[str], /, **columns: Any) -> list[float]:
    return [1.0 for _ in completions]


def logs(completions: list[str], log_extra: Any) -> list[float]:
    return [1.0 for _ in completions]


def counts(completions: list[str], *, log_metric: Any, **columns: Any) -> list[float]:
    return [1.0 for _ in completions]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (positional, "positional-only argument completions"),
        (logs, "needs log_extra, which only TRL's trainer gives"),
        (counts, "needs log_metric, which only TRL's trainer gives"),
    ],
)
def test_a_function_that_could_never_be_called_is_refused_at_the_start(
    function: Any, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        reward_server()(function)
