"""Patterns of LoRA target modules: which ones are valid and need little time.

PEFT matches a pattern with Python's `re`, which goes back to every choice that it has made. With
choices inside a repetition, the time doubles with each character of a path, so that one pattern can
keep a trainer busy without end.
"""

import re

MAX_PATTERN = 1000
"""Longest pattern, in characters."""
SHOWN_PATTERN = 80
"""So many characters of it are in a message."""
MAX_CHOICES = 10**8
"""Most ways in which a pattern may be tried on a path; three ``.*`` have 300,000."""
PATH = 64
"""Characters of a long path of a module."""
_FLAGS = re.compile(r"\?([aiLmsux]*)(?:-[imsx]+)?([:)])")
_GROUP_START = re.compile(r"\?(?:P<\w+>|P=\w+|#[^)]*|<?[=!]|\(\w+\)|[:>])")
_COUNT = re.compile(r"\{(\d*)(,?)(\d*)\}")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)


def problem_of(pattern: str) -> str | None:
    """Why a pattern is not used as ``target_modules``; None if it is fine.

    Args:
        pattern: The pattern; ``all-linear`` is a fine one too.
    """
    if len(pattern) > MAX_PATTERN:
        return f"it has {len(pattern)} characters, and at most {MAX_PATTERN} are allowed"
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return str(error)
    if _Scanner(pattern).choices() > MAX_CHOICES:
        return (
            "matching it might never end; use no repetition or alternative inside a repeated "
            "group, and at most four * or +"
        )
    return None


class _Scanner:
    """Counts in how many ways a valid pattern may be tried, at most.

    Args:
        pattern: A pattern that compiles.
    """

    def __init__(self, pattern: str) -> None:
        self._text = pattern
        self._at = 0

    def choices(self) -> float:
        """An upper bound for paths of `PATH` characters."""
        return self._alternatives()

    def _alternatives(self) -> float:
        """The choices up to the end of a group: a sum over alternatives, each a product."""
        total, product = 0.0, 1.0
        while self._at < len(self._text) and self._text[self._at] != ")":
            if self._text[self._at] == "|":
                self._at += 1
                total, product = total + product, 1.0
                continue
            product *= self._repeated(self._atom())
        return total + product

    def _atom(self) -> float:
        """The choices within one character, class or group."""
        text = self._text
        if text[self._at] == "\\":
            self._at += 2
        elif text[self._at] == "[" and (found := _CLASS.match(text, self._at)):
            self._at = found.end()
        elif text[self._at] == "(":
            return self._group()
        else:
            self._at += 1
        return 1.0

    def _group(self) -> float:
        self._at += 1
        if flags := _FLAGS.match(self._text, self._at):
            if "x" in flags[1]:
                return float("inf")  # comments and spaces that are no part of the pattern
            self._at = flags.end()
            if flags[2] == ")":
                return 1.0
        elif start := _GROUP_START.match(self._text, self._at):
            self._at = start.end()
        inner = self._alternatives()
        self._at += 1
        return inner

    def _repeated(self, inner: float) -> float:
        """The choices with the quantifier that follows, if there is one."""
        least, most = 1, 1
        sign = self._text[self._at : self._at + 1]
        if sign and sign in "*+?":
            least, most = {"*": (0, PATH), "+": (1, PATH), "?": (0, 1)}[sign]
            self._at += 1
        elif (count := _COUNT.match(self._text, self._at)) and (count[1] or count[2]):
            least = int(count[1] or 0)
            most = least if not count[2] else int(count[3] or PATH)
            least, most = min(least, PATH), min(most, PATH)
            self._at = count.end()
        else:
            return inner
        if self._text[self._at : self._at + 1] in {"?", "+"}:  # lazy or possessive
            self._at += 1
        try:
            return (most - least + 1) * inner**most
        except OverflowError:
            return float("inf")
