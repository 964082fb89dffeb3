"""From samples to the bytes of requests: encoded once, put together by group, split where a limit demands it."""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import orjson

from dar.protocol.ids import new_id
from dar.protocol.rewards import VERSION, Reply, SampleResult
from dar.rewards.base import Failed, RewardContext, RewardResult, RewardSample, Scored, Skipped

ENVELOPE_BYTES = 512
"""Room for everything in a body that is not a sample; a real envelope takes about 330 bytes."""
CALLBACK_BYTES = 300
"""Room for a callback beside it; with a URL of 60 characters it takes 150."""
CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
ID_CHARACTERS = 26
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """A sample as JSON."""

    id: str
    group_id: str
    json: bytes


@dataclass(frozen=True, slots=True)
class EncodedRequest:
    """A request as it is sent on every attempt."""

    request_id: str
    ids: tuple[str, ...]
    body: bytes


def encode_sample(
    sample: RewardSample, columns: Sequence[str] | None, policy_version: int
) -> EncodedSample:
    """A sample as JSON. Lone surrogates, which JSON cannot carry, become U+FFFD.

    Args:
        sample: What is to be scored.
        columns: Columns of the row that are sent beside ``ground_truth``; None: no others.
        policy_version: Optimizer steps that the policy had done.

    Raises:
        TypeError: A column holds a value that JSON has no word for.
    """
    content = {
        "id": sample.id,
        "group_id": sample.group_id,
        "index": sample.index,
        "prompt": sample.prompt,
        "messages": None if sample.messages is None else [dict(item) for item in sample.messages],
        "completion": sample.completion,
        "finish_reason": sample.finish_reason,
        "completion_tokens": sample.completion_tokens,
        "ground_truth": sample.columns.get("ground_truth"),
        "columns": {
            name: sample.columns[name]
            for name in columns or ()
            if name in sample.columns and name != "ground_truth"
        },
        "metadata": {
            "policy_version": policy_version,
            "truncated": sample.finish_reason == "length",
        },
    }
    return EncodedSample(sample.id, sample.group_id, _as_json(content))


def _as_json(content: Mapping[str, Any]) -> bytes:
    with contextlib.suppress(orjson.JSONEncodeError):
        return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    readable = _without_surrogates(content)
    with contextlib.suppress(orjson.JSONEncodeError):
        return orjson.dumps(readable, option=orjson.OPT_SERIALIZE_NUMPY)
    # orjson stops at integers of 64 bits, JSON does not.
    return json.dumps(readable, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _without_surrogates(value: object) -> object:
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, Mapping):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_surrogates(item) for item in value]
    return value


def request_id_of(samples: Sequence[EncodedSample], component: str, context: RewardContext) -> str:
    """The id of a request: of a job, the same for the same content, so that a restarted worker names it as before."""
    if context.job_id is None:
        return new_id("rwq_")
    facts = f"{context.job_id}\n{component}\n{context.step}\n{context.mode}\n".encode()
    digest = hashlib.sha256(facts + b"\n".join(sample.json for sample in samples)).digest()
    number = int.from_bytes(digest) >> (256 - 5 * ID_CHARACTERS)
    return "rwq_" + "".join(
        CROCKFORD[number >> 5 * place & 31] for place in reversed(range(ID_CHARACTERS))
    )


def encode_request(
    samples: Sequence[EncodedSample],
    component: str,
    context: RewardContext,
    *,
    request_id: str,
    created_at: datetime,
    reply: Reply,
) -> EncodedRequest:
    """The body of one request."""
    content = {
        "type": "reward.request",
        "version": VERSION,
        "request_id": request_id,
        "job_id": context.job_id,
        "component": component,
        "step": context.step,
        "mode": context.mode,
        "created_at": created_at,
        "samples": [orjson.Fragment(sample.json) for sample in samples],
        "reply": reply.model_dump(exclude_none=True),
    }
    ids = tuple(sample.id for sample in samples)
    return EncodedRequest(request_id, ids, orjson.dumps(content, option=orjson.OPT_UTC_Z))


Batch = list[EncodedSample]


def batches(
    samples: Sequence[EncodedSample], *, max_samples: int, max_bytes: int
) -> Iterator[Batch]:
    """Put whole groups together into requests; only a group that alone is over a limit is split.

    A sample that alone is over ``max_bytes`` gets a request of its own.
    """
    groups: dict[str, Batch] = {}
    for sample in samples:
        groups.setdefault(sample.group_id, []).append(sample)
    room = max_bytes - ENVELOPE_BYTES
    batch: Batch = []
    for group in groups.values():
        if batch and not _fits([*batch, *group], max_samples, room):
            yield batch
            batch = []
        if _fits(group, max_samples, room):
            batch.extend(group)
        else:
            yield from _split(group, max_samples, room)
    if batch:
        yield batch


def _fits(batch: Batch, max_samples: int, room: int) -> bool:
    return (
        len(batch) <= max_samples and sum(len(sample.json) + 1 for sample in batch) <= room
    )  # + 1: its comma


def _split(group: Batch, max_samples: int, room: int) -> Iterator[Batch]:
    batch: Batch = []
    for sample in group:
        if batch and not _fits([*batch, sample], max_samples, room):
            yield batch
            batch = []
        batch.append(sample)
    yield batch


def as_result(result: SampleResult) -> RewardResult:
    """A wire result as reward sources report it."""
    if result.error is not None:
        code = f"service.{result.error.code}"
        message = result.error.message or "the reward service could not score the sample"
        return Failed(code, message, is_transient=result.error.retryable)
    if result.reward is None:
        return Skipped(result.reason)
    return Scored(result.reward, dict(result.components), result.feedback)
