r"""The builtin for answers that are numbers, which it compares exactly, as fractions.

The answer of a completion is its last ``\boxed{…}`` if there is one, else its last number.
"""

import re
from decimal import Decimal
from fractions import Fraction
from typing import Annotated, ClassVar

from pydantic import Field

from dar.rewards.base import Failed, RewardResult, RewardSample, Scored, Skipped
from dar.rewards.builtins.base import Builtin, ColumnName, Reward

MAX_DIGITS = 1000
"""Digits of the longest number, and the largest exponent of ten, that are read."""
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_NUMBER = rf"[-+]?(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
# Not inside a word or another number: the 2 of "x2", the 3 of "1.2.3". "5-3" is 5 and 3.
_IN_TEXT = re.compile(rf"(?<![\w.])({_NUMBER})(?:\s?/\s?({_DIGITS})(?![\w/]))?", re.ASCII)
_ALONE = re.compile(rf"({_NUMBER})(?:/([-+]?{_DIGITS}))?", re.ASCII)
_FRACTION = re.compile(rf"([-+]?)\\[dt]?frac\{{({_NUMBER})\}}\{{({_NUMBER})\}}", re.ASCII)
_BOXED = "\\boxed{"
_DECORATION = re.compile(r"\\[,!;: ]|\\\$|\$|\s|\\left|\\right")


def answer_in(text: str) -> Fraction | None:
    """The number that a text answers with; None: there is none."""
    text = text.replace("\u2212", "-")
    boxed = _last_boxed(text)
    if boxed is not None:
        return _value(boxed) if boxed else None
    return _last_number(text)


def _value(text: str) -> Fraction | None:
    """The text as one number, possibly in LaTeX, else its last number."""
    plain = _DECORATION.sub("", text)
    if (alone := _ALONE.fullmatch(plain)) is not None:
        return _fraction(alone[1], alone[2])
    if (fraction := _FRACTION.fullmatch(plain)) is not None:
        value = _fraction(fraction[2], fraction[3])
        return None if value is None else (-value if fraction[1] == "-" else value)
    return _last_number(text)


def _last_number(text: str) -> Fraction | None:
    found = None
    for match in _IN_TEXT.finditer(text):
        found = match
    return None if found is None else _fraction(found[1], found[2])


def _last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{…}``; empty if it is not closed; None if there is none."""
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    depth, begin = 1, start + len(_BOXED)
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place]
    return ""


def _fraction(numerator: str, denominator: str | None = None) -> Fraction | None:
    top = _exact(numerator)
    bottom = Fraction(1) if denominator is None else _exact(denominator)
    return None if top is None or not bottom else top / bottom


def _exact(text: str) -> Fraction | None:
    """A number without rounding; None: it is too long."""
    plain = text.replace(",", "")
    _, _, exponent = plain.lower().partition("e")
    if len(plain) > MAX_DIGITS or len(exponent) > 5 or abs(int(exponent or 0)) > MAX_DIGITS:
        return None
    return Fraction(Decimal(plain))


class NumericAnswer(Builtin):
    r"""``correct`` if the completion's answer equals the row's, else ``wrong``.

    Understands integers, decimals, thousands with commas, exponents, ``a/b`` and ``\frac{a}{b}``.
    """

    fn: ClassVar[str] = "numeric_answer"

    column: ColumnName = "ground_truth"
    """Column of the row with the right answer: a number, or a text that is read like a completion.
    A sample without a value is skipped."""
    tolerance: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Largest difference that counts as correct."""
    correct: Reward = 1.0
    wrong: Reward = 0.0

    @property
    def columns(self) -> list[str]:
        return [self.column]

    def score(self, sample: RewardSample) -> RewardResult:
        given = sample.columns.get(self.column)
        if given is None:
            return Skipped(f"the row has no {self.column}")
        wanted = self._wanted(given)
        if wanted is None:
            return Failed("column_type", f"{self.column} holds no number", is_transient=False)
        found = answer_in(sample.completion)
        # The shortest decimal of the float is what the user wrote.
        tolerance = Fraction(repr(self.tolerance))
        is_correct = found is not None and abs(found - wanted) <= tolerance
        return Scored(self.correct if is_correct else self.wrong)

    @staticmethod
    def _wanted(given: object) -> Fraction | None:
        if isinstance(given, bool):
            return None
        if isinstance(given, int):
            return Fraction(given)
        if isinstance(given, float):
            return _exact(repr(given)) if given - given == 0 else None
        if not isinstance(given, str):
            return None
        text = given.replace("\u2212", "-")
        return answer_in(text) if _BOXED in text else _value(text)
