"""``openai_grader``: services like OpenAI's ``POST /fine_tuning/alpha/graders/run``.

One sample per request. A grader that could not grade reports a reward together with an error flag;
then the flag decides.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from dar.protocol.rewards import (
    MAX_CODE,
    MAX_FEEDBACK,
    kind,
    load_json,
    one_line,
    plain_code,
    refuse,
)
from dar.rewards.base import Failed, RequestBatch, RewardResult, RewardSample, Scored
from dar.rewards.http.wire import to_json
from dar.rewards.protocols.strict import number, parts, sent_columns

TRANSIENT = frozenset(
    {"model_grader_server_error", "python_grader_server_error", "unresponsive_reward_error"}
)
"""Flags of transient failures."""


class OpenAIGraderProtocol:
    """Encodes and decodes a grader run.

    Args:
        grader: Sent unchanged.
        coerce: Whether numeric strings and booleans are numbers.
    """

    name = "openai_grader"
    max_samples: int | None = 1

    def __init__(self, grader: Mapping[str, Any], *, coerce: bool = False) -> None:
        self._grader = dict(grader)
        self._coerce = coerce

    def encode(self, batch: RequestBatch) -> bytes:
        (sample,) = batch.samples
        item = _item(sample, batch)
        return to_json({"grader": self._grader, "model_sample": sample.completion, "item": item})

    def decode(self, body: bytes, batch: RequestBatch) -> list[RewardResult]:  # noqa: ARG002 - part of the RewardProtocol interface
        answer = load_json(body)
        if not isinstance(answer, Mapping):
            refuse("type", f"the answer must be an object, not {kind(answer)}")
        metadata = _object(answer.get("metadata"), "metadata")
        errors = _object(metadata.get("errors"), "metadata.errors")
        flags = sorted(_flags(errors))
        if flags:
            return [_failure(flags, errors)]
        if "reward" not in answer:
            refuse("form", "the answer has no reward")
        reward = number(answer["reward"], "reward", coerce=self._coerce)
        rewards_of_parts = answer.get("sub_rewards")
        shown = rewards_of_parts.items() if isinstance(rewards_of_parts, Mapping) else ()
        return [Scored(reward, parts(shown))]


def _item(sample: RewardSample, batch: RequestBatch) -> dict[str, Any]:
    """The ``item`` of a grader: columns of the row, and the prompt under reserved names."""
    item = sent_columns(sample, batch.columns)
    if "ground_truth" in item:
        item.setdefault("reference_answer", item["ground_truth"])
    item["prompt"] = sample.prompt if sample.prompt is not None else sample.prompt_text
    if sample.messages is not None:
        item["messages"] = [dict(message) for message in sample.messages]
    return item


def _object(value: object, where: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        refuse("type", f"{where}: {kind(value)}, but an object is expected")
    return value


def _flags(errors: Mapping[str, Any]) -> Iterator[str]:
    """Names of the set flags, including those of the parts of a multi-grader."""
    for name, value in errors.items():
        if value is True:
            yield name
        elif isinstance(value, Mapping):
            yield from _flags(value)


def _failure(flags: list[str], errors: Mapping[str, Any]) -> Failed:
    details = [f"{name}: {value}" for name, value in errors.items() if isinstance(value, str)]
    text = one_line("; ".join([", ".join(flags), *details]))
    return Failed(
        f"grader.{plain_code(flags[0][:MAX_CODE])}",
        f"the grader could not grade: {text}"[:MAX_FEEDBACK],
        is_transient=TRANSIENT.issuperset(flags),
    )
