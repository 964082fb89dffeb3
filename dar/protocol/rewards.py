"""``dar.reward.v1``: requests to a reward service and its answers.

`decode_response` is the only way from bytes to rewards. It accepts or rejects an answer as a whole,
so a failed score never becomes a number.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import orjson
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError, from_json

from dar.errors import InvalidRequestError, Problem, RewardContractError
from dar.protocol.base import WireModel
from dar.protocol.samples import FinishReason

VERSION = "dar.reward.v1"
REQUEST_TYPE, RESULT_TYPE = "reward.request", "reward.result"
TOKEN_PREFIX = "rwt_"  # noqa: S105 - a prefix, not a token
MAX_SAMPLES = 256
"""Most samples in one request."""
MAX_REQUEST_BYTES = 8 * 1024**2
MAX_RESPONSE_BYTES = 8 * 1024**2
MAX_REWARD = 1e6
"""Largest magnitude of a reward; a larger number is taken for an error."""
MAX_PARTS = 32
"""Most parts of a reward."""
MAX_CODE = 64
"""Longest code of a sample's error."""
MAX_FEEDBACK = 4096
"""Longest feedback, in characters; the rest is cut off."""

MAX_DEPTH = 200
"""Most lists and objects inside each other in an answer, so that recursion over it ends."""
MAX_REASON = 1000
"""Longest description of a broken contract."""

Mode = Literal["train", "eval", "validate"]
Identifier = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,64}$")]
RewardNumber = Annotated[float, Field(ge=-MAX_REWARD, le=MAX_REWARD)]
PartName = Annotated[str, Field(pattern=r"^[a-z0-9_]{1,32}$")]


class _Wire(WireModel):
    """Types are strict. Unknown keys are ignored, so that either side may be newer."""

    model_config = ConfigDict(
        extra="ignore", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


def check_one_prompt(prompt: object, messages: object) -> None:
    """Check that a sample has exactly one of ``prompt`` and ``messages``.

    Raises:
        PydanticCustomError: It has both or neither.
    """
    if (prompt is None) == (messages is None):
        raise PydanticCustomError("one_prompt", "give exactly one of prompt and messages")


class SampleMetadata(_Wire):
    """How a completion was sampled."""

    policy_version: int
    """Optimizer steps that the policy had done when it sampled."""
    truncated: bool
    """Whether the completion was cut off at the length limit."""


class RequestSample(_Wire):
    """A completion to score. Exactly one of ``prompt`` and ``messages`` is not null."""

    id: Identifier
    """Unique in the request."""
    group_id: Identifier
    """Shared by all completions of one prompt."""
    index: Annotated[int, Field(ge=0)]
    """Index of the completion in its group, from 0."""
    prompt: str | None
    messages: list[dict[str, Any]] | None
    completion: str
    """Text without special tokens."""
    finish_reason: FinishReason
    completion_tokens: Annotated[int, Field(ge=0)]
    ground_truth: Any
    """The row's ``ground_truth`` column; null: there is none."""
    columns: dict[str, Any]
    """The further columns named by the job."""
    metadata: SampleMetadata

    @model_validator(mode="after")
    def _one_prompt(self) -> "RequestSample":
        check_one_prompt(self.prompt, self.messages)
        return self


class Callback(_Wire):
    """Where a later answer may be posted: the body of a 200, with ``"type": "reward.result"``."""

    url: Annotated[str, Field(max_length=2048)]
    token: Annotated[str, Field(pattern=r"^rwt_[A-Za-z0-9_-]{43}$", repr=False)]
    """Sent as ``Authorization: Bearer rwt_…``; valid for this request only."""


class Reply(_Wire):
    """How the service may answer."""

    modes: Annotated[list[Literal["sync", "async"]], Field(min_length=1)]
    """``sync``: with a 200. ``async``: also with a 202, and the result later."""
    deadline: Annotated[AwareDatetime, Field(strict=False)]
    """Answers after this instant are ignored."""
    callback: Callback | None = None
    """Only with ``async``. Without it a later answer must be available at the 202's
    ``poll_url``."""


class RewardRequest(_Wire):
    """Body of the POST to a reward service, the same bytes on every attempt."""

    type: Literal["reward.request"]
    version: Literal["dar.reward.v1"]
    request_id: Identifier
    """Equal to the ``webhook-id`` header; the answer must repeat it."""
    job_id: str | None
    component: str
    step: Annotated[int, Field(ge=0)]
    mode: Mode
    created_at: Annotated[AwareDatetime, Field(strict=False)]
    samples: Annotated[list[RequestSample], Field(min_length=1, max_length=MAX_SAMPLES)]
    reply: Reply

    @model_validator(mode="after")
    def _unique_ids(self) -> "RewardRequest":
        if len({sample.id for sample in self.samples}) < len(self.samples):
            raise PydanticCustomError("duplicate_ids", "two samples have the same id")
        return self


def one_line(text: str) -> str:
    """``text`` without line breaks, escape characters and others that are not printable.

    Each run of them and of spaces becomes a space.
    """
    if text.isprintable():
        return text
    return " ".join("".join(ch if ch.isprintable() else " " for ch in text).split())


def _bounded_feedback(text: str) -> str:
    printable = "".join(ch for ch in text if ch in "\n\t" or ch.isprintable())
    return printable[:MAX_FEEDBACK]


def _bounded_line(text: str) -> str:
    return one_line(text[: 2 * MAX_FEEDBACK]).strip()[:MAX_FEEDBACK]


def plain_code(code: str) -> str:
    """``code`` with an underscore for each character that codes do not have."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", code)


Feedback = Annotated[str, AfterValidator(_bounded_feedback)]
Line = Annotated[str, AfterValidator(_bounded_line)]


def _limited(parts: object) -> object:
    """Check the size first: half a million wrong names would cost seconds and a GB of errors."""
    if isinstance(parts, Mapping) and len(parts) > MAX_PARTS:
        raise PydanticCustomError(
            "too_many_parts",
            "at most {most} components, not {count}",
            {"most": MAX_PARTS, "count": len(parts)},
        )
    return parts


class SampleError(_Wire):
    """The service could not score a sample."""

    code: Annotated[str, Field(max_length=MAX_CODE), AfterValidator(plain_code)] = "error"
    """Letters, digits, ``_``, ``.`` and ``-``; others become underscores."""
    message: Line = ""
    retryable: bool = False


class SampleResult(_Wire):
    """The result of one sample: exactly one of ``reward``, ``skip`` and ``error``.

    A null reward alone is a skip.
    """

    id: str
    reward: RewardNumber | None = None
    skip: bool = False
    """The reward does not apply to this sample."""
    error: SampleError | None = None
    reason: Line | None = None
    """Why the sample was skipped."""
    components: Annotated[
        dict[PartName, RewardNumber], Field(max_length=MAX_PARTS), BeforeValidator(_limited)
    ] = Field(default_factory=dict)
    """Parts of the reward, for viewing only."""
    feedback: Feedback | None = None
    """Stored for viewing, not interpreted."""

    @model_validator(mode="after")
    def _one_outcome(self) -> "SampleResult":
        given = (self.reward is not None) + self.skip + (self.error is not None)
        is_null_reward = given == 0 and "reward" in self.model_fields_set
        if given != 1 and not is_null_reward:
            raise PydanticCustomError("one_outcome", "give exactly one of reward, skip and error")
        return self


Bounded = Field(max_length=MAX_SAMPLES, fail_fast=True)
"""The length is checked before the items, and checking stops at the first error."""


class RewardResponse(_Wire):
    """Body of a 200: ``rewards`` in the order of the samples, or ``results`` by id."""

    type: str | None = None
    """``reward.result`` in a callback; otherwise ignored."""
    request_id: str
    rewards: Annotated[list[RewardNumber | None], Bounded] | None = None
    results: Annotated[list[SampleResult], Bounded] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> "RewardResponse":
        if (self.rewards is None) == (self.results is None):
            raise PydanticCustomError("one_form", "give exactly one of rewards and results")
        return self


class Accepted(_Wire):
    """Body of a 202: the result follows, to the callback or at ``poll_url``."""

    request_id: str
    status: Literal["accepted"]
    poll_url: Annotated[str, Field(max_length=2048)] | None = None
    """Where the result can be fetched, on the origin of the reward service; may be relative."""
    eta_ms: Annotated[float, Field(ge=0)] | None = None
    """Expected time until the result, in milliseconds; a hint."""


def decode_request(body: bytes) -> RewardRequest:
    """Decode a request in a reward service.

    Raises:
        InvalidRequestError: It is not a request of ``dar.reward.v1``; ``problems`` names the
            fields.
    """
    try:
        # Not orjson: it rounds integers over 64 bits, which columns may hold.
        content = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequestError(f"the body is not JSON: {error}", code="invalid_json") from None
    try:
        return RewardRequest.model_validate(content)
    except ValidationError as error:
        problems = [
            Problem(item["msg"], ".".join(map(str, item["loc"])), item["type"])
            for item in error.errors(include_url=False, include_input=False, include_context=False)
        ]
        first = problems[0]
        raise InvalidRequestError(
            f"not a request of {VERSION}: {first.param or 'body'}: {first.message}",
            param=first.param,
            problems=problems,
        ) from None


def decode_response(body: bytes, *, request_id: str, ids: Sequence[str]) -> list[SampleResult]:
    """The results in an answer, one for each of ``ids`` and in their order.

    Args:
        body: Answer of a reward service, at most `MAX_RESPONSE_BYTES`.
        request_id: Id of the request.
        ids: Ids of its samples.

    Raises:
        RewardContractError: The answer breaks the contract (``contract.length``,
            ``contract.nonfinite``, …). No part of it is used.
    """
    response = _parse(RewardResponse, body)
    _check_echo(response.request_id, request_id)
    return _by_id(response, ids)


def decode_result(body: bytes, *, request_id: str, ids: Sequence[str]) -> list[SampleResult]:
    """The results in the body of a callback: like `decode_response`, with the type `RESULT_TYPE`.

    Raises:
        RewardContractError: As for `decode_response`; ``contract.result_type`` for another type.
    """
    response = _parse(RewardResponse, body)
    if response.type != RESULT_TYPE:
        refuse("result_type", f'a callback must say "type": "{RESULT_TYPE}"')
    _check_echo(response.request_id, request_id)
    return _by_id(response, ids)


def decode_accepted(body: bytes, *, request_id: str) -> Accepted:
    """Decode the body of a 202.

    Raises:
        RewardContractError: It is invalid, or for another request.
    """
    accepted = _parse(Accepted, body)
    _check_echo(accepted.request_id, request_id)
    return accepted


def is_own_request(body: bytes) -> bool:
    """Whether ``body`` is a request, returned instead of an answer."""
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    return isinstance(content, Mapping) and content.get("type") == REQUEST_TYPE


def _check_echo(found: str, sent: str) -> None:
    if found != sent:
        refuse(
            "request_mismatch",
            f"the answer is for request {found[:80]!r}, but {sent!r} was sent; "
            "echo the request's request_id",
        )


def _by_id(response: RewardResponse, ids: Sequence[str]) -> list[SampleResult]:
    if response.rewards is not None:
        if len(response.rewards) != len(ids):
            refuse("length", f"{len(response.rewards)} rewards for {len(ids)} samples")
        return [
            SampleResult(id=sample_id, reward=reward)
            for sample_id, reward in zip(ids, response.rewards, strict=True)
        ]
    by_id = {result.id: result for result in response.results or ()}
    if len(by_id) < len(response.results or ()):
        refuse("ids", "two results have the same id")
    if by_id.keys() != set(ids):
        missing, unknown = sorted(set(ids) - by_id.keys()), sorted(by_id.keys() - set(ids))
        refuse(
            "ids",
            f"results must match the samples by id: {len(missing)} missing {missing[:3]}, "
            f"{len(unknown)} unknown {[name[:80] for name in unknown[:3]]}",
        )
    return [by_id[sample_id] for sample_id in ids]


def load_json(body: bytes) -> object:
    """The JSON value in an answer. Of equal keys in an object the last one counts.

    Raises:
        RewardContractError: It is not JSON or nested too deeply (``contract.json``), or a number
            in it is not finite (``contract.nonfinite``).
    """
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        _refuse_json(body, str(error))
    # Few answers have so many brackets at all, and counting them is quick.
    if body.count(b"{") + body.count(b"[") > MAX_DEPTH and _is_deep(content):
        refuse("json", f"the answer is nested over {MAX_DEPTH} levels deep; flatten it")
    return content


def _is_deep(content: object) -> bool:
    """Whether more than `MAX_DEPTH` lists and objects are inside each other."""
    level = [content] if isinstance(content, dict | list) else []
    for _ in range(MAX_DEPTH):
        inner = (one.values() if isinstance(one, dict) else one for one in level)
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
    return bool(level)


Model = TypeVar("Model", bound=BaseModel)


def _parse(model: type[Model], body: bytes) -> Model:
    content = load_json(body)
    if not isinstance(content, Mapping):
        refuse("type", f"the answer must be a JSON object, not {kind(content)}")
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        path = ".".join(map(str, first["loc"])) or "answer"
        refuse(_CODES.get(first["type"], "type"), f"{path}: {first['msg']}")


_CODES = {
    "finite_number": "nonfinite",
    "less_than_equal": "range",
    "greater_than_equal": "range",
    "too_long": "length",
    "one_outcome": "form",
    "one_form": "form",
    "missing": "form",
}
"""Codes for types of pydantic errors; all others are ``contract.type``."""


class _NonFiniteError(ValueError):
    """A number that is not finite, which JSON parsers of many languages accept."""


def _refuse_json(body: bytes, reason: str) -> NoReturn:
    """Report NaN, Infinity and numbers beyond a float's range apart from other invalid JSON."""

    def constant(token: str) -> NoReturn:
        raise _NonFiniteError(token)

    def number(token: str) -> float:
        value = float(token)
        if not math.isfinite(value):
            raise _NonFiniteError(token)
        return value

    try:
        json.loads(body, parse_constant=constant, parse_float=number, parse_int=number)
    except _NonFiniteError as error:
        refuse("nonfinite", f"{str(error)[:20]} is not a finite number")
    except (ValueError, RecursionError):
        pass
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as error:
        refuse("json", f"the answer is not UTF-8 from byte {error.start + 1}; encode it as UTF-8")
    if body.startswith(b"\xef\xbb\xbf"):
        refuse("json", "the answer starts with a byte order mark; send it without one")
    refuse("json", f"the answer is not JSON: {reason}")


def kind(value: object) -> str:
    """The type of a JSON value, in words."""
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


def refuse(code: str, message: str) -> NoReturn:
    """Reject an answer as a whole.

    Args:
        code: Kind of the violation.
        message: Description; it may quote the answer.

    Raises:
        RewardContractError: With ``contract.<code>``.
    """
    raise RewardContractError(one_line(message)[:MAX_REASON], code=f"contract.{code}")
