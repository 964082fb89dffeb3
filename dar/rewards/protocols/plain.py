"""``plain``: any JSON API with one text per request, by a template and a JSON pointer.

    template: {"input": "{{text}}", "parameters": {"label": "{{columns.topic}}"}}
    pointer: /0/score

Values are inserted as JSON values, not pasted into JSON text: a completion cannot change the form
of a request. A string that is a single placeholder becomes the value with its type; in a longer
string the value is inserted as text.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dar.errors import InvalidRequestError
from dar.protocol.rewards import kind, load_json, refuse
from dar.rewards.base import RequestBatch, RewardResult, RewardSample, Scored
from dar.rewards.http.wire import to_json
from dar.rewards.protocols.strict import number, prompt_text, sent_columns

PLACEHOLDER = re.compile(r"\{\{([^{}]*)\}\}")
_COLUMN = "columns."


def _messages(sample: RewardSample) -> list[dict[str, Any]]:
    if sample.messages is not None:
        return [dict(message) for message in sample.messages]
    return [{"role": "user", "content": sample.prompt}]


VALUES: Mapping[str, Callable[[RewardSample], Any]] = {
    "completion": lambda sample: sample.completion,
    "prompt": lambda sample: prompt_text(sample, "plain"),
    "text": lambda sample: prompt_text(sample, "plain") + sample.completion,
    "messages": _messages,
    "conversation": lambda sample: [
        *_messages(sample), {"role": "assistant", "content": sample.completion},
    ],
    "ground_truth": lambda sample: sample.columns.get("ground_truth"),
    "finish_reason": lambda sample: sample.finish_reason,
    "completion_tokens": lambda sample: sample.completion_tokens,
    "id": lambda sample: sample.id,
    "group_id": lambda sample: sample.group_id,
}  # fmt: skip
"""Names of placeholders, besides ``columns.<name>``."""
OF_COMPLETION = frozenset({"completion", "text", "conversation"})


def check_template(template: object, columns: frozenset[str]) -> None:
    """Check the template of a component.

    Args:
        template: The template.
        columns: The columns that the component sends.

    Raises:
        InvalidRequestError: A placeholder is unknown, or none includes the completion. ``param`` is
            the place in the template.
    """
    named: set[str] = set()
    for path, text in _texts(template, ""):
        for name in map(str.strip, PLACEHOLDER.findall(text)):
            column = name.removeprefix(_COLUMN) if name.startswith(_COLUMN) else None
            if column is not None and column not in columns | {"ground_truth"}:
                raise InvalidRequestError(
                    f"{{{{{name}}}}} is a column that the component does not send; add it to columns",
                    param=path,
                )
            if column is None and name not in VALUES:
                raise InvalidRequestError(
                    f"{{{{{name}}}}} is not a value of a sample; there are {', '.join(VALUES)} and columns.<name>",
                    param=path,
                )
            named.add(name)
    if not named & OF_COMPLETION:
        raise InvalidRequestError(
            "the template sends no completion, so every reward would be the same; put {{completion}}, {{text}} or "
            "{{conversation}} into it",
            param="",
        )


def _texts(value: object, path: str) -> Iterator[tuple[str, str]]:
    """All strings in a JSON value except object keys, with their places."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, f"{path}[{index}]")


class PlainProtocol:
    """Encodes and decodes for an API that takes one text and returns a number.

    Args:
        template: Body of a request.
        pointer: JSON pointer (RFC 6901) to the reward in an answer.
        coerce: Whether numeric strings and booleans are numbers.
    """

    name = "plain"
    max_samples: int | None = 1

    def __init__(self, template: object, pointer: str, *, coerce: bool = False) -> None:
        self._template = template
        self._pointer = pointer
        self._coerce = coerce

    def encode(self, batch: RequestBatch) -> bytes:
        (sample,) = batch.samples
        columns = sent_columns(sample, batch.columns)
        return to_json(_filled(self._template, sample, columns))

    def decode(self, body: bytes, batch: RequestBatch) -> list[RewardResult]:  # noqa: ARG002 - part of the RewardProtocol interface
        value = resolve(load_json(body), self._pointer)
        return [Scored(number(value, self._pointer or "answer", coerce=self._coerce))]


def _filled(template: object, sample: RewardSample, columns: Mapping[str, Any]) -> object:
    """Insert the values of a sample; placeholders in inserted values are not replaced."""

    def value_of(match: re.Match[str]) -> object:
        name = match[1].strip()
        if name.startswith(_COLUMN):
            return columns.get(name.removeprefix(_COLUMN))
        return VALUES[name](sample)

    if isinstance(template, str):
        alone = PLACEHOLDER.fullmatch(template)
        if alone is not None:
            return value_of(alone)
        return PLACEHOLDER.sub(lambda match: _written(value_of(match)), template)
    if isinstance(template, Mapping):
        return {key: _filled(item, sample, columns) for key, item in template.items()}
    if isinstance(template, list):
        return [_filled(item, sample, columns) for item in template]
    return template


def _written(value: object) -> str:
    """A value within a longer string: strings unchanged, nothing for null, all else as JSON."""
    if isinstance(value, str):
        return value
    return "" if value is None else to_json(value).decode()


def resolve(answer: object, pointer: str) -> object:
    """The value at a JSON pointer (RFC 6901).

    Raises:
        RewardContractError: There is none (``contract.form``).
    """
    found = answer
    for raw in pointer.split("/")[1:]:
        token = raw.replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping) and token in found:
            found = found[token]
        elif isinstance(found, list) and _is_index(token, len(found)):
            found = found[int(token)]
        else:
            refuse("form", f"nothing at {pointer}: {kind(found)} has no {raw[:80]!r}")
    return found


def _is_index(token: str, length: int) -> bool:
    """Whether ``token`` is an array index of RFC 6901, without leading zeros, below ``length``."""
    is_index = re.fullmatch(r"0|[1-9][0-9]{0,8}", token) is not None
    return is_index and int(token) < length
