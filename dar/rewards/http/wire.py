"""From samples to the bytes of requests: encoded once, put together by group, split where a limit demands it."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import orjson

from dar.protocol.ids import new_id
from dar.protocol.rewards import VERSION, SampleResult
from dar.rewards.base import (
    Failed,
    RewardContext,
    RewardResult,
    RewardSample,
    Scored,
    Skipped,
)
from dar.rewards.http.encoding import to_json

ENVELOPE_BYTES = 512
"""Room for everything in a body that is not a sample; a real envelope takes about 330 bytes."""
CALLBACK_BYTES = 300
"""Room for a callback beside it; with a URL of 60 characters it takes 150."""
_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """A sample as JSON."""

    id: str
    group_id: str
    json: bytes
    sample: RewardSample


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
    return EncodedSample(sample.id, sample.group_id, to_json(content), sample)


def request_id_of(
    samples: Sequence[EncodedSample], component: str, context: RewardContext, *, number: int
) -> str:
    """The id of a request: the same for the same samples of a job, whichever process sends it.

    So a service that has scored them already may say so. Without a job id nothing tells one run from another, and the id is
    drawn.

    Args:
        samples: What is sent.
        component: Name of the component.
        context: Job, step and mode.
        number: How many requests with these samples were answered before, when some of them are to be scored again.
    """
    if context.job_id is None:
        return new_id("rwq_")
    digest = hashlib.sha256()
    for part in (context.job_id, component, str(context.step), context.mode, str(number)):
        digest.update(part.encode("utf-8", "replace") + b"\0")
    for sample in samples:
        digest.update(sample.json + b"\0")
    number_of_id = int.from_bytes(digest.digest()[:17]) >> 6
    return "rwq_" + "".join(_CROCKFORD[number_of_id >> shift & 31] for shift in range(125, -1, -5))


def encode_request(
    samples: Sequence[EncodedSample],
    component: str,
    context: RewardContext,
    *,
    created_at: datetime,
    deadline: datetime,
    request_id: str | None = None,
    reply: Mapping[str, Any] | None = None,
) -> EncodedRequest:
    """The body of one request.

    Args:
        samples: What is to be scored.
        component: Name of the component.
        context: Job, step and mode.
        created_at: When the request was made.
        deadline: No answer is read after it.
        request_id: None: a fresh one.
        reply: How the service may answer; None: at once.
    """
    known_id = request_id or new_id("rwq_")
    content = {
        "type": "reward.request",
        "version": VERSION,
        "request_id": known_id,
        "job_id": context.job_id,
        "component": component,
        "step": context.step,
        "mode": context.mode,
        "created_at": created_at,
        "samples": [orjson.Fragment(sample.json) for sample in samples],
        "reply": {"modes": ["sync"], **(reply or {}), "deadline": deadline},
    }
    ids = tuple(sample.id for sample in samples)
    return EncodedRequest(known_id, ids, orjson.dumps(content, option=orjson.OPT_UTC_Z))


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
