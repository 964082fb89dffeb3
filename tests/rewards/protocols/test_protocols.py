"""Services that were written for other systems score samples unchanged."""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import orjson
import pytest
from openai.types.fine_tuning.alpha import GraderRunResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from dar.protocol.rewards import decode_request
from dar.rewards.base import (
    Failed,
    RewardContext,
    RewardProtocol,
    RewardResult,
    RewardSample,
    Scored,
    Skipped,
)
from dar.rewards.http_reward import HttpOptions, HttpReward
from dar.rewards.protocols.native import NativeProtocol
from dar.rewards.protocols.openai_grader import OpenAIGraderProtocol
from dar.rewards.protocols.openrlhf import OpenRLHFProtocol
from dar.rewards.protocols.plain import PlainProtocol
from dar.rewards.protocols.trl import TRLProtocol
from fakes.reward_types import MakeSamples, batch_of, sample

Serve = Callable[[Starlette], str]
CHAT = [{"role": "user", "content": "2 + 2?"}]
GRADER = {
    "type": "string_check", "name": "same", "operation": "eq",
    "input": "{{sample.output_text}}", "reference": "{{item.reference_answer}}",
}  # fmt: skip


async def ask(
    url: str, protocol: RewardProtocol, samples: Sequence[RewardSample], **options: Any
) -> list[RewardResult]:
    source = HttpReward("r", url, options=HttpOptions(protocol=protocol, **options))
    try:
        return await source.score(samples, RewardContext(step=3))
    finally:
        await source.aclose()


def app(handle: Callable[[dict[str, Any]], Any], path: str = "/score") -> Starlette:
    async def endpoint(request: Request) -> JSONResponse:
        return JSONResponse(handle(await request.json()))

    return Starlette(routes=[Route(path, endpoint, methods=["POST"])])


# --- servers as their own systems describe them ---------------------------------------------------


async def test_a_remote_reward_model_of_openrlhf_scores(serve_app: Serve) -> None:
    seen: list[dict[str, Any]] = []

    def get_reward(data: dict[str, Any]) -> dict[str, Any]:
        seen.append(data)
        queries, prompts, labels = data["query"], data["prompts"], data["labels"]
        rewards = [
            float(query == f"{prompt}{label}")
            for query, prompt, label in zip(queries, prompts, labels, strict=True)
        ]
        lengths = [len(query) for query in queries]
        return {
            "rewards": rewards,
            "scores": rewards,
            "extra_logs": {"Query length": lengths, "note": "fine"},
        }

    samples = [
        sample(0, columns={"ground_truth": "c0"}),
        sample(1, columns={"ground_truth": "c0"}),
        sample(2, prompt=None, messages=CHAT, prompt_text="<user>2 + 2?<bot>"),
    ]
    url = serve_app(app(get_reward, "/get_reward")) + "/get_reward"
    found = await ask(url, OpenRLHFProtocol(), samples)
    assert seen == [
        {
            "query": ["pc0", "pc1", "<user>2 + 2?<bot>c2"],
            "prompts": ["p", "p", "<user>2 + 2?<bot>"],
            "labels": ["c0", "c0", None],
        }
    ]
    assert found == [
        Scored(1.0, {"scores": 1.0, "query_length": 3.0}),
        Scored(0.0, {"scores": 0.0, "query_length": 3.0}),
        Scored(0.0, {"scores": 0.0, "query_length": 19.0}),
    ]


def as_service(function: Callable[..., Any]) -> Callable[[dict[str, Any]], Any]:
    """What turns a reward function of TRL into a service: it is called by name with what came
    in.
    """

    def handle(data: dict[str, Any]) -> Any:
        takes_all = any(p.kind is p.VAR_KEYWORD for p in signature(function).parameters.values())
        assert takes_all, function
        return function(**data)

    return handle


async def test_a_reward_function_of_trl_scores_texts_and_may_skip(serve_app: Serve) -> None:
    def accuracy(
        prompts: list[str], completions: list[str], solution: list[str | None], **kwargs: Any
    ) -> list[float | None]:
        assert kwargs["trainer_state"] == {"global_step": 2}
        assert kwargs["completion_ids"] == [[7], [8], [9]]
        assert "secret" not in kwargs
        assert prompts == ["p"] * 3
        return [
            None if right is None else float(right in text)
            for text, right in zip(completions, solution, strict=True)
        ]

    samples = [
        sample(n, completion_ids=[7 + n], columns={"solution": right, "secret": 1})
        for n, right in enumerate(["c0", "x", None])
    ]
    url = serve_app(app(as_service(accuracy))) + "/score"
    found = await ask(url, TRLProtocol(), samples, columns=["solution"])
    assert found == [Scored(1.0), Scored(0.0), Skipped()]


async def test_a_reward_function_of_trl_scores_conversations(serve_app: Serve) -> None:
    def format_reward(completions: list[list[dict[str, str]]], **kwargs: Any) -> dict[str, Any]:
        assert kwargs["prompts"] == [CHAT]
        assert kwargs["completion_ids"] is None
        return {"rewards": [float(one[0]["content"] == "4") for one in completions]}

    url = serve_app(app(as_service(format_reward))) + "/score"
    chat = sample(0, prompt=None, messages=CHAT, completion="4")
    assert await ask(url, TRLProtocol(), [chat]) == [Scored(1.0)]


def grade(data: dict[str, Any], **errors: Any) -> dict[str, Any]:
    """OpenAI's ``graders/run`` for ``string_check``.

    The answer has the shape that their own client reads.
    """
    variables = {"{{sample.output_text}}": data["model_sample"]}
    variables |= {f"{{{{item.{name}}}}}": value for name, value in data["item"].items()}
    grader = data["grader"]
    is_same = variables[grader["input"]] == variables[grader["reference"]]
    flags: dict[str, Any] = dict.fromkeys(
        [
            "formula_parse_error",
            "invalid_variable_error",
            "model_grader_parse_error",
            "model_grader_refusal_error",
            "model_grader_server_error",
            "other_error",
            "python_grader_runtime_error",
            "python_grader_server_error",
            "sample_parse_error",
            "truncated_observation_error",
            "unresponsive_reward_error",
        ],
        False,
    )
    answer = {
        "reward": float(is_same),
        "metadata": {
            "name": grader["name"], "type": grader["type"], "execution_time": 0.01, "scores": {}, "token_usage": None,
            "sampled_model_name": None,
            "errors": {**flags, "model_grader_server_error_details": None, "python_grader_runtime_error_details": None,
                       "python_grader_server_error_type": None, **errors},
        },
        "sub_rewards": {"Same text": float(is_same)},
        "model_grader_token_usage_per_model": {},
    }  # fmt: skip
    GraderRunResponse.model_validate(answer, strict=True)
    return answer


async def test_a_grader_of_openai_scores_one_sample_per_request(serve_app: Serve) -> None:
    seen: list[dict[str, Any]] = []

    def run(data: dict[str, Any]) -> dict[str, Any]:
        seen.append(data)
        return grade(data)

    path = "/v1/fine_tuning/alpha/graders/run"
    samples = [sample(n, columns={"ground_truth": "c0", "level": 2, "other": 3}) for n in range(2)]
    url = serve_app(app(run, path)) + path
    found = await ask(url, OpenAIGraderProtocol(GRADER), samples, columns=["level"])
    assert found == [Scored(1.0, {"same_text": 1.0}), Scored(0.0, {"same_text": 0.0})]
    assert min(seen, key=lambda data: str(data["model_sample"])) == {
        "grader": GRADER,
        "model_sample": "c0",
        "item": {"ground_truth": "c0", "level": 2, "reference_answer": "c0", "prompt": "p"},
    }


@pytest.mark.parametrize(
    ("errors", "code", "is_transient"),
    [
        ({"sample_parse_error": True}, "grader.sample_parse_error", False),
        ({"unresponsive_reward_error": True}, "grader.unresponsive_reward_error", True),
        (
            {"model_grader_server_error": True, "model_grader_server_error_details": "busy\n<b>"},
            "grader.model_grader_server_error",
            True,
        ),
        (
            {"python_grader_server_error": True, "other_error": True},
            "grader.other_error",
            False,
        ),
    ],
)
async def test_an_error_flag_of_a_grader_outranks_the_reward_beside_it(
    serve_app: Serve, errors: dict[str, Any], code: str, is_transient: bool
) -> None:
    url = serve_app(app(lambda data: grade(data, **errors))) + "/score"
    one = sample(0, columns={"ground_truth": "c0"})
    (found,) = await ask(url, OpenAIGraderProtocol(GRADER), [one])
    assert isinstance(found, Failed)
    assert (found.code, found.is_transient) == (code, is_transient)
    assert all(name in found.message for name, value in errors.items() if value is True)
    assert "\n" not in found.message


async def test_a_classifier_behind_a_plain_api_scores(serve_app: Serve) -> None:
    def classify(data: dict[str, Any]) -> dict[str, Any]:
        assert data["model"] == "rm"
        return {"object": "list", "data": [{"index": 0, "probs": [len(data["input"]) / 10]}]}

    url = serve_app(app(classify, "/classify")) + "/classify"
    protocol = PlainProtocol({"model": "rm", "input": "{{text}}"}, "/data/0/probs/0")
    assert await ask(url, protocol, [sample(n) for n in range(3)]) == [Scored(0.3)] * 3


async def test_a_request_of_the_native_protocol_is_one(make_samples: MakeSamples) -> None:
    samples = make_samples(2, columns={"ground_truth": 1, "a": 2, "b": 3})
    batch = batch_of(samples, ["a"])
    request = decode_request(NativeProtocol().encode(batch))
    assert [one.id for one in request.samples] == ["s0", "s1"]
    assert (request.request_id, request.step, request.component) == ("rwq_1", 3, "r")
    assert request.samples[0].columns == {"a": 2}
    answer = orjson.dumps(
        {"request_id": "rwq_1", "results": [{"id": "s1", "reward": 1}, {"id": "s0", "skip": True}]}
    )
    assert NativeProtocol().decode(answer, batch) == [Skipped(), Scored(1.0)]


async def test_conversations_are_sent_as_text_where_that_is_asked_for(serve_app: Serve) -> None:
    seen: list[dict[str, Any]] = []

    def score(data: dict[str, Any]) -> dict[str, Any]:
        seen.extend(data["samples"])
        return {"request_id": data["request_id"], "rewards": [1.0] * len(data["samples"])}

    url = serve_app(app(score)) + "/score"
    chat = sample(0, prompt=None, messages=CHAT, prompt_text="<user>2 + 2?<bot>")
    await ask(url, NativeProtocol(), [chat], prompt_format="text")
    await ask(url, NativeProtocol(), [chat])
    assert [(one["prompt"], one["messages"]) for one in seen] == [
        ("<user>2 + 2?<bot>", None),
        (None, CHAT),
    ]
