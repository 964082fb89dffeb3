r"""The builtin for answers that are numbers, which it compares exactly, as fractions.

The answer of a completion is its last ``\boxed{…}`` if there is one, else its last number. A power
is one number, and the exponent of a unit is none.
"""

import re
import unicodedata
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
_ALONE = re.compile(rf"({_NUMBER})(?:\s?/\s?([-+]?{_DIGITS}))?", re.ASCII)
_BOXED = "\\boxed{"
_COMMA = re.compile(r",\\!|\{,\}")
_DOLLAR_OF_SIGN = re.compile(r"(?<=[-+])\\?\$")
_SPACE = re.compile(
    r"\\[,;:! ]|\\?\$|~|\\(?:left|right)(?![A-Za-z])"
    r"|[\u00a0\u1680\u2000-\u200b\u202f\u205f\u2060\u3000\ufeff]"
)
"""What shows as a space or as nothing: it stands between two numbers as a space does."""
_SUPERSCRIPT, _SUBSCRIPT = "[\u00b2\u00b3\u00b9\u2070\u2074-\u2079]", "[\u2080-\u2089]"
_UNICODE_FRACTION = re.compile(
    rf"[\u00bc-\u00be\u2150-\u215e\u2189]|(?<!{_SUPERSCRIPT}){_SUPERSCRIPT}++[\u2044/]{_SUBSCRIPT}+"
)
_PART = rf"(?:\{{\s*({_NUMBER})\s*\}}|([0-9]))"
_LATEX_FRACTION = re.compile(rf"(?:([-+])\s*)?\\(?:[cdst]|nice)?frac\s*{_PART}\s*{_PART}", re.ASCII)
_WHOLE = r"[0-9]++(?:,[0-9]{3})*+"
_RUN = re.compile(rf"(?<![\w.,])({_WHOLE}(?: {_WHOLE})*+)(?: ?/ ?([0-9]++))?+", re.ASCII)
"""Whole numbers with one space between them, and what the last of them is divided by."""
_UNREADABLE = "1e99999"
"""Stands for a power that is no fraction or is too long: as an answer, it is none."""
_START = r"(?<![\w.])(?!(?<=[0-9],)[0-9]{3}(?![0-9]))"
"""Where a number begins: also not with the second group of thousands of another."""
_STARRED = re.compile(
    rf"((?<!\*\*){_START}(?:{_NUMBER}|[A-Za-z]{{1,3}})|\))\*\*([-+]?[0-9]++)(?!\*)", re.ASCII
)
"""A power as programs write it; two stars around a text make it bold."""
_INDEX = re.compile(r"_ ?\{[^{}]*+\}|<sub>[^<]{0,40}</sub>")
_NESTED = r"[^{}]*+(?:\{[^{}]*+\}[^{}]*+)*+"
_EXPONENT = re.compile(
    rf" ?\^ ?(?:\{{({_NESTED})\}}|\(([^()]*+)\)|([-+]?[0-9]++(?:\.[0-9]+)?|[A-Za-z]|\\[A-Za-z]+))"
    rf"|\\textsuperscript ?\{{({_NESTED})\}}|<sup>([^<]{{0,40}})</sup>"
    r"|(\u207b?[\u00b2\u00b3\u00b9\u2070\u2074-\u2079]+)"
)
_NO_EXPONENT = frozenset({"\\circ", "\\degree", "o", "°", "\\prime", "th", "st", "nd", "rd"})
"""Raised signs that leave the number what it is."""
_UPRIGHT = re.compile(r"\\(?:text[a-z]*|mathrm|rm)\b|[{}\s]")
_MARKED = r"\^([pnu])([0-9]*+)"
"""An exponent after `_marked`: positive, negative, or not a whole number."""
_SCIENTIFIC = re.compile(
    rf"{_START}({_NUMBER})(?: ?/ ?({_DIGITS}))?"
    rf" ?(?:[xX\u00d7\u00b7\u22c5*]|\\times|\\cdot) ?\{{?10\}}?{_MARKED}",
    re.ASCII,
)
_POWER = re.compile(rf"{_START}([-+]?)({_DIGITS}(?:\.[0-9]+)?|\.[0-9]+){_MARKED}", re.ASCII)
_POWER_OF_GROUP = re.compile(rf"(?:\(([^()]*+)\)|(?<![\w}}])\{{([^{{}}]*+)\}}){_MARKED}")
_BETWEEN = re.compile(r"[\s,;()\[\]{}]*")


def answer_in(text: str) -> Fraction | None:
    """The number that a text answers with; None: there is none."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return _value(boxed) if boxed else None
    found = None
    for match in _IN_TEXT.finditer(_in_ascii(text)):
        found = match
    return None if found is None else _fraction(found[1], found[2])


def _value(text: str) -> Fraction | None:
    """The text as one number, possibly in LaTeX, else its last number.

    None also if the text is a list of numbers, or another number stands right before the last.
    """
    plain = re.sub(r"^([-+])\s+", r"\1", _in_ascii(text).strip())
    if (alone := _ALONE.fullmatch(plain)) is not None:
        return _fraction(alone[1], alone[2])
    found = list(_IN_TEXT.finditer(plain))
    if not found:
        return None
    if len(found) > 1:
        gap = plain[found[-2].end() : found[-1].start()]
        if (gap and not gap.strip() and "\n" not in gap) or _BETWEEN.fullmatch(
            _IN_TEXT.sub("", plain)
        ):
            return None
    return _fraction(found[-1][1], found[-1][2])


def _in_ascii(text: str) -> str:
    """``text`` with each number of several parts as ``a/b`` or digits in a row."""
    text = _DOLLAR_OF_SIGN.sub("", _COMMA.sub(",", text.replace("\u2212", "-")))
    text = _SPACE.sub(" ", text)
    text = _UNICODE_FRACTION.sub(_plain_fraction, text).replace("\u2044", "/")
    text = _EXPONENT.sub(_marked, _INDEX.sub(" ", _STARRED.sub(r"\1^\2", text)))
    text = _RUN.sub(_joined, _LATEX_FRACTION.sub(_read_fraction, text))
    return _without_powers(text) if "^" in text else text


def _marked(match: re.Match[str]) -> str:
    """An exponent in one form, in which it cannot be taken for a number of its own."""
    content = next(one for one in match.groups() if one is not None)
    content = unicodedata.normalize("NFKC", content).replace("\u2212", "-").strip()
    if (whole := re.fullmatch(r"([-+]?)\s*([0-9]+)", content, re.ASCII)) is not None:
        return f"^{'n' if whole[1] == '-' else 'p'}{whole[2]}"
    return " " if _UPRIGHT.sub("", content) in _NO_EXPONENT else "^u"


def _without_powers(text: str) -> str:
    """``text`` with the value of each power of a number, and without all other exponents."""
    text = _POWER_OF_GROUP.sub(_power_of_group, _SCIENTIFIC.sub(_scientific, text))
    return re.sub(_MARKED, " ", _POWER.sub(_power, text))


def _scientific(match: re.Match[str]) -> str:
    mantissa, power = _fraction(match[1], match[2]), _raised(Fraction(10), match[3], match[4])
    return _number_for(match, None if mantissa is None or power is None else mantissa * power)


def _power(match: re.Match[str]) -> str:
    base = _exact(match[2])
    value = None if base is None else _raised(base, match[3], match[4])
    return match[1] + _number_for(match, value)


def _power_of_group(match: re.Match[str]) -> str:
    """A power of what is in brackets; ``(m/s)^2`` is one of a unit."""
    content = (match[1] if match[1] is not None else match[2]).strip()
    alone = _ALONE.fullmatch(content)
    if alone is None:
        is_unit = re.search(r"(?<!\^[pn])[0-9]", content, re.ASCII) is None
        return match[0].rpartition("^")[0] if is_unit else _number_for(match, None)
    base = _fraction(alone[1], alone[2])
    return _number_for(match, None if base is None else _raised(base, match[3], match[4]))


def _raised(base: Fraction, kind: str, digits: str) -> Fraction | None:
    """``base`` to a power; None: it is no fraction, or too long."""
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if kind == "u" or len(digits) > 4 or int(digits) * bits > 4 * MAX_DIGITS:
        return None
    if kind == "n" and not base:
        return None
    return Fraction(base ** (-int(digits) if kind == "n" else int(digits)))


def _number_for(match: re.Match[str], value: Fraction | None) -> str:
    """A value in the place of a match, as a text that is read as this number."""
    start, end = match.span()
    is_divided = bool(re.match(" ?/ ?[0-9]", match.string[end : end + 3]))
    before = match.string[max(0, start - 4) : start].rstrip()
    is_divisor = before.endswith("/") and before[:-1].rstrip()[-1:] in {*"0123456789)}"}
    number = _UNREADABLE
    if value is not None and (value.denominator == 1 or not (is_divided or is_divisor)):
        parts = [str(one) for one in value.as_integer_ratio()[: 1 if value.denominator == 1 else 2]]
        if all(len(part) <= MAX_DIGITS for part in parts):
            number = "/".join(parts)
    return _apart(match, number)


def _apart(match: re.Match[str], number: str) -> str:
    """``number`` in the place of a match, with spaces where digits or letters would touch it."""
    start, end = match.span()
    before, after = match.string[max(0, start - 1) : start], match.string[end : end + 1]
    is_touched = after.isalnum() or after == "\\"
    if number and re.match(rf"\^|{_SUPERSCRIPT}", after):
        number, is_touched = f"({number})", False
    return f"{' ' * before.isdigit()}{number}{' ' * is_touched}"


def _plain_fraction(match: re.Match[str]) -> str:
    return _apart(match, unicodedata.normalize("NFKC", match[0]).replace("\u2044", "/"))


def _read_fraction(match: re.Match[str]) -> str:
    value = _fraction(match[2] or match[3], match[4] or match[5])
    if value is None:
        return match[0]
    sign = match[1] or ""
    if value < 0:
        sign = "+" if sign == "-" else "-"
    number = f"{abs(value.numerator)}/{value.denominator}"
    return sign + _apart(match, number).lstrip() if sign else _apart(match, number)


def _joined(match: re.Match[str]) -> str:
    """A run as one number, if it is groups of thousands or a mixed number."""
    groups, bottom = match[1].split(" "), match[2]
    after = match.string[match.end() : match.end() + 2]
    if len(groups) == 1 or re.match(r"[\w/]|\.[0-9]" if bottom else r"\w", after, re.ASCII):
        return match[0]
    if bottom is None:
        return "".join(groups) if _are_thousands(groups) else match[0]
    *whole, top = groups
    is_mixed = "," not in top and (len(whole) == 1 or _are_thousands(whole))
    if is_mixed and len(match[0]) > MAX_DIGITS:
        return "".join(groups) + bottom  # it is too long for a number
    if is_mixed and top[0] != "0" and int(top) < int(bottom):
        number = int("".join(whole).replace(",", ""))
        return f"{number * int(bottom) + int(top)}/{bottom}"
    return f"{''.join(groups)}/{bottom}" if _are_thousands(groups) else match[0]


def _are_thousands(groups: list[str]) -> bool:
    first, *others = groups
    is_start = len(first) <= 3 and first[0] != "0"
    return is_start and all(len(group) == 3 for group in others)


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

    Understands integers, decimals, thousands with commas or spaces, exponents, powers like
    ``3.5 x 10^8``, ``a/b``, ``\frac{a}{b}`` and mixed numbers like ``1 1/2``. A percent sign is not
    read, like a unit with its exponent.
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
            return Failed(
                "column_type",
                f"{self.column} holds no number, or several side by side",
                is_transient=False,
            )
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
        return answer_in(given) if _BOXED in given else _value(given)
