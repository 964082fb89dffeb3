"""A dry run of reward services that are good, and of services that are wrong in one way each."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from starlette.applications import Starlette

from dar.protocol.reward_endpoints import ProbeSample
from dar.protocol.reward_spec import RewardComponent
from dar.rewards.server import reward_server
from fakes.probed_services import Codes, CodeSet, Services, Statuses
from fakes.reward_server import RewardServer, ScoreRequest

TOKEN = "tok-5f0a91c2/7be4+d1"
Probe = Callable[..., Any]
Behaviour = Callable[[Any], None]
SKIPPED = dict.fromkeys((3, 4, 5, 6, 7, 8, 9), "skipped")


# --- good services --------------------------------------------------------------------------------


async def test_a_good_service_passes_all_steps_without_a_warning(
    ask_probe: Probe, serve_app: Callable[[Starlette], str], secret: str, statuses: Statuses
) -> None:
    def brevity(completions: list[str], **_: Any) -> list[float]:
        return [-len(text) / 100 for text in completions]

    url = serve_app(reward_server(secret=secret)(brevity)) + "/score"
    report = await ask_probe(url)
    assert (report.ok, report.errors, report.warnings) == (True, [], [])
    assert statuses(report) == {**dict.fromkeys(range(1, 9), "ok"), 9: "skipped"}
    assert report.determinism == {"max_abs_diff": 0.0, "same_id_max_abs_diff": 0.0}
    assert 0 < report.latency_ms["p50"] <= report.latency_ms["p95"] <= report.latency_ms["p99"]
    assert report.suggested["limits"] == {"concurrency": 4}
    assert report.suggested["batch"] == {"max_samples": 6}
    assert report.suggested["timeouts"]["attempt"] >= 5
    fields = {name: report.suggested[name] for name in ("limits", "timeouts", "batch")}
    RewardComponent.model_validate({"name": "pasted", "url": url, **fields})
    first = report.exchange[0]
    assert orjson.loads(first.request.body)["type"] == "reward.request"
    assert first.response is not None
    assert (first.response.status, first.step) == (200, 2)


async def test_the_number_of_requests_is_what_is_promised(
    ask_probe: Probe, hostile: Callable[..., RewardServer], statuses: Statuses, services: Services
) -> None:
    full, light = hostile(services.good), hostile(services.good)
    await ask_probe(full.url)
    assert len(full.requests) == 35
    report = await ask_probe(light.url, light=True)
    assert len(light.requests) == 6
    assert statuses(report) == {
        **dict.fromkeys(range(1, 5), "ok"),
        **dict.fromkeys(range(5, 10), "skipped"),
    }
    sent = [request.content for request in full.requests]
    assert {content["mode"] for content in sent} == {"validate"}
    ids = [content["request_id"] for content in sent]
    assert len(ids) - len(set(ids)) == 1  # step 3 sends one request twice
    assert full.requests[1].body == full.requests[2].body


async def test_a_users_samples_are_what_is_scored(
    ask_probe: Probe, hostile: Callable[..., RewardServer], services: Services
) -> None:
    samples = [
        ProbeSample(prompt="2+2?", completion=text, ground_truth=4, columns={"level": "easy"})
        for text in ("4", "5", "four")
    ]
    service = hostile(services.good)
    report = await ask_probe(service.url, samples=samples, component={"columns": ["level"]})
    assert report.ok
    for request in service.requests:
        for sample in request.content["samples"]:
            assert (sample["ground_truth"], sample["columns"]) == (4, {"level": "easy"})


async def test_a_protocol_of_one_sample_per_request_is_probed_as_well(
    ask_probe: Probe, hostile: Callable[..., RewardServer], failed: Codes, statuses: Statuses
) -> None:
    def grade(request: ScoreRequest) -> None:
        reward = len(request.content["model_sample"])
        request.answer(orjson.dumps({"reward": reward, "metadata": {"errors": {}}}))

    component = {"protocol": "openai_grader", "grader": {"type": "x"}, "limits": {"concurrency": 2}}
    report = await ask_probe(hostile(grade).url, component=component)
    assert failed(report) == []
    assert statuses(report)[4] == statuses(report)[6] == "skipped"


# --- step 1 ---------------------------------------------------------------------------------------


async def test_a_refused_connection_says_what_to_do(ask_probe: Probe, failed: Codes) -> None:
    report = await ask_probe("http://127.0.0.1:61999/score")
    assert failed(report) == [(1, "connect")]
    assert "running" in report.errors[0].advice


async def test_a_malformed_secret_is_found_before_anything_is_sent(
    ask_probe: Probe, hostile: Callable[..., RewardServer], failed: Codes, services: Services
) -> None:
    service = hostile(services.good)
    report = await ask_probe(service.url, secrets=["not-a-secret"])
    assert failed(report) == [(1, "configuration_error")]
    assert service.requests == []


# --- step 2 ---------------------------------------------------------------------------------------


WRONG: dict[str, Callable[[Any], Behaviour]] = {
    "contract.range": lambda services: services.scoring(lambda *_: 1e300),
    "contract.type": lambda services: services.scoring(lambda *_: "0.5"),
    "contract.length": lambda _: lambda request: request.rewards([0.5]),
    "contract.content_type": lambda _: lambda request: request.answer(b"<html>", content_type="text/html"),
    "contract.request_mismatch": lambda _: lambda request: request.answer(b'{"request_id":"x","rewards":[1,2]}'),
    "contract.nonfinite": lambda _: lambda request: request.answer(b'{"rewards":[NaN,1]}'),
    "contract.size": lambda _: lambda request: request.answer(b"", content_length=str(2**30)),
    "http_401": lambda services: services.status("401 Unauthorized"),
    "http_500": lambda services: services.status("500 Internal Server Error"),
    "http_429": lambda services: services.status("429 Too Many Requests", retry_after="30"),
    "config.redirect": lambda services: services.status("302 Found", location="/elsewhere"),
}  # fmt: skip


@pytest.mark.parametrize("code", WRONG)
async def test_a_wrong_answer_ends_at_step_two(
    ask_probe: Probe,
    hostile: Callable[..., RewardServer],
    services: Services,
    code: str,
    failed: Codes,
    statuses: Statuses,
) -> None:
    service = hostile(WRONG[code](services))
    report = await ask_probe(service.url)
    assert failed(report) == [(2, code)]
    assert not report.ok
    assert report.errors[0].advice
    assert statuses(report) == {1: "ok", 2: "fail", **SKIPPED}
    assert len(service.requests) == 1
    assert report.exchange[0].response is not None


async def test_a_page_in_place_of_json_is_shown(
    ask_probe: Probe, hostile: Callable[..., RewardServer]
) -> None:
    page = b"<html>please log in" + b"x" * 10_000
    service = hostile(lambda request: request.answer(page, content_type="text/html"))
    report = await ask_probe(service.url)
    answer = report.exchange[0].response
    assert answer is not None
    assert answer.body.startswith("<html>please log in")
    assert len(answer.body) <= 4096
    assert answer.headers["content-type"] == "text/html"


async def test_samples_that_the_service_cannot_score_are_errors_only_if_they_are_the_users(
    ask_probe: Probe, hostile: Callable[..., RewardServer], failed: Codes, warned: CodeSet
) -> None:
    def fails(request: ScoreRequest) -> None:
        results = [{"id": name, "error": {"code": "no_truth"}} for name in request.ids]
        content = {"request_id": request.content["request_id"], "results": results}
        request.answer(orjson.dumps(content))

    service = hostile(fails)
    report = await ask_probe(service.url, light=True)
    assert (failed(report), warned(report)) == ([], {(2, "samples.unscored")})
    samples = [ProbeSample(prompt="p", completion=text) for text in "ab"]
    report = await ask_probe(service.url, light=True, samples=samples)
    assert failed(report) == [(2, "samples.failed")]


async def test_a_service_that_skips_everything_is_warned_of(
    ask_probe: Probe,
    hostile: Callable[..., RewardServer],
    failed: Codes,
    warned: CodeSet,
    services: Services,
) -> None:
    report = await ask_probe(hostile(services.scoring(lambda *_: None)).url, light=True)
    assert (failed(report), warned(report)) == ([], {(2, "samples.skipped")})


async def test_a_service_that_never_answers_ends_with_the_time_that_was_given(
    ask_probe: Probe, hostile: Callable[..., RewardServer], failed: Codes
) -> None:
    report = await ask_probe(hostile(lambda request: request.hang()).url, seconds=0.5)
    assert failed(report) == [(2, "timeout")]
    assert "0.5 s" in report.errors[0].detail


async def test_a_slow_service_that_answers_is_unfinished_not_broken(
    ask_probe: Probe, hostile: Callable[..., RewardServer], warned: CodeSet, services: Services
) -> None:
    turns = hostile(services.good, lambda request: request.hang())
    report = await ask_probe(turns.url, light=True, seconds=1.5)
    assert (report.ok, warned(report)) == (True, {(3, "unfinished")})
    assert report.latency_ms["p50"] is not None


async def test_a_cancelled_probe_leaves_nothing_behind(
    ask_probe: Probe, hostile: Callable[..., RewardServer]
) -> None:
    task = asyncio.create_task(ask_probe(hostile(lambda request: request.hang()).url))
    await asyncio.sleep(0.3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == {asyncio.current_task()}


# --- what is said ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["200 OK", "403 Forbidden"])
async def test_a_report_holds_no_secret_even_if_the_service_says_them(
    ask_probe: Probe,
    hostile: Callable[..., RewardServer],
    secret: str,
    text: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)

    def echo(request: ScoreRequest) -> None:
        said = {**request.headers, "secret": secret}
        request.answer(
            orjson.dumps(said),
            status=text,
            x_echo=request.headers["authorization"],
            x_secret=secret,
        )

    headers = {"Authorization": f"Bearer {TOKEN}"}
    report = await ask_probe(hostile(echo).url, headers=headers)
    said = report.model_dump_json()
    assert "webhook-signature" in said  # it was shown what went over the wire
    for hidden in (secret, secret.removeprefix("whsec_"), TOKEN):
        assert hidden[:12] not in said + caplog.text
