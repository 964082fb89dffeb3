"""One log line for each attempt at a request to a reward service: numbers and ids, never a prompt, a completion or a secret."""

import hashlib
import logging

import orjson

from dar.rewards.base import RequestRecord

logger = logging.getLogger("dar.rewards.requests")


def trace_id(request_id: str) -> str:
    """The trace id that all attempts at a request have in ``traceparent``: 32 hexadecimal digits."""
    return hashlib.sha256(request_id.encode()).hexdigest()[:32]


def log_attempt(record: RequestRecord) -> None:
    """Write a line of JSON. What the service said (`RequestRecord.quote`) is left out: it may repeat what it was sent."""
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
