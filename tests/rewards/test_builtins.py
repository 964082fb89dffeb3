"""Builtins: each does what its description says, for every text, in time that grows with the text
alone.
"""

import time
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dar.errors import InvalidRequestError
from dar.rewards.base import Failed, RewardContext, RewardSample, Scored, Skipped
from dar.rewards.builtins.base import BuiltinReward
from dar.rewards.builtins.numbers import answer_in
from dar.rewards.builtins.registry import BUILTINS, make_builtin

TEXT = st.text(st.characters(codec=None, categories=None), max_size=60)
"""Any text, lone surrogates included."""
EXAMPLES: Mapping[str, dict[str, Any]] = {
    "contains": {"values": ["a"]},
    "exact_match": {},
    "format_tags": {"tags": ["think", "answer"]},
    "json_valid": {"type": "object", "keys": ["a"], "fenced": True},
    "length_penalty": {"target": 3, "unit": "characters"},
    "numeric_answer": {},
    "overlong_penalty": {"max_tokens": 10, "buffer_tokens": 4},
    "regex_match": {"pattern": "(a+)+$"},
    "repetition_penalty": {"n": 2},
}


def sample(completion: str, tokens: int = 1, **columns: Any) -> RewardSample:
    return RewardSample("s0", "g0", 0, "p", None, completion, "stop", tokens, columns=columns)


def reward(
    fn: str, params: dict[str, Any], completion: str, tokens: int = 1, **columns: Any
) -> Any:
    found = make_builtin(fn, params).score(sample(completion, tokens, **columns))
    return found.reward if isinstance(found, Scored) else found


def test_every_builtin_is_tried_here() -> None:
    assert EXAMPLES.keys() == BUILTINS.keys()


@pytest.mark.parametrize("fn", EXAMPLES)
@example(completion="\ud800", truth=None)
@given(
    completion=TEXT, truth=st.none() | TEXT | st.integers() | st.floats() | st.lists(st.integers())
)
def test_whatever_a_completion_holds_there_is_one_bounded_result(
    fn: str, completion: str, truth: Any
) -> None:
    builtin = make_builtin(fn, EXAMPLES[fn])
    found = builtin.score(sample(completion, ground_truth=truth))
    assert isinstance(found, Scored | Skipped | Failed)
    assert repr(builtin.score(sample(completion, ground_truth=truth))) == repr(found)
    if isinstance(found, Scored):
        assert -1 <= found.reward <= 1


@pytest.mark.parametrize("fn", EXAMPLES)
@pytest.mark.parametrize(
    "completion",
    [
        "a" * 200_000 + "!",
        "1" * 200_000,
        "1," * 100_000,
        "111," * 50_000 + "1111x",
        "\\boxed{" * 30_000,
        "[" * 200_000,
        "<think>" * 30_000,
        "{" * 100_000 + "}" * 100_000,
        "1/" * 100_000,
        "²" * 200_000,
        "^{{}" * 50_000,
        "x 10^" * 40_000,
        " " * 200_000,
        "-" * 200_000,
        "1e" * 100_000,
    ],
)
def test_no_text_takes_longer_than_its_length(fn: str, completion: str) -> None:
    started = time.process_time()
    make_builtin(fn, EXAMPLES[fn]).score(sample(completion, ground_truth="3"))
    assert time.process_time() - started < 20  # a quadratic one takes minutes


async def test_a_builtin_is_a_source_of_rewards() -> None:
    source = BuiltinReward("short", make_builtin("length_penalty", {"target": 2}))
    found = await source.score([sample("x", 1), sample("x", 3)], RewardContext(1))
    assert found == [Scored(0.0), Scored(-0.5)]
    assert source.name == "short"
    await source.aclose()


@pytest.mark.parametrize(
    ("fn", "params", "param", "message"),
    [
        ("shortness", {}, "fn", "no builtin 'shortness'; there are contains, exact_match"),
        ("length_penalty", {}, "params.target", "parameters of length_penalty: target, scale"),
        ("length_penalty", {"target": 1, "to": 2}, "params.to", "parameters of length_penalty"),
        ("length_penalty", {"target": "1"}, "params.target", "integer"),
        ("length_penalty", {"target": 1, "scale": float("nan")}, "params.scale", "finite"),
        ("overlong_penalty", {"max_tokens": 2, "buffer_tokens": 3}, "params", "buffer_tokens"),
        ("regex_match", {"pattern": "(?=a)"}, "params.pattern", "neither look-around"),
        ("regex_match", {"pattern": "("}, "params.pattern", "missing"),
        ("exact_match", {"values": ["a"], "column": "b"}, "params", "not both"),
        ("contains", {"values": ["a", " "]}, "params", "blank"),
        ("json_valid", {"keys": ["a"]}, "params", "only objects"),
        ("format_tags", {"tags": ["a", "a"]}, "params.tags", "twice"),
        ("format_tags", {"tags": ["a>"]}, "params.tags[0]", "pattern"),
    ],
)  # fmt: skip
def test_parameters_that_cannot_work_are_refused_by_name(
    fn: str, params: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message) as refused:
        make_builtin(fn, params)
    assert refused.value.problems[0].param == param


# --- lengths --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "tokens", "expected"),
    [
        ({"target": 4}, 4, 0.0), ({"target": 4}, 5, -0.25), ({"target": 4}, 8, -1.0), ({"target": 4}, 80, -1.0),
        ({"target": 4, "scale": 2}, 5, -0.5), ({"target": 4, "max_penalty": 3}, 20, -3.0),
        ({"target": 4, "both_sides": True}, 2, -0.5), ({"target": 0}, 1, -1.0),
    ],
)  # fmt: skip
def test_length_is_penalised_beyond_the_target(
    params: dict[str, Any], tokens: int, expected: float
) -> None:
    assert reward("length_penalty", params, "x", tokens) == expected


def test_length_is_counted_in_the_unit_that_was_asked_for() -> None:
    assert reward("length_penalty", {"target": 2, "unit": "words"}, "one two  three", 99) == -0.5
    assert reward("length_penalty", {"target": 2, "unit": "characters"}, "äöü", 99) == -0.5


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 10**4), st.integers(1, 10**4))
def test_a_longer_completion_is_never_better(short: int, more: int, most: int, buffer: int) -> None:
    params = {"max_tokens": max(most, buffer), "buffer_tokens": buffer}
    for fn, given_params in (("overlong_penalty", params), ("length_penalty", {"target": most})):
        assert (
            -1
            <= reward(fn, given_params, "", short + more)
            <= reward(fn, given_params, "", short)
            <= 0
        )


@pytest.mark.parametrize(
    ("tokens", "expected"), [(1, 0.0), (6, 0.0), (7, -0.5), (9, -1.5), (10, -2.0), (50, -2.0)]
)
def test_the_overlong_penalty_has_the_slope_of_dapo(tokens: int, expected: float) -> None:
    params = {"max_tokens": 10, "buffer_tokens": 4, "penalty": 2}
    assert reward("overlong_penalty", params, "x", tokens) == expected


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        ("a b c d", 2, 0.0),
        ("a b a b", 2, -1 / 3),
        ("a A a a", 1, -0.75),
        ("a b", 3, 0.0),
        ("", 1, 0.0),
    ],
)
def test_repeated_ngrams_are_penalised_by_their_share(text: str, n: int, expected: float) -> None:
    assert reward("repetition_penalty", {"n": n}, text) == pytest.approx(expected)


def test_ngrams_are_compared_unit_by_unit() -> None:
    assert reward("repetition_penalty", {"n": 2, "unit": "characters"}, "abab") == pytest.approx(
        -1 / 3
    )


# --- texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "text", "expected"),
    [
        ({"pattern": "b"}, "abc", 1.0), ({"pattern": "^b"}, "abc", 0.0), ({"pattern": "b", "mode": "full"}, "abc", 0.0),
        ({"pattern": "a.c", "mode": "full"}, "abc", 1.0), ({"pattern": "(?i)B"}, "abc", 1.0), ({"pattern": "B"}, "abc", 0.0),
        ({"pattern": "(?m)^c$"}, "a\nc", 1.0), ({"pattern": "\ufffd"}, "a\ud800", 1.0),
        ({"pattern": "x", "match": 2, "no_match": -3}, "abc", -3.0),
    ],
)  # fmt: skip
def test_patterns_are_looked_for(params: dict[str, Any], text: str, expected: float) -> None:
    assert reward("regex_match", params, text) == expected


@pytest.mark.parametrize(
    ("fn", "params", "text", "truth", "expected"),
    [
        ("exact_match", {}, " Paris\n", "Paris", 1.0), ("exact_match", {}, "paris", "Paris", 0.0),
        ("exact_match", {"ignore_case": True}, "STRASSE", "Straße", 1.0), ("exact_match", {"strip": False}, "a ", "a", 0.0),
        ("exact_match", {}, "b", ["a", "b"], 1.0), ("exact_match", {"values": ["c"]}, "c", "a", 1.0),
        ("exact_match", {}, "", "", 1.0),
        ("contains", {}, "It is Paris.", "Paris", 1.0), ("contains", {}, "It is Rome.", "Paris", 0.0),
        ("contains", {}, "a", ["a", "b"], 1.0), ("contains", {"every": True}, "a", ["a", "b"], 0.0),
        ("contains", {"every": True}, "b a", ["a", "b"], 1.0),
    ],
)  # fmt: skip
def test_texts_are_compared(
    fn: str, params: dict[str, Any], text: str, truth: Any, expected: float
) -> None:
    assert reward(fn, params, text, ground_truth=truth) == expected


@pytest.mark.parametrize("fn", ["exact_match", "contains", "numeric_answer"])
def test_without_the_rows_value_a_sample_is_skipped_and_with_a_wrong_one_it_fails(fn: str) -> None:
    assert reward(fn, {}, "a") == Skipped("the row has no ground_truth")
    assert reward(fn, {}, "a", ground_truth=None) == Skipped("the row has no ground_truth")
    wrongs: list[Any] = [True, {}, [], [1]]
    for wrong in wrongs:
        found = reward(fn, {}, "a", ground_truth=wrong)
        assert isinstance(found, Failed)
        assert found.code == "column_type"
    assert make_builtin(fn, {"column": "answer"}).columns == ["answer"]


def test_an_empty_text_is_not_looked_for() -> None:
    assert isinstance(reward("contains", {}, "a", ground_truth=" "), Failed)


@pytest.mark.parametrize(
    ("params", "text", "expected"),
    [
        ({}, ' {"a": 1} ', 1.0), ({}, "{'a': 1}", 0.0), ({}, "NaN", 0.0), ({}, "", 0.0), ({}, "[1] x", 0.0), ({}, "[" * 5000, 0.0),
        ({}, "9" * 4000, 1.0), ({"type": "array"}, "{}", 0.0), ({"type": "array"}, "[]", 1.0), ({"type": "object"}, "[]", 0.0),
        ({"type": "object", "keys": ["a"]}, '{"a": null}', 1.0), ({"type": "object", "keys": ["a"]}, '{"b": 1}', 0.0),
        ({"fenced": True}, "```json\n[1]\n```", 1.0), ({}, "```json\n[1]\n```", 0.0), ({"fenced": True}, "``````", 0.0),
        ({"fenced": True}, "see ```[1]```", 0.0), ({"fenced": True}, "[1]", 1.0),
    ],
)  # fmt: skip
def test_json_is_valid_or_not(params: dict[str, Any], text: str, expected: float) -> None:
    assert reward("json_valid", params, text) == expected


@pytest.mark.parametrize(
    ("text", "outside", "expected"),
    [
        ("<think>a</think>\n<answer>b</answer>", False, 1.0), ("<think></think><answer></answer>", False, 1.0),
        ("x<think>a</think><answer>b</answer>", False, 0.0), ("x<think>a</think><answer>b</answer>", True, 1.0),
        ("<think>a</think>x<answer>b</answer>", False, 0.0), ("<think>a</think><answer>b</answer>x", False, 0.0),
        ("<answer>b</answer><think>a</think>", True, 0.0), ("<think>a<answer>b</answer></think>", True, 0.0),
        ("<think>a</think><answer>b", True, 0.0), ("<think>a</think><answer>b</answer></answer>", True, 0.0), ("", True, 0.0),
    ],
)  # fmt: skip
def test_tags_stand_in_order_and_once(text: str, outside: bool, expected: float) -> None:
    assert (
        reward("format_tags", {"tags": ["think", "answer"], "outside": outside}, text) == expected
    )


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is 42.", 42), ("5-3", 3), ("so x=-7", -7), ("1,234.50 dollars", Fraction(2469, 2)), ("1/3", Fraction(1, 3)),
        ("first 3 then 4", 4), ("1e3", 1000), (".5", Fraction(1, 2)), ("\u22125", -5), ("x2", None), ("", None), ("none", None),
        ("9 \\boxed{8} 7", 8), ("\\boxed{1} \\boxed{2}", 2), ("\\boxed{\\frac{3}{4}}", Fraction(3, 4)),
        ("\\boxed{-\\dfrac{1}{2}}", Fraction(-1, 2)), ("\\boxed{x = 3}", 3), ("\\boxed{\\$1,000}", 1000), ("\\boxed{3", None),
        ("\\boxed{} 3", None), ("\\boxed{42\\text{ cm}}", 42), ("1/0", None), ("1" * 2000, None), ("1e99999", None),
        ("1e-5", Fraction(1, 100_000)),
    ],
)  # fmt: skip
def test_the_answer_is_the_last_box_or_else_the_last_number(
    text: str, expected: Fraction | int | None
) -> None:
    assert answer_in(text) == expected


@given(st.integers(-(10**30), 10**30), st.integers(1, 10**9))
def test_any_way_of_writing_a_number_is_that_number(top: int, bottom: int) -> None:
    assert answer_in(f"= {top}") == top
    assert answer_in(f"= {top:,}.") == top
    assert answer_in(f"\\boxed{{{top}/{bottom}}}") == Fraction(top, bottom)
    assert answer_in(f"\\boxed{{\\frac{{{top}}}{{{bottom}}}}}") == Fraction(top, bottom)
    assert reward("numeric_answer", {}, f"{top}", ground_truth=top) == 1.0
    assert reward("numeric_answer", {}, f"{top}", ground_truth=top + 1) == 0.0


@given(st.floats(-1e6, 1e6))
def test_a_float_of_the_row_is_the_decimal_that_was_written(number: float) -> None:
    assert reward("numeric_answer", {}, repr(number), ground_truth=number) == 1.0


@pytest.mark.parametrize(
    ("params", "text", "truth", "expected"),
    [
        ({}, "0.1", "1/10", 1.0), ({}, "0.30000000000000004", 0.3, 0.0), ({"tolerance": 0.01}, "3.15", 3.14, 1.0),
        ({"tolerance": 0.01}, "3.16", 3.14, 0.0), ({}, "18", "9 * 2 = 18\n#### 18", 1.0), ({}, "no idea", 3, 0.0),
        ({"wrong": -1, "correct": 2}, "4", 3, -1.0), ({}, "4.0", 4, 1.0),
    ],
)  # fmt: skip
def test_numbers_are_compared_exactly(
    params: dict[str, Any], text: str, truth: Any, expected: float
) -> None:
    assert reward("numeric_answer", params, text, ground_truth=truth) == expected


MIXED = ("1 1/2", "It is 1 1/2 cups", "1½", "1 ½", "1\u00a01/2", "1\u20091\u20442", "1¹\u2044₂", "\\boxed{1 1/2}", "1\\frac{1}{2}", "$1\\dfrac12$", "It is $1\\,\\tfrac{1}{2}$.", "\\boxed{1\\frac 12}", "1 2/4", "1 1 / 2 %", "1.5", "3/2")  # fmt: skip


@pytest.mark.parametrize(
    ("truths", "value"),
    [
        (MIXED, "1.5"), (tuple(f"-{text}" for text in ("1 1/2", "1½", "1\\frac{1}{2}", "$1 1/2$")), "-1.5"), (("\u2212 1 1/2", "It is \u22121 1/2."), "-1.5"),
        (("1 000", "1\u202f000", "1\\,000", "1{,}000", "1,\\!000", "\\boxed{1 000}", "It is 1 000 m", "1 000.0"), "1000"),
        (("1 000 1/2", "1,000 1/2", "It is 1 000½", "2 001/2"), "1000.5"), (("12 345 678",), "12345678"),
        (("½", "\\frac12", "\\boxed{\\frac 12}", "\\frac{1}2", "It is \\frac{1}{2}", "-\\frac{-1}{2}", "\\frac{1.5}{3}", "\\frac{1}{2}x", "1 / 2"), "0.5"),
        (("50%", "50\\%", "5 * 10 = 50", "1 2 3\n#### 50", "$50$", "\\$50"), "50"), (("-$5", "- 5", "$-5$"), "-5"),
    ],
)  # fmt: skip
def test_a_number_is_read_in_each_way_that_people_write_it(
    truths: tuple[str, ...], value: str
) -> None:
    wanted = Fraction(value)
    for text in truths:
        answer = text if "is" in text or "box" in text else f"\\boxed{{{text}}}"
        assert answer_in(answer) == wanted, text
        assert reward("numeric_answer", {}, value, ground_truth=text) == 1.0, text


@pytest.mark.parametrize(
    ("texts", "value"),
    [
        (("42 m^2", "42 m^{2}", "42 \\text{ m}^2", "\\boxed{42\\text{ cm}^3}", "42 cm²", "42 m<sup>2</sup>", "42 (m/s)^2", "42 m**2", "42^\\circ", "42^{\\text{nd}}", "42 J kg^{-1} K^-1", "x_{1} = 42"), "42"),
        (("9.8 m/s^2", "9.8 m s^{-2}", "It is 9.8 m/s²."), "9.8"),
        (("3.5 x 10^8", "3.5 \\times 10^{8}", "3.5 \u00d7 10⁸ m/s", "3.5 \\cdot 10^8", "3.5*10**8", "3.5e8", "It is 3.5 x 10<sup>8</sup> m^2", "7/2 x 10^8"), "350000000"),
        (("10^{-3}", "10^-3", "10⁻³ m", "1/10^3", "1 x 10^{-3}"), "0.001"), (("2^{10}", "2**10", "2¹⁰", "(-2)^10", "x^2 = 2^10"), "1024"),
        (("\\left(\\frac{2}{3}\\right)^2", "\\frac23^2"), "4/9"), (("-2^2",), "-4"),
    ],
)  # fmt: skip
def test_an_exponent_is_part_of_its_power_or_of_its_unit(
    texts: tuple[str, ...], value: str
) -> None:
    wanted = Fraction(value)
    for text in texts:
        assert answer_in(text) == wanted, text
        assert reward("numeric_answer", {}, value, ground_truth=text) == 1.0, text


@pytest.mark.parametrize("text", ["2^n", "2^{1/2}", "(x+1)^2", "10^99999", "0^-1", "x^2", "x_{1}"])
def test_a_power_that_is_no_fraction_is_no_answer(text: str) -> None:
    found = reward("numeric_answer", {}, "2", ground_truth=text)
    assert isinstance(found, Failed)
    assert found.code == "column_type"
    assert answer_in(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "12 34", "1, 234", "1,5", "1.234,50", "(1, 2)", "12\n34", "1 00", "1 0000", "0 100", "1 3/2", "1 1/0", "1\\frac{3}{2}", "$1$$2$", "12 34 cm",
        "1\\frac{1}{2}\\frac{1}{2}", "\\frac123", "½3", "1 2 100",
    ],
)  # fmt: skip
def test_numbers_side_by_side_are_not_made_into_one(text: str) -> None:
    found = reward("numeric_answer", {}, "1", ground_truth=text)
    assert isinstance(found, Failed)
    assert found.code == "column_type"
    assert answer_in(f"\\boxed{{{text}}}") is None


def test_a_row_whose_answer_is_no_number_is_a_failure() -> None:
    for wrong in ("Paris", float("nan"), True):
        assert isinstance(reward("numeric_answer", {}, "1", ground_truth=wrong), Failed)
