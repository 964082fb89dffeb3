"""docs/schemas says what the models of ``dar.reward.v1`` say."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from dar.protocol.rewards import Accepted, RewardRequest, RewardResponse

DOCS = Path(__file__).parents[2] / "docs"
SCHEMAS = {
    path.name.removesuffix(".json").rpartition(".")[2]: json.loads(path.read_text())
    for path in sorted((DOCS / "schemas").glob("*.json"))
}
RESPONSE = Draft202012Validator(SCHEMAS["response"])
REQUEST = Draft202012Validator(SCHEMAS["request"])


def test_the_schemas_are_up_to_date() -> None:
    module = importlib.import_module("build_schemas")
    written = {path.name: path.read_text() for path in (DOCS / "schemas").iterdir()}
    assert written == module.schemas(), "run python docs/build_schemas.py"


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_one(name: str) -> None:
    Draft202012Validator.check_schema(SCHEMAS[name])


REWARDS = st.sampled_from([0.5, -3, 0, 1e6, 1e7, True, "0.7", None, [1], {}])
RESULTS = st.fixed_dictionaries(
    {"id": st.sampled_from(["s0", "s1", 3])},
    optional={
        "reward": REWARDS,
        "skip": st.sampled_from([True, False, 1, None]),
        "error": st.sampled_from([None, {}, {"code": "x", "retryable": True}, {"code": 3}, "no"]),
        "components": st.sampled_from([{}, {"part": 1.0}, {"Part": 1.0}, {"part": "1"}, None]),
        "feedback": st.sampled_from([None, "good", 3]),
        "more": st.just(1),
    },
)
ANSWERS = st.fixed_dictionaries(
    {},
    optional={
        "request_id": st.sampled_from(["rwq_1", 1, None]),
        "rewards": st.one_of(st.none(), st.lists(REWARDS, max_size=2)),
        "results": st.one_of(st.none(), st.lists(RESULTS, max_size=2)),
        "type": st.sampled_from([None, "reward.result", 1]),
    },
)


def fits(model: Any, content: Any) -> bool:
    try:
        model.model_validate(content)
    except ValidationError:
        return False
    return True


@given(ANSWERS)
def test_an_answer_fits_the_schema_if_and_only_if_it_is_accepted(answer: dict[str, Any]) -> None:
    assert RESPONSE.is_valid(answer) == fits(RewardResponse, answer), answer


SAMPLE = {
    "id": "s0", "group_id": "g0", "index": 0, "prompt": "p", "messages": None, "completion": "c", "finish_reason": "stop",
    "completion_tokens": 1, "ground_truth": None, "columns": {}, "metadata": {"policy_version": 0, "truncated": False},
}  # fmt: skip
ASKED = {
    "type": "reward.request", "version": "dar.reward.v1", "request_id": "rwq_1", "job_id": None, "component": "r", "step": 1,
    "mode": "train", "created_at": "2026-11-22T09:40:00Z", "reply": {"modes": ["sync"], "deadline": "2026-11-22T09:45:00Z"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "is_fine"),
    [
        ({}, True),
        ({"prompt": None, "messages": [{"role": "user", "content": "hi"}]}, True),
        ({"prompt": None}, False),
        ({"messages": [{"role": "user", "content": "hi"}]}, False),
        ({"index": -1}, False),
        ({"id": "a b"}, False),
    ],
)
def test_a_request_fits_the_schema_if_and_only_if_it_is_one(
    change: dict[str, Any], is_fine: bool
) -> None:
    request = {**ASKED, "samples": [{**SAMPLE, **change}]}
    assert REQUEST.is_valid(request) == fits(RewardRequest, request) == is_fine


def test_the_promise_of_a_202_has_its_schema() -> None:
    promise = Draft202012Validator(SCHEMAS["accepted"])
    for content in ({"request_id": "rwq_1", "status": "accepted"}, {"request_id": "rwq_1"}):
        assert promise.is_valid(content) == fits(Accepted, content)


BLOCKS = [
    text.replace("…", "x").replace("<43 characters>", "x" * 43)
    for page in ("rewards.md", "rewards-async.md")
    for text in re.findall(
        r"^```json\n(\{.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL
    )
]


def test_the_guides_have_examples() -> None:
    assert len(BLOCKS) >= 5


@pytest.mark.parametrize("text", BLOCKS)
def test_an_example_in_the_guides_is_what_it_says_it_is(text: str) -> None:
    content = json.loads(text)
    kind = "request" if "samples" in content else "accepted" if "status" in content else "response"
    Draft202012Validator(SCHEMAS[kind]).validate(content)
