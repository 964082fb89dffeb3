"""Graders through the unmodified ``openai`` client: a registered endpoint scores one completion,
and no failure is a number.
"""

import json
import socket
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from dar.rewards.http.signing import decode_secret, verify
from fakes.live_service import Judge, Live

FLAGS = {
    *("formula_parse_error", "invalid_variable_error", "model_grader_parse_error"),
    *("model_grader_refusal_error", "model_grader_server_error", "other_error"),
    *("python_grader_runtime_error", "python_grader_server_error", "sample_parse_error"),
    *("truncated_observation_error", "unresponsive_reward_error"),
}
DETAILS = {
    *("model_grader_server_error_details", "python_grader_runtime_error_details"),
    "python_grader_server_error_type",
}


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    key, url = live.key("api_key"), f"{live.url}/v1"
    with openai.OpenAI(api_key=key, base_url=url, max_retries=0) as made:
        yield made


def grader_for(live: Live, url: str, **options: Any) -> dict[str, Any]:
    body = {"name": "judge", "url": url, "headers": {"authorization": "Bearer t"}, **options}
    made = live.http.post("/v1/reward_endpoints", json=body).json()
    live.made = made
    return {"type": "endpoint", "name": "helpful", "endpoint": made["id"]}


def run(client: openai.OpenAI, grader: Any, **values: Any) -> Any:
    given = {"model_sample": "four", "item": {"prompt": "2 + 2?", "ground_truth": "4"}, **values}
    return client.fine_tuning.alpha.graders.run(grader=grader, **given)


def flagged(answer: Any) -> set[str]:
    errors = answer.metadata.errors
    assert all(isinstance(getattr(errors, name), bool) for name in FLAGS)
    assert all(getattr(errors, name) is None for name in DETAILS)
    return {name for name in FLAGS if getattr(errors, name)}


def test_a_completion_gets_its_reward(live: Live, client: openai.OpenAI, judge: Judge) -> None:
    judge.answer = lambda asked: {
        "request_id": asked["request_id"],
        "results": [{"id": "s0", "reward": 0.5, "components": {"style": 0.25}}],
    }
    answer = run(client, grader_for(live, judge.url))
    assert (answer.reward, answer.sub_rewards) == (0.5, {"style": 0.25})
    assert answer.model_grader_token_usage_per_model == {}
    assert (answer.metadata.name, answer.metadata.type) == ("helpful", "endpoint")
    assert answer.metadata.scores == {"helpful": 0.5}
    assert answer.metadata.execution_time > 0
    assert flagged(answer) == set()
    headers, body = judge.seen[-1]
    [sample] = json.loads(body)["samples"]
    assert (sample["prompt"], sample["completion"], sample["ground_truth"]) == (
        "2 + 2?",
        "four",
        "4",
    )
    verify([decode_secret(live.made["signing_secret"])], headers, body)
    assert headers["authorization"] == "Bearer t"


def test_a_service_that_does_not_answer_is_unresponsive(live: Live, client: openai.OpenAI) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/"
        answer = run(client, grader_for(live, url, retry={"base": 0.01}))
    assert (answer.reward, answer.metadata.scores) == (None, {})
    assert flagged(answer) == {"unresponsive_reward_error"}


@pytest.mark.parametrize(
    ("status", "rewards"), [(403, [1.0]), (200, ["1.0"]), (200, [1.0, 2.0]), (200, [True])]
)
def test_an_answer_that_is_no_reward_is_no_number(
    live: Live, client: openai.OpenAI, judge: Judge, status: int, rewards: list[Any]
) -> None:
    judge.status = status
    judge.answer = lambda asked: {"request_id": asked["request_id"], "rewards": rewards}
    answer = run(client, grader_for(live, judge.url, retry={"base": 0.01}))
    assert (answer.reward, answer.metadata.scores) == (None, {})
    assert flagged(answer) == {"other_error"}
    assert answer.metadata.errors.endpoint_error_details


def test_a_skip_is_neither_a_reward_nor_an_error(
    live: Live, client: openai.OpenAI, judge: Judge
) -> None:
    judge.answer = lambda asked: {"request_id": asked["request_id"], "rewards": [None]}
    answer = run(client, grader_for(live, judge.url))
    assert (answer.reward, answer.metadata.status, flagged(answer)) == (None, "skip", set())


def test_a_conversation_is_sent_as_messages(
    live: Live, client: openai.OpenAI, judge: Judge
) -> None:
    messages = [{"role": "user", "content": "hi"}]
    run(client, grader_for(live, judge.url), item={"messages": messages})
    [sample] = json.loads(judge.seen[-1][1])["samples"]
    assert (sample["messages"], sample["prompt"]) == (messages, None)


HI = [{"role": "user", "content": "hi"}]
DEEP: Any = []
for _ in range(80):
    DEEP = [DEEP]


def test_an_item_is_sent_as_it_is(live: Live, client: openai.OpenAI, judge: Judge) -> None:
    grader = grader_for(live, judge.url)
    items: list[tuple[Any, Any, Any, Any]] = [
        (None, "", None, None),
        ({}, "", None, None),
        ({"prompt": ""}, "", None, None),
        ({"prompt": HI}, None, HI, None),
        ({"prompt": None, "messages": HI}, None, HI, None),
        ({"prompt": "p", "messages": None, "reference_answer": [1]}, "p", None, [1]),
        ({"ground_truth": "4", "reference_answer": "4"}, "", None, "4"),
    ]
    for item, *expected in items:
        run(client, grader, item=item)
        [sample] = json.loads(judge.seen[-1][1])["samples"]
        sent = [sample["prompt"], sample["messages"], sample["ground_truth"]]
        assert sent == expected, item


def test_an_item_that_is_no_row_is_refused_and_never_changed(
    client: openai.OpenAI, judge: Judge
) -> None:
    items: list[tuple[Any, str, str]] = [
        ("text", "item", "must be an object with the columns of a row, but it is a text"),
        (["x"], "item", "it is a list"),
        (5, "item", "it is a number"),
        ({"prompt": None}, "item.prompt", "the prompt is null"),
        ({"prompt": 5}, "item.prompt", "it is a number"),
        ({"prompt": True}, "item.prompt", "it is a boolean"),
        ({"prompt": {"a": 1}}, "item.prompt", "it is an object"),
        ({"prompt": ["a"]}, "item.prompt[0]", "must be a message"),
        ({"messages": "hi"}, "item.messages", "must be a list of messages, but it is a text"),
        ({"messages": []}, "item.messages", "it is an empty list"),
        ({"messages": [{"role": "user"}]}, "item.messages[0].content", "has no content"),
        ({"prompt": "p", "messages": HI}, "item.prompt", "give one of them"),
        ({"ground_truth": 1, "reference_answer": 2}, "item.reference_answer", "give one of them"),
        ({"more": DEEP}, "item.more", "levels deep"),
    ]
    for item, param, says in items:
        with pytest.raises(openai.BadRequestError, match=says) as caught:
            run(client, {"type": "endpoint", "name": "a", "endpoint": f"rwe_{'0' * 26}"}, item=item)
        assert caught.value.param == param
    assert judge.seen == []


def test_a_grader_is_validated_without_asking_it(
    live: Live, client: openai.OpenAI, judge: Judge
) -> None:
    grader = grader_for(live, judge.url)
    answer = live.http.post("/v1/fine_tuning/alpha/graders/validate", json={"grader": grader})
    assert answer.json() == {"grader": grader}
    raw = client.fine_tuning.alpha.graders.with_raw_response.validate(grader=grader)  # type: ignore[arg-type] # a type that OpenAI does not know
    assert raw.http_response.json() == {"grader": grader}
    assert judge.seen == []


@pytest.mark.parametrize(
    ("grader", "param"),
    [
        ({"type": "endpoint", "name": "a", "endpoint": "rwe_" + "0" * 26}, "grader.endpoint"),
        ({"type": "endpoint", "name": "a", "endpoint": "../x"}, "grader.endpoint"),
        ({"type": "endpoint", "endpoint": "rwe_" + "0" * 26}, "grader.name"),
        (
            {
                "type": "string_check",
                "name": "a",
                "input": "{{sample.output_text}}",
                "reference": "4",
                "operation": "eq",
            },
            "grader.type",
        ),
    ],
)
def test_other_graders_are_a_bad_request_that_says_why(
    client: openai.OpenAI, grader: Any, param: str
) -> None:
    for call in (
        lambda: run(client, grader),
        lambda: client.fine_tuning.alpha.graders.validate(grader=grader),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            call()
        assert caught.value.param == param
        assert "{{" not in caught.value.message
