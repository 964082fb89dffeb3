"""What makes two samples equal, and which components remember rewards at all."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dar.protocol.reward_endpoints import merged
from dar.protocol.reward_spec import RewardComponent, Rewards
from dar.protocol.worker import ComponentAccess
from dar.rewards.base import RewardSample
from dar.rewards.cache.cache import CachePlace, Caches, SampleKey
from dar.rewards.from_spec import check_rewards


def sample(completion: str, **values: Any) -> RewardSample:
    base: dict[str, Any] = {
        "prompt": "p",
        "messages": None,
        "finish_reason": "stop",
        "completion_tokens": 2,
        **values,
    }
    return RewardSample("s0", "g0", 0, completion=completion, **base)


@pytest.mark.parametrize(
    "change",
    [
        {"completion": "b"}, {"prompt": "q"}, {"prompt": None, "messages": [{"role": "user", "content": "p"}]},
        {"finish_reason": "length"}, {"completion_tokens": 3}, {"columns": {"ground_truth": 8}},
        {"columns": {"ground_truth": 7, "topic": "sea"}}, {"columns": {"ground_truth": "7"}},
    ],
)  # fmt: skip
def test_what_a_service_can_see_makes_another_key(change: dict[str, Any]) -> None:
    key = SampleKey({"endpoint": "e"}, ["topic"])
    one = sample("a", columns={"ground_truth": 7, "topic": "sun", "unsent": 1})
    assert key(replace(one, **change)) != key(one)


@pytest.mark.parametrize(
    "change",
    [
        {"id": "s9"}, {"group_id": "g9"}, {"index": 9}, {"prompt_text": "<p>"}, {"completion_ids": [1]},
        {"columns": {"unsent": 2, "topic": {"b": 1, "a": 2}, "ground_truth": 7}},
    ],
)  # fmt: skip
def test_what_says_nothing_about_a_sample_makes_no_other_key(change: dict[str, Any]) -> None:
    key = SampleKey({"endpoint": "e"}, ["topic"])
    one = sample("a", columns={"ground_truth": 7, "topic": {"a": 2, "b": 1}, "unsent": 1})
    assert key(replace(one, **change)) == key(one)


def test_keys_know_what_only_some_services_see() -> None:
    one = sample("a", completion_ids=[1, 2], prompt_text="<p>")
    for sends, change in (
        ("sends_text", {"prompt_text": "p"}),
        ("sends_ids", {"completion_ids": [12]}),
    ):
        key = SampleKey({"endpoint": "e"}, **{sends: True})
        assert key(replace(one, **change)) != key(one), sends


def test_every_text_and_number_has_a_key() -> None:
    key = SampleKey({}, ["n"])
    odd = ["\ud800", "\ufffd", "\u0000", "", "é"]
    assert key(sample(odd[0])) == key(sample(odd[1])), "both travel as the same bytes"
    assert len({key(sample(text)) for text in odd}) == 4
    numbers = [2**64, 2**64 + 1, 1, 1.0, True, None]
    assert len({key(sample("a", columns={"n": number})) for number in numbers}) == 6


def component(**values: Any) -> RewardComponent:
    return RewardComponent.model_validate({"name": "r", "url": "https://a.example/", **values})


def access(**values: Any) -> ComponentAccess:
    given = {
        "url": "https://a.example/",
        "secrets": [],
        "headers": {},
        "endpoint_id": "rwe_1",
        "revision": 1,
    }
    return ComponentAccess(**{**given, **values})


GRADER = {"protocol": "openai_grader", "grader": {"type": "x"}}
PLAIN = {"protocol": "plain", "template": {"a": "{{completion}}"}, "pointer": "/a"}


def test_another_service_revision_or_wording_makes_another_key() -> None:
    described = [
        (component(), None), (component(url="https://b.example/"), None), (component(), access()),
        (component(), access(revision=2)), (component(), access(endpoint_id="rwe_2")),
        (component(name="s"), access()), (component(prompt_format="text"), access()),
        (component(columns=["topic"]), access()), (component(**PLAIN), access()),
        (component(**{**PLAIN, "template": {"b": "{{completion}}"}}), access()),
        (component(**{**PLAIN, "pointer": "/b"}), access()), (component(**PLAIN, coerce=True), access()),
        (component(**GRADER), access()), (component(**{**GRADER, "grader": {"type": "y"}}), access()),
        (component(protocol="trl"), access()), (component(protocol="openrlhf"), access()),
    ]  # fmt: skip
    keys = [SampleKey.of(*one)(sample("a")) for one in described]
    assert len(set(keys)) == len(described)
    equal = [
        (component(weight=0.5, clip=[0, 1], timeouts={"attempt": 9.0}), access()),
        (component(), access(url="https://b.example/", secrets=["whsec_x"])),
    ]
    assert {SampleKey.of(*one)(sample("a")) for one in equal} == {keys[2]}


def test_auto_remembers_where_a_probe_found_that_it_may(tmp_path: Path) -> None:
    caches = Caches(CachePlace(tmp_path / "job", tmp_path))
    steady = access(is_deterministic=True)
    for enabled, known, expected in (
        ("auto", steady, True), ("auto", access(), False), ("auto", None, False),
        (True, access(), True), (True, None, True), (False, steady, False),
    ):  # fmt: skip
        cache = caches.of(component(cache={"enabled": enabled}), known)
        assert (cache is not None) is expected, (enabled, known)
    assert caches.of(component(), steady) is not None, "auto is the default"


def test_the_scope_says_who_shares(tmp_path: Path) -> None:
    caches = Caches(CachePlace(tmp_path / "job-1", tmp_path))
    for scope in ("job", "endpoint"):
        caches.of(component(cache={"enabled": True, "scope": scope}), access())
    assert list(caches.stores) == [tmp_path / "job-1", tmp_path / "endpoint-rwe_1"]


def test_what_cannot_be_shared_is_refused() -> None:
    def problems(**values: Any) -> list[str]:
        one = {"name": "r", "cache": {"scope": "endpoint"}, **values}
        return [p.param for p in check_rewards(Rewards.model_validate({"components": [one]}))]

    assert problems(url="https://a.example/") == ["method.dar.rewards.components[0].cache.scope"]
    assert problems(endpoint="rwe_" + "0" * 26) == []


def test_an_endpoint_brings_what_a_component_leaves_out() -> None:
    own = RewardComponent.model_validate(
        {"name": "r", "endpoint": "rwe_" + "0" * 26, "cache": {"ttl_seconds": 60}}
    )
    both = merged(own, {"cache": {"enabled": True, "scope": "endpoint"}})
    assert both.cache.model_dump() == {"enabled": True, "scope": "endpoint", "ttl_seconds": 60.0}
