"""Builtins about the text of a completion: patterns, exact texts, JSON, tags."""

from functools import cached_property
from typing import Annotated, ClassVar, Literal, Protocol

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError, from_json

from dar.rewards.base import Failed, RewardResult, RewardSample, Scored, Skipped
from dar.rewards.builtins.base import Builtin, ColumnName, Reward
from dar.rewards.http.wire import readable_text

Text = Annotated[str, Field(min_length=1, max_length=10_000)]


class Pattern(Protocol):
    """A compiled regular expression."""

    def search(self, text: str) -> object | None:
        """The first match anywhere."""
        ...

    def fullmatch(self, text: str) -> object | None:
        """The match of the whole text."""
        ...


def compile_pattern(pattern: str) -> Pattern:
    """Compile a pattern of RE2, whose time is linear in the text, whatever the pattern.

    Raises:
        PydanticCustomError: RE2 rejects the pattern; it has no look-around and no back-references.
    """
    import re2  # noqa: PLC0415 - not part of the base install, which imports this module for its names

    options = re2.Options()
    options.log_errors = False
    try:
        compiled: Pattern = re2.compile(pattern, options)
    except (re2.error, UnicodeEncodeError) as error:
        said = error.args[0] if error.args else ""
        reason = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(error)
        raise PydanticCustomError(
            "regular_expression",
            "not a regular expression of RE2, which has neither look-around nor back-references: {reason}",
            {"reason": reason},
        ) from None
    return compiled


class RegexMatch(Builtin):
    """``match`` if the pattern is found in the completion, else ``no_match``.

    Patterns are those of RE2.
    """

    fn: ClassVar[str] = "regex_match"

    pattern: Annotated[str, Field(min_length=1, max_length=2000)]
    """Flags come first, like ``(?i)`` to ignore case, ``(?m)`` or ``(?s)``."""
    mode: Literal["search", "full"] = "search"
    """Whether the pattern may match anywhere or must match the whole completion."""
    match: Reward = 1.0
    no_match: Reward = 0.0

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        compile_pattern(pattern)
        return pattern

    @cached_property
    def _compiled(self) -> Pattern:
        return compile_pattern(self.pattern)

    def score(self, sample: RewardSample) -> RewardResult:
        text = readable_text(sample.completion)
        find = self._compiled.search if self.mode == "search" else self._compiled.fullmatch
        return Scored(self.match if find(text) else self.no_match)


class _Comparison(Builtin):
    """The texts that `ExactMatch` and `Contains` compare with."""

    values: Annotated[list[Text], Field(min_length=1, max_length=100)] | None = None
    """The texts; null: those of ``column``."""
    column: ColumnName = "ground_truth"
    """Column of the row with the text or a list of texts. A sample without a value is skipped."""
    ignore_case: bool = False
    strip: bool = True
    """Whether white space around the texts is ignored."""
    match: Reward = 1.0
    no_match: Reward = 0.0

    @model_validator(mode="after")
    def _one_origin(self) -> "_Comparison":
        if self.values is not None and "column" in self.model_fields_set:
            raise PydanticCustomError("exclusive_fields", "send values or column, not both")
        return self

    @property
    def columns(self) -> list[str]:
        return [self.column] if self.values is None else []

    def _wanted(self, sample: RewardSample) -> list[str] | RewardResult:
        given = sample.columns.get(self.column) if self.values is None else self.values
        if given is None:
            return Skipped(f"the row has no {self.column}")
        texts = given if isinstance(given, list | tuple) else [given]
        if not texts or not all(isinstance(text, str) for text in texts):
            # A number can be written in several ways; numeric_answer compares numbers.
            message = f"{self.column} of the row must be a text or a list of texts"
            return Failed("column_type", message, is_transient=False)
        return [self._normal(text) for text in texts]

    def _normal(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return text.casefold() if self.ignore_case else text


class ExactMatch(_Comparison):
    """``match`` if the completion is one of the texts, else ``no_match``."""

    fn: ClassVar[str] = "exact_match"

    def score(self, sample: RewardSample) -> RewardResult:
        wanted = self._wanted(sample)
        if not isinstance(wanted, list):
            return wanted
        is_match = self._normal(sample.completion) in wanted
        return Scored(self.match if is_match else self.no_match)


class Contains(_Comparison):
    """``match`` if the completion contains one of the texts (``every``: all), else ``no_match``."""

    fn: ClassVar[str] = "contains"

    every: bool = False
    """Whether all texts must occur."""

    @model_validator(mode="after")
    def _not_blank(self) -> "Contains":
        if self.values is not None and not all(map(self._normal, self.values)):
            raise PydanticCustomError(
                "blank_text",
                "a blank text is contained in every completion; leave it out, or send strip false",
            )
        return self

    def score(self, sample: RewardSample) -> RewardResult:
        wanted = self._wanted(sample)
        if not isinstance(wanted, list):
            return wanted
        if "" in wanted:
            message = "an empty text is contained in every completion"
            return Failed("column_type", message, is_transient=False)
        text = self._normal(sample.completion)
        is_match = (all if self.every else any)(part in text for part in wanted)
        return Scored(self.match if is_match else self.no_match)


class JsonValid(Builtin):
    """``valid`` if the completion is JSON of the required type with the required keys.

    Else ``invalid``. NaN, infinity, more than about 200 levels of nesting and integers of more than
    4,300 digits are invalid.
    """

    fn: ClassVar[str] = "json_valid"

    type: Literal["any", "object", "array"] = "any"
    keys: Annotated[list[Text], Field(max_length=100)] = Field(default_factory=list)
    """Required keys of the object."""
    fenced: bool = False
    """Whether the JSON may be in a code fence (three backticks), without text around it."""
    valid: Reward = 1.0
    invalid: Reward = 0.0

    @model_validator(mode="after")
    def _keys_of_object(self) -> "JsonValid":
        if self.keys and self.type != "object":
            raise PydanticCustomError("keys_of_object", "only objects have keys; send type object")
        return self

    def score(self, sample: RewardSample) -> RewardResult:
        return Scored(self.valid if self._is_valid(sample.completion) else self.invalid)

    def _is_valid(self, text: str) -> bool:
        text = text.strip()
        if self.fenced and text.startswith("```") and text.endswith("```") and len(text) >= 6:
            text = text[3:-3].removeprefix("json").strip()
        try:
            # Its nesting limit is fixed; that of the json module depends on the caller's stack.
            value: object = from_json(text, allow_inf_nan=False)
        except (ValueError, TypeError):  # TypeError: the text has a lone surrogate
            return False
        if self.type == "array":
            return isinstance(value, list)
        if self.type == "object":
            return isinstance(value, dict) and all(key in value for key in self.keys)
        return True


class FormatTags(Builtin):
    """``match`` if each ``<tag>…</tag>`` occurs once and in order, else ``no_match``."""

    fn: ClassVar[str] = "format_tags"

    tags: Annotated[
        list[Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,31}$")]],
        Field(min_length=1, max_length=16),
    ]
    outside: bool = False
    """Whether text may occur before, between and after the tags; white space always may."""
    match: Reward = 1.0
    no_match: Reward = 0.0

    @field_validator("tags")
    @classmethod
    def _distinct(cls, tags: list[str]) -> list[str]:
        if len(set(tags)) < len(tags):
            raise PydanticCustomError("duplicate_tags", "a tag is in the list twice")
        return tags

    def score(self, sample: RewardSample) -> RewardResult:
        return Scored(self.match if self._is_match(sample.completion) else self.no_match)

    def _is_match(self, text: str) -> bool:
        marks = [mark for tag in self.tags for mark in (f"<{tag}>", f"</{tag}>")]
        if any(text.count(mark) != 1 for mark in marks):
            return False
        places = [text.find(mark) for mark in marks]
        if places != sorted(places):
            return False
        ends = [place + len(mark) for place, mark in zip(places, marks, strict=True)]
        between = [
            text[end:start]
            for end, start in zip([0, *ends[1::2]], [*places[::2], len(text)], strict=True)
        ]
        return self.outside or not "".join(between).strip()
