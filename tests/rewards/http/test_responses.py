"""From bytes to rewards: what comes out was sent, or nothing comes out."""

import contextlib
import math
import tracemalloc
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dar.errors import InvalidRequestError, RewardContractError
from dar.protocol.ids import new_id
from dar.protocol.rewards import (
    MAX_REWARD,
    RewardRequest,
    SampleResult,
    decode_request,
    decode_response,
)
from dar.rewards.base import RequestBatch, RewardContext, RewardSample
from dar.rewards.http.wire import batches, encode_sample
from dar.rewards.protocols.native import NativeProtocol
from fakes.reward_types import MakeSamples

ID = "rwq_1"
patient = settings(deadline=None, derandomize=True)  # a busy machine is no failure
numbers = st.floats(-MAX_REWARD, MAX_REWARD) | st.integers(-(10**6), 10**6)
outcomes = st.one_of(
    st.builds(lambda reward: {"reward": reward}, numbers),
    st.just({"skip": True, "reason": "r"}),
    st.just({"error": {"code": "c", "message": "m", "retryable": True}}),
    st.just({"reward": None}),
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.floats(allow_nan=False)
    | st.integers(-(2**60), 2**60)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


def decode(content: object, count: int) -> list[SampleResult]:
    ids = [f"s{n}" for n in range(count)]
    return decode_response(orjson.dumps(content), request_id=ID, ids=ids)


@patient
@given(st.lists(numbers | st.none(), min_size=1, max_size=20))
def test_the_short_form_keeps_every_number_in_its_place(rewards: list[float | None]) -> None:
    found = decode({"request_id": ID, "rewards": rewards}, len(rewards))
    assert [result.reward for result in found] == rewards


@patient
@given(st.lists(outcomes, min_size=1, max_size=10), st.randoms())
def test_the_long_form_is_matched_by_id(given_outcomes: list[Any], random: Any) -> None:
    entries = [{"id": f"s{n}", **outcome} for n, outcome in enumerate(given_outcomes)]
    shuffled = random.sample(entries, len(entries))
    found = decode({"request_id": ID, "results": shuffled}, len(entries))
    assert [result.id for result in found] == [entry["id"] for entry in entries]
    assert [result.reward for result in found] == [entry.get("reward") for entry in entries]
    assert [result.skip for result in found] == [entry.get("skip", False) for entry in entries]
    assert [result.error is None for result in found] == ["error" not in e for e in entries]


def sent_numbers(value: object) -> set[float]:
    if isinstance(value, bool):
        return set()
    if isinstance(value, int | float):
        return {float(value)}
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return {number for item in inner for number in sent_numbers(item)}


@patient
@given(json_values | st.fixed_dictionaries({"request_id": st.just(ID), "rewards": json_values}))
def test_no_number_is_made_up_whatever_is_answered(content: Any) -> None:
    found = []
    with contextlib.suppress(RewardContractError):
        found = decode(content, 2)
    rewards = [result.reward for result in found if result.reward is not None]
    assert len(found) in {0, 2}
    assert all(math.isfinite(reward) for reward in rewards)
    assert set(rewards) <= sent_numbers(content)


@patient
@given(st.binary(max_size=200))
def test_bytes_that_mean_nothing_are_refused(body: bytes) -> None:
    with pytest.raises(RewardContractError):
        decode_response(body, request_id=ID, ids=["s0"])


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"request_id":"%s","rewards":[' + b'"",' * 200_000 + b'""]}', "contract.type"),
        (b'{"request_id":"%s","rewards":[' + b"1," * 200_000 + b"1]}", "contract.length"),
        (b'{"request_id":"%s","results":[' + b"{}," * 200_000 + b"{}]}", "contract.form"),
    ],
)
def test_an_answer_of_very_many_mistakes_is_refused_at_the_first(body: bytes, code: str) -> None:
    whole = body.replace(b"%s", ID.encode(), 1)
    tracemalloc.start()
    with pytest.raises(RewardContractError) as caught:
        decode_response(whole, request_id=ID, ids=["s0"])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert caught.value.error_code == code
    # What 200,000 empty objects take; an error for each would take ten times as much.
    assert peak < 40 * 1024**2


def test_parts_without_number_are_counted_before_they_are_looked_at() -> None:
    parts = {f"A{n}": "x" for n in range(100_000)}
    with pytest.raises(RewardContractError, match="at most 32 components, not 100000"):
        decode({"request_id": ID, "results": [{"id": "s0", "reward": 1, "components": parts}]}, 1)


def test_a_message_about_a_broken_answer_says_where_and_what() -> None:
    with pytest.raises(RewardContractError, match=r"rewards\.1: Input should be a valid number"):
        decode({"request_id": ID, "rewards": [1, "0.7"]}, 2)
    entries = [{"id": "s0", "reward": 1}, {"id": "s7", "reward": 1}]
    with pytest.raises(RewardContractError, match=r"1 missing .*s1.*, 1 unknown .*s7"):
        decode({"request_id": ID, "results": entries}, 2)


texts = st.text(st.characters(exclude_categories=()), max_size=30)
samples = st.builds(
    RewardSample,
    id=st.just("s0"),
    group_id=st.just("g0"),
    index=st.integers(0, 9),
    prompt=texts,
    messages=st.none(),
    completion=texts,
    finish_reason=st.sampled_from(["stop", "length"]),
    completion_tokens=st.integers(0, 99),
    columns=st.fixed_dictionaries({"ground_truth": texts, "level": texts, "secret": texts}),
)


def request_of(*given_samples: RewardSample, columns: list[str] | None = None) -> RewardRequest:
    now = datetime.now(UTC)
    context = RewardContext(3, "eval", "ftjob-1")
    batch = RequestBatch("rwq_1", "helpful", context, given_samples, columns, now, now)
    return decode_request(NativeProtocol().encode(batch))


@patient
@given(samples)
def test_what_is_encoded_is_a_strict_request_whatever_the_texts(sample: RewardSample) -> None:
    request = request_of(sample, columns=["ground_truth", "level", "absent"])
    (sent,) = request.samples
    assert sent.completion == sample.completion.encode("utf-8", "surrogatepass").decode(
        "utf-8", "replace"
    ) or not any("\ud800" <= ch <= "\udfff" for ch in sent.completion)
    assert len(sent.completion) == len(sample.completion)
    assert set(sent.columns) == {"level"}
    assert sent.metadata.truncated == (sample.finish_reason == "length")
    assert (request.component, request.step, request.mode) == ("helpful", 3, "eval")


def test_an_integer_of_any_size_goes_through_unchanged(make_samples: MakeSamples) -> None:
    columns = {"ground_truth": 2**70, "level": [-(2**64), 2**53 + 1, "é\ud800"]}
    (sample,) = make_samples(1, columns=columns)
    received = request_of(sample, columns=["level"]).samples[0]
    assert received.ground_truth == 2**70
    assert received.columns == {"level": [-(2**64), 2**53 + 1, "é\ufffd"]}


def test_only_the_ground_truth_is_sent_unless_more_is_allowed(make_samples: MakeSamples) -> None:
    (sample,) = make_samples(1, columns={"ground_truth": 42, "level": "x"})
    assert request_of(sample).samples[0].ground_truth == 42
    assert request_of(sample).samples[0].columns == {}
    allowed = request_of(sample, columns=["level"]).samples[0]
    assert (allowed.ground_truth, allowed.columns) == (42, {"level": "x"})


def test_messages_and_nested_columns_lose_their_lone_surrogates(make_samples: MakeSamples) -> None:
    message = {"role": "user", "content": "a\ud800b"}
    columns = {"ground_truth": {"\udfff": ["\ud800", 1, None]}}
    (sample,) = make_samples(1, prompt=None, messages=[message], columns=columns)
    sent = request_of(sample).samples[0]
    assert sent.messages == [{"role": "user", "content": "a\ufffdb"}]
    assert sent.ground_truth == {"\ufffd": ["\ufffd", 1, None]}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"[]", None),
        (b"{", None),
        (b"{}", "type"),
        (b'{"samples": NaN}', None),
    ],
)
def test_a_request_that_is_none_is_refused(body: bytes, param: str | None) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        decode_request(body)
    assert (caught.value.param or None) == param


def sizes(count: int, k: int, make_samples: MakeSamples, **limits: int) -> list[list[str]]:
    encoded = [encode_sample(sample, None, 0) for sample in make_samples(count, k)]
    limits = {"max_samples": 16, "max_bytes": 10**6, **limits}
    return [[sample.group_id for sample in batch] for batch in batches(encoded, **limits)]


def test_groups_stay_together_unless_one_alone_is_too_large(make_samples: MakeSamples) -> None:
    whole = sizes(12, 4, make_samples, max_samples=10)
    assert whole == [["g0"] * 4 + ["g1"] * 4, ["g2"] * 4]
    assert sizes(6, 6, make_samples, max_samples=4) == [["g0"] * 4, ["g0"] * 2]
    by_size = sizes(8, 4, make_samples, max_bytes=1600)
    assert by_size == [["g0"] * 4, ["g1"] * 4]
    assert sizes(3, 3, make_samples, max_bytes=1024) == [["g0"] * 2, ["g0"]]


def test_a_body_keeps_within_its_limit(make_samples: MakeSamples) -> None:
    now = datetime.now(UTC)
    context = RewardContext(10**9, "validate", "ftjob-" + "x" * 26)
    encoded = [encode_sample(sample, None, 0) for sample in make_samples(64, 4)]
    for batch in batches(encoded, max_samples=256, max_bytes=4096):
        sent = tuple(one.sample for one in batch)
        request = RequestBatch(new_id("rwq_"), "c" * 32, context, sent, None, now, now)
        assert len(NativeProtocol().encode(request)) <= 4096
