"""The log of attempts, one line of JSON each, in a logger of its own.

Operators collect it apart from other messages, and find a request in the log of the service that
received it by its trace id. So a line holds nothing that a user, the policy or a service wrote.
"""

import hashlib
import logging

import orjson

from dar.rewards.base import RequestRecord

logger = logging.getLogger("dar.rewards.requests")


def trace_id(request_id: str) -> str:
    """The trace id in ``traceparent``, the same for all attempts: 32 hexadecimal digits."""
    return hashlib.sha256(request_id.encode()).hexdigest()[:32]


def log_attempt(record: RequestRecord) -> None:
    """Log an attempt as a line of JSON: numbers and ids, but no prompt, completion or secret.

    `RequestRecord.quote` is omitted, as the service may repeat what it was sent.
    """
    if not logger.isEnabledFor(logging.INFO):
        return
    content = {
        "component": record.component,
        "request_id": record.request_id,
        "trace_id": trace_id(record.request_id),
        "step": record.step,
        "mode": record.mode,
        "attempt": record.attempt,
        "is_final": record.is_final,
        "samples": record.samples,
        "outcome": record.outcome,
        "status": record.status,
        "bytes_out": record.bytes_out,
        "bytes_in": record.bytes_in,
        "queued_ms": _milliseconds(record.queued_seconds),
        "dns_ms": _milliseconds(record.dns_seconds),
        "connect_ms": _milliseconds(record.connect_seconds),
        "ttfb_ms": _milliseconds(record.first_byte_seconds),
        "total_ms": _milliseconds(record.seconds),
    }
    logger.info("reward request %s", orjson.dumps(content).decode(), extra={"request": content})


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)
