"""Thinking is kept or dropped, as a component asks for it, whatever it speaks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dar.protocol.reward_spec import RewardComponent, Rewards
from dar.rewards.base import RewardContext, RewardSample, strip_thinking
from dar.rewards.from_spec import RewardAccess, scorer_from_spec
from dar.rewards.http_reward import HttpOptions, HttpReward, protocol_of
from fakes.reward_server import RewardServer


def sample(completion: str, prompt: str = "p", **fields: Any) -> RewardSample:
    values: dict[str, Any] = {"completion_ids": [1, 2], **fields}
    return RewardSample("s0", "g0", 0, prompt, None, completion, "stop", 9, **values)


@pytest.mark.parametrize(
    ("completion", "left"),
    [
        ("4", "4"),
        (" 4 ", " 4 "),
        ("", ""),
        ("<think>2 and 2</think>\n\n4", "4"),
        ("  <think>a</think> 4 <think>b</think>!", "4 !"),
        ("So <think>a</think> 4", "So  4"),
        ("<think>never ends", ""),
        ("4 <think>never ends", "4 "),
        ("<think>a</think>4<think>b", "4"),
        ("<think><think>a</think>4", "4"),
        ("began in the prompt</think>\n4", "4"),
        ("a</think>4<think>b</think>5", "45"),
        ("<think></think>", ""),
        ("<Think>a</Think>4 <thinking>", "<Think>a</Think>4 <thinking>"),
    ],
)
def test_blocks_go_and_the_rest_stays(completion: str, left: str) -> None:
    assert strip_thinking(sample(completion)).completion == left


@pytest.mark.parametrize("fields", [{"prompt": "p\n<think>\n"}, {"prompt_text": "<u>hi<think>"}])
def test_a_prompt_that_opens_a_block_makes_the_completion_begin_inside(
    fields: dict[str, Any],
) -> None:
    assert strip_thinking(sample("still thinking", **fields)).completion == ""
    assert strip_thinking(sample("done</think> 4", **fields)).completion == "4"
    told = strip_thinking(sample("done</think> 4", **fields))
    assert (told.completion_ids, told.completion_tokens) == (None, 9)


@given(st.lists(st.sampled_from(["<think>", "</think>", "a", " ", "\n", "<"]), max_size=12))
def test_nothing_is_left_of_a_block_and_nothing_is_made_up(parts: list[str]) -> None:
    text = "".join(parts)
    left = strip_thinking(sample(text)).completion
    assert "<think>" not in left
    found = iter(text)
    assert all(letter in found for letter in left)  # a subsequence
    if "think>" not in text:
        assert left == text


PROTOCOLS: dict[str, dict[str, Any]] = {
    "dar.reward.v1": {},
    "openrlhf": {},
    "trl": {},
    "plain": {"template": {"a": "{{completion}}", "b": "{{text}}"}, "pointer": "/score"},
    "openai_grader": {"grader": {"type": "string_check"}},
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_every_protocol_sends_what_the_component_asks_for(
    protocol: str, hostile: Callable[..., RewardServer], fast: HttpOptions, context: RewardContext
) -> None:
    server = hostile(lambda request: request.answer(b"{}"))
    fields = {"name": "a", "url": server.url, "protocol": protocol, **PROTOCOLS[protocol]}
    component = RewardComponent.model_validate(fields)
    thinking = sample("<think>secret plan</think>\n\nfour")
    for is_stripped in (False, True):
        options = replace(fast, protocol=protocol_of(component), strip_thinking=is_stripped)
        await asked(server.url, thinking, options, context)
    bodies = [request.body.decode() for request in server.requests]
    kept, stripped = bodies[0], bodies[-1]
    assert "secret plan" in kept
    assert "four" in stripped
    assert "secret plan" not in stripped


async def asked(url: str, one: RewardSample, options: HttpOptions, context: RewardContext) -> None:
    source = HttpReward("a", url, options=options)
    await source.score([one], context)
    await source.aclose()


def test_a_builtin_sees_what_the_component_asks_for() -> None:
    exact = {"kind": "builtin", "fn": "exact_match", "params": {"values": ["4"]}}
    components = [{"name": "kept", **exact}, {"name": "bare", "strip_thinking": True, **exact}]
    with scorer_from_spec(
        Rewards.model_validate({"components": components}), RewardAccess()
    ) as scorer:
        [total] = scorer.score([sample("<think>2 + 2</think>4")], RewardContext(1))
    assert total.components == {"kept": 0.0, "bare": 1.0}


def test_a_reward_model_reads_whole_completions() -> None:
    fields = {"name": "rm", "kind": "hf_model", "model": "m", "strip_thinking": True}
    with pytest.raises(ValidationError, match="reads whole completions"):
        RewardComponent.model_validate(fields)
