"""Samples as JSON, batches of samples, and the ids of requests."""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from dar.protocol.ids import new_id
from dar.protocol.row_values import check_value
from dar.protocol.rows import RowError
from dar.rewards.base import RewardContext, RewardSample

ENVELOPE_BYTES = 512
"""Bytes reserved in a body for everything but the samples; a real envelope takes about 330."""
CALLBACK_BYTES = 300
"""Bytes reserved for a callback besides; with a URL of 60 characters it takes 150."""
_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """A sample and its JSON in the form of ``dar.reward.v1``."""

    id: str
    group_id: str
    json: bytes
    sample: RewardSample


EncodedBatch = list[EncodedSample]


def to_json(content: object) -> bytes:
    """``content`` as JSON. Lone surrogates, which JSON cannot carry, become U+FFFD.

    Raises:
        TypeError: A value has no JSON form.
    """
    with contextlib.suppress(orjson.JSONEncodeError):
        return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    readable = without_surrogates(content)
    with contextlib.suppress(orjson.JSONEncodeError):
        return orjson.dumps(readable, option=orjson.OPT_SERIALIZE_NUMPY)
    # orjson rejects integers over 64 bits, JSON does not.
    return json.dumps(readable, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def readable_text(text: str) -> str:
    """``text`` with U+FFFD for every lone surrogate, so that it can be encoded as UTF-8."""
    return _SURROGATE.sub("\ufffd", text)


def without_surrogates(value: object) -> object:
    """``value`` with U+FFFD for every lone surrogate in its strings, at any depth."""
    if isinstance(value, str):
        return readable_text(value)
    if isinstance(value, Mapping):
        return {without_surrogates(key): without_surrogates(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_surrogates(item) for item in value]
    return value


def check_sendable(columns: Mapping[str, Any], sent: Iterable[str]) -> None:
    """Check that JSON can carry the columns that a reward service gets.

    Raises:
        RowError: It cannot carry one of them.
    """
    for name in dict.fromkeys(sent):
        value = columns.get(name)
        try:
            to_json(value)
        except (TypeError, ValueError) as error:
            raise RowError(
                f"the column {name!r} holds what JSON cannot carry, so no reward service can get "
                f"it; convert it to a text, a number or a list ({type(value).__name__}: {error})",
                name,
                "not_json",
            ) from None
        plain = getattr(value, "tolist", None)  # an array, in which NaN would become null
        check_value(plain() if callable(plain) else value, name)


def encode_sample(
    sample: RewardSample, columns: Sequence[str] | None, policy_version: int
) -> EncodedSample:
    """Encode a sample. Lone surrogates, which JSON cannot carry, become U+FFFD.

    Args:
        sample: The completion to score.
        columns: Columns of the row sent besides ``ground_truth``; None: no others.
        policy_version: Optimizer steps that the policy had done.

    Raises:
        TypeError: A column holds a value without a JSON form.
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
    """The id of a request.

    Within a job it is a digest of the samples: a process that repeats a step sends the same ids,
    and a service can recognise requests it has already scored. Without a job id two runs could not
    be distinguished, so the id is random.

    Args:
        samples: The samples of the request.
        component: Name of the component.
        context: Job, step and mode.
        number: How many requests with these samples were answered before; above 0 where some of
            them are scored again.
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


def batches(
    samples: Sequence[EncodedSample], *, max_samples: int, max_bytes: int
) -> Iterator[EncodedBatch]:
    """Divide samples into requests. A group is split only if it alone exceeds a limit.

    A sample that alone exceeds ``max_bytes`` gets a request of its own.
    """
    groups: dict[str, EncodedBatch] = {}
    for sample in samples:
        groups.setdefault(sample.group_id, []).append(sample)
    room = max_bytes - ENVELOPE_BYTES
    batch: EncodedBatch = []
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


def _fits(batch: EncodedBatch, max_samples: int, room: int) -> bool:
    size = sum(len(sample.json) + 1 for sample in batch)  # + 1: the comma
    return len(batch) <= max_samples and size <= room


def _split(group: EncodedBatch, max_samples: int, room: int) -> Iterator[EncodedBatch]:
    batch: EncodedBatch = []
    for sample in group:
        if batch and not _fits([*batch, sample], max_samples, room):
            yield batch
            batch = []
        batch.append(sample)
    yield batch
