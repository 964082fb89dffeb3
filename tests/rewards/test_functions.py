"""Reward functions with TRL's signature."""

import asyncio
import functools
import importlib
import itertools
import math
import threading
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from dar.errors import ConfigurationError, InvalidRequestError, RewardContractError
from dar.protocol.rows import ARGUMENTS
from dar.rewards.base import Failed, RewardContext, RewardResult, Scored, Skipped
from dar.rewards.functions import FunctionReward, StepState, function_name
from fakes.reward_types import MakeSamples, Score


@pytest.fixture
def score(make_samples: MakeSamples, context: RewardContext) -> Score:
    async def run(function: Any, count: int = 2, **fields: Any) -> list[RewardResult]:
        return await FunctionReward(function).score(make_samples(count, **fields), context)

    return run


async def test_a_function_gets_texts_columns_ids_and_the_step(
    score: Score, context: RewardContext
) -> None:
    seen: dict[str, Any] = {}

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        seen.update(columns, prompts=prompts, completions=completions)
        return [1, 2.5]

    found = await score(reward, columns={"ground_truth": "a", "level": 3}, completion_ids=(7, 8))
    assert found == [Scored(1.0), Scored(2.5)]
    assert seen == {
        "prompts": ["p", "p"],
        "completions": ["c0", "c1"],
        "completion_ids": [[7, 8], [7, 8]],
        "ground_truth": ["a", "a"],
        "level": [3, 3],
        "trainer_state": StepState(global_step=context.steps_done),
    }


async def test_only_what_the_signature_names_is_passed(score: Score) -> None:
    def reward(completions: list[str], *, level: list[int]) -> list[int]:
        return level

    assert await score(reward, columns={"level": 3, "other": 1}) == [Scored(3.0)] * 2


async def test_ids_that_are_not_known_are_not_passed(score: Score) -> None:
    seen: list[Any] = []

    def reward(completions: list[str], completion_ids: Any = "none") -> list[float]:
        seen.append(completion_ids)
        return [0.0] * len(completions)

    await score(reward)
    await score(reward, completion_ids=())  # known: the completion is empty
    assert seen == ["none", [[], []]]


@pytest.mark.parametrize("name", ARGUMENTS)
async def test_a_column_never_replaces_an_argument_nor_is_replaced(score: Score, name: str) -> None:
    def reward(completions: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(completions)

    with pytest.raises(InvalidRequestError, match=f"column '{name}' has the name of an argument"):
        await score(reward, columns={name: 1})


async def test_a_column_that_some_rows_lack_is_none_there(
    make_samples: MakeSamples, context: RewardContext
) -> None:
    samples = make_samples(1, columns={"level": 1}) + make_samples(1)

    def reward(completions: list[str], level: list[int | None]) -> list[int | None]:
        return level

    assert await FunctionReward(reward).score(samples, context) == [Scored(1.0), Skipped()]


async def test_a_column_that_no_sample_has_is_named(score: Score) -> None:
    def reward(completions: list[str], level: list[int], tone: int = 3) -> list[int]:
        return level

    with pytest.raises(InvalidRequestError, match="reward needs the column 'level'") as caught:
        await score(reward, columns={"other": 1})
    assert caught.value.error_code == "missing_column"


async def test_a_conversation_is_passed_as_messages(score: Score) -> None:
    seen: list[Any] = []

    def reward(prompts: Any, completions: Any) -> list[float]:
        seen.extend([prompts[0], completions[0]])
        return [0.0, 0.0]

    messages = [{"role": "user", "content": "hi"}]
    await score(reward, prompt=None, messages=messages)
    assert seen == [messages, [{"role": "assistant", "content": "c0"}]]


@pytest.mark.parametrize(
    "value", [10**400, -(10**5000), Fraction(10**400)], ids=["long", "longer", "fraction"]
)
@pytest.mark.parametrize("form", ["a number", "a mapping"])
async def test_a_number_beyond_a_float_is_out_of_range_for_its_sample(
    score: Score, form: str, value: Any
) -> None:
    one = value if form == "a number" else {"reward": value}
    failed, scored = await score(lambda completions: [one, 1], 2)
    assert isinstance(failed, Failed)
    assert failed.code == "out_of_range"
    assert scored == Scored(1.0)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (3, "a value of the type int"),
        ([1j], "a value of the type complex as a reward"),
        ([()], "type tuple"),
    ],
)
async def test_a_value_of_another_type_is_named_by_its_type(
    score: Score, value: Any, says: str
) -> None:
    with pytest.raises(RewardContractError, match=says):
        await score(lambda completions: value, 1)


async def test_none_is_a_skip_and_what_is_no_number_a_failure(score: Score) -> None:
    values = [None, math.nan, math.inf, -math.inf, 1e9, True, 0]
    found = await score(lambda completions: values, 7)
    assert found[0] == Skipped()
    assert [result.code for result in found[1:5]] == ["nonfinite"] * 3 + ["out_of_range"]
    assert not any(result.is_transient for result in found[1:5] if isinstance(result, Failed))
    assert found[5:] == [Scored(1.0), Scored(0.0)]


async def test_numbers_of_any_type_are_rewards(score: Score) -> None:
    values = [np.float32(0.5), np.longdouble(2), np.True_, np.array(3.0), torch.tensor([4])]
    values += [Fraction(1, 4), Decimal("0.75"), np.float16(math.nan)]
    found = await score(lambda completions: iter(values), len(values))
    assert found[:-1] == [Scored(number) for number in (0.5, 2.0, 1.0, 3.0, 4.0, 0.25, 0.75)]
    assert found[-1].code == "nonfinite"
    listings = (np.array([1, 2]), np.array([[1], [2]]), torch.tensor([[1.0], [2.0]]), [np.array([[1]]), np.array([2.0])])  # fmt: skip
    for listing in listings:
        found = await score(lambda completions, listing=listing: listing)
        assert found == [Scored(1.0), Scored(2.0)]


@pytest.mark.parametrize(
    ("returned", "code"),
    [
        ([1.0], "contract.length"),
        ([1.0, 2.0, 3.0], "contract.length"),
        ([], "contract.length"),
        (1.0, "contract.type"),
        (None, "contract.type"),
        ("ab", "contract.type"),
        ({"a": 1, "b": 2}, "contract.type"),
        (["1.0", "2.0"], "contract.type"),
        ([[1.0], [2.0]], "contract.type"),
        ([1j, 2j], "contract.type"),
        ([np.complex128(1 + 2j), 1], "contract.type"),
        ([np.complex64(1), 1], "contract.type"),
        (np.array([1 + 2j, 0]), "contract.type"),
        (np.array(["1.5", "2"]), "contract.type"),
        ([np.str_("1.5"), 1], "contract.type"),
        ([np.bytes_(b"1.5"), 1], "contract.type"),
        ([bytearray(b"1"), 1], "contract.type"),
        ([np.array("1.5"), 1], "contract.type"),
        ([np.timedelta64(5, "s"), 1], "contract.type"),
        ([torch.tensor(1 + 2j), 1], "contract.type"),
        ([torch.tensor([1.0, 2.0]), 1], "contract.type"),
        ([np.timedelta64(5, "ns"), 1], "contract.type"),
        ([np.datetime64(5, "ns"), 1], "contract.type"),
        (np.array([1, 2], dtype="datetime64[ns]"), "contract.type"),
        (np.array([1, 2], dtype="timedelta64[ns]"), "contract.type"),
        (importlib.import_module("pandas").DataFrame([[0.5] * 2] * 2), "contract.type"),
        (memoryview(b"ab"), "contract.type"),
        (itertools.count(), "contract.length"),
        (itertools.repeat(1.0), "contract.length"),
        (iter([1.0]), "contract.length"),
        ({1.0, 2.0}, "contract.type"),
        (frozenset({1.0, 2.0}), "contract.type"),
        ({1.0: "a", 2.0: "b"}.keys(), "contract.type"),
        (bytearray(b"ab"), "contract.type"),
        (np.array(1.0), "contract.type"),
        (torch.tensor(1.0), "contract.type"),
    ],
)
async def test_another_return_value_is_refused_by_name(
    score: Score, returned: Any, code: str
) -> None:
    def my_reward(completions: list[str]) -> Any:
        return returned

    with pytest.raises(RewardContractError, match="my_reward returned") as caught:
        await score(my_reward)
    assert caught.value.error_code == code


async def agreeing(completions: list[str]) -> Any:
    for _ in completions:
        yield 1.0


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda completions: None, "returned None; it must return a list"),
        (lambda completions: [7j, 1], "returned a value of the type complex as a reward; it must"),
        (agreeing, "returned a value of the type async_generator; it must return a list"),
        (lambda completions: itertools.count(), "returned more than 2 rewards for 2 completions"),
        (lambda completions: [1.0] * 5, "returned 5 rewards for 2 completions"),
        (lambda completions: iter([1.0]), "returned 1 reward for 2 completions"),
    ],
)
async def test_what_a_function_returned_is_said_in_words(
    score: Score, function: Any, said: str
) -> None:
    with pytest.raises(RewardContractError, match=said):
        await score(function)


async def test_what_a_function_raises_comes_out_unchanged_after_one_call(score: Score) -> None:
    calls: list[int] = []
    error = TypeError("my own")

    def reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        calls.append(1)
        raise error

    with pytest.raises(TypeError) as caught:
        await score(reward)
    assert caught.value is error
    assert len(calls) == 1


class Judge:
    """A callable object."""

    def __call__(self, completions: list[str]) -> list[int]:
        return [len(text) for text in completions]


class AsyncJudge:
    """A callable object whose call is a coroutine."""

    async def __call__(self, completions: list[str], **columns: Any) -> list[int]:
        await asyncio.sleep(0)
        return [len(text) for text in completions]


async def async_length(completions: list[str], factor: int = 1) -> list[int]:
    await asyncio.sleep(0)
    return [factor * len(text) for text in completions]


@pytest.mark.parametrize(
    "function", [Judge(), AsyncJudge(), async_length, functools.partial(async_length, factor=1)]
)
async def test_every_kind_of_callable_works(score: Score, function: Any) -> None:
    assert await score(function) == [Scored(2.0)] * 2


class Method:
    """A reward function that is a method with any columns."""

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        return [1.0 for _ in completions]

    def judge(self, completions: list[str], **columns: Any) -> list[float]:
        return [1.0 for _ in completions]


@pytest.mark.parametrize("function", [Method(), Method().judge])
async def test_a_column_named_as_the_object_of_a_method_is_refused(
    score: Score, function: Any
) -> None:
    assert await score(function, columns={"other": 1}) == [Scored(1.0)] * 2
    with pytest.raises(InvalidRequestError, match="the column 'self' has the name of the first"):
        await score(function, columns={"self": 1})


async def test_a_column_named_self_reaches_a_plain_function(score: Score) -> None:
    assert (
        await score(lambda completions, **columns: columns["self"], columns={"self": 3})
        == [Scored(3.0)] * 2
    )


async def test_a_plain_function_may_block(score: Score) -> None:
    released = threading.Event()

    def reward(completions: list[str]) -> list[float]:
        assert released.wait(5)
        return [1.0, 1.0]

    waiting = asyncio.create_task(score(reward))
    await asyncio.sleep(0.01)  # the loop goes on
    released.set()
    assert await waiting == [Scored(1.0)] * 2


def test_a_function_without_completions_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"f\(prompts, completions, \*\*columns\)"):
        FunctionReward(lambda x, y: [])


@pytest.mark.parametrize(
    ("function", "name"),
    [(async_length, "async_length"), (Judge(), "judge"), (lambda completions: [], "lambda")],
)
def test_a_component_is_named_after_its_function(function: Any, name: str) -> None:
    assert function_name(function) == name


async def test_a_mapping_says_more_than_a_number(score: Score) -> None:
    returned = [
        {"reward": True, "components": {"part": 2}, "feedback": "why"},
        {"reward": None},
        {"skip": True, "reason": "no maths"},
        {"error": "the judge is down"},
        {"error": {"code": "late", "message": "m", "retryable": True}},
        {"reward": math.inf},
        {"reward": 1.0, "components": {"part": math.nan}},
        {"reward": 1e7},
    ]
    found = await score(lambda completions: returned, count=len(returned))
    assert found[:5] == [
        Scored(1.0, {"part": 2.0}, "why"),
        Skipped(),
        Skipped("no maths"),
        Failed("error", "the judge is down", is_transient=False),
        Failed("late", "m", is_transient=True),
    ]
    assert [result.code for result in found[5:]] == ["nonfinite", "nonfinite", "out_of_range"]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"score": 1.0}, "a mapping with 'score'; it may have components, error"),
        ({}, "returned a mapping: give exactly one of reward, skip and error"),
        ({"reward": 1.0, "skip": True}, "exactly one of reward, skip and error"),
        ({"reward": "0.7"}, "reward: Input should be a valid number"),
        ({"reward": np.str_("0.7")}, "reward: Input should be a valid number"),
        ({"reward": np.complex128(1j)}, "reward: Input should be a valid number"),
        ({"reward": 1.0, "components": {"part": np.complex64(1)}}, "components.part"),
        ({"reward": 1.0, "components": {"Part": 1.0}}, "components.Part"),
        ({"reward": 1.0, "components": [1.0]}, "components: Input should be a valid dictionary"),
    ],
)
async def test_a_mapping_that_is_no_result_is_refused(
    score: Score, returned: Any, message: str
) -> None:
    with pytest.raises(RewardContractError, match=message):
        await score(lambda completions: [returned], count=1)
