"""Signatures of Standard Webhooks 1.0.0: HMAC-SHA256 over ``{id}.{timestamp}.{body}``.

A secret is ``whsec_`` and base64. A signature header holds entries separated by spaces, so that two
secrets can be valid during a rotation.
"""

import base64
import binascii
import hmac
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from dar.errors import AuthenticationError, ConfigurationError

PREFIX = "whsec_"
MIN_SECRET_BYTES = 24
"""The shortest secret that Standard Webhooks allows."""
TOLERANCE_SECONDS = 300
"""Largest difference between a timestamp and the receiver's clock."""
_MAX_ENTRIES = 16
"""Signatures that are checked; a rotation needs two."""


def secrets_in(text: str) -> list[str]:
    """The secrets in a setting or a file, the newest first: one a line, or separated by commas.

    A byte order mark before them is not read.
    """
    return text.removeprefix("\ufeff").replace(",", " ").split()


def secrets_in_file(file: Path) -> list[str]:
    """The secrets in a file, the newest first; all of them can be decoded.

    Raises:
        ConfigurationError: It holds no secret, or one is malformed; the message names the line.
        OSError: It cannot be read.
    """
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        for secret in secrets_in(line):
            try:
                decode_secret(secret)
            except ConfigurationError as error:
                raise ConfigurationError(f"{file}, line {number}: {error.message}") from None
            found.append(secret)
    if not found:  # an empty file is no reason to accept every request
        raise ConfigurationError(
            f"{file} is empty, but must hold a reward secret: {PREFIX!r} and base64 of at least "
            f"{MIN_SECRET_BYTES} bytes"
        )
    return found


def decode_secret(secret: str) -> bytes:
    """The key bytes in ``whsec_…``.

    Raises:
        ConfigurationError: The secret is malformed or too short. The message does not show it.
    """
    expected = f"a reward secret is {PREFIX!r} and base64 of at least {MIN_SECRET_BYTES} bytes"
    if not secret.startswith(PREFIX):
        raise ConfigurationError(f"{expected}; this one does not start with {PREFIX!r}")
    try:
        key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except (binascii.Error, ValueError):
        raise ConfigurationError(f"{expected}; this one is not base64") from None
    if len(key) < MIN_SECRET_BYTES:
        raise ConfigurationError(f"{expected}; this one has {len(key)}")
    return key


def sign(key: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """One entry of a signature header: ``v1,`` and base64.

    Args:
        key: Bytes of the secret (`decode_secret`).
        message_id: Value of ``webhook-id``.
        timestamp: Value of ``webhook-timestamp``: seconds since 1970, UTC.
        body: The body.
    """
    digest = hmac.digest(key, f"{message_id}.{timestamp}.".encode() + body, "sha256")
    return f"v1,{base64.b64encode(digest).decode()}"


def signed_headers(
    keys: Iterable[bytes], message_id: str, timestamp: int, body: bytes
) -> dict[str, str]:
    """The headers of a signed message; without keys only the id and the time."""
    headers = {"webhook-id": message_id, "webhook-timestamp": str(timestamp)}
    entries = [sign(key, message_id, timestamp, body) for key in keys]
    return headers | ({"webhook-signature": " ".join(entries)} if entries else {})


def verify(
    keys: Iterable[bytes],
    headers: Mapping[str, str],
    body: bytes,
    *,
    now: datetime | None = None,
    tolerance_seconds: float = TOLERANCE_SECONDS,
) -> None:
    """Check that ``body`` was signed with one of ``keys`` just now.

    Args:
        keys: Accepted secrets, decoded.
        headers: Request headers with lower-case names.
        body: The bytes that were received.
        now: Time of receipt; None: the current time.
        tolerance_seconds: Largest difference between the timestamp and ``now``.

    Raises:
        AuthenticationError: A header is missing or malformed, the timestamp is too old or too new,
            or no entry of the signature matches.
    """
    message_id = headers.get("webhook-id", "")
    stamp = headers.get("webhook-timestamp", "")
    signature = headers.get("webhook-signature", "")
    if not (message_id and stamp and signature):
        raise AuthenticationError(
            "the request is not signed: webhook-id, webhook-timestamp and webhook-signature are needed",
            code="missing_signature",
        )
    if not (stamp.isascii() and stamp.isdigit() and len(stamp) <= 12):
        raise AuthenticationError("webhook-timestamp is not a whole number", code="stale_signature")
    distance = abs((now or datetime.now(UTC)).timestamp() - int(stamp))
    if distance > tolerance_seconds:
        raise AuthenticationError(
            f"webhook-timestamp is {distance:.0f} s from this server's clock, more than {tolerance_seconds:.0f} s; "
            "check the clocks of both machines",
            code="stale_signature",
        )
    expected = [sign(key, message_id, int(stamp), body).encode() for key in keys]
    entries = [entry.encode("utf-8", "replace") for entry in signature.split()[:_MAX_ENTRIES]]
    # Every pair is compared, so that the time taken does not reveal which one matches.
    matches = [hmac.compare_digest(entry, known) for entry in entries for known in expected]
    if not any(matches):
        raise AuthenticationError(
            "the signature does not match: the body was altered or the secrets differ",
            code="invalid_signature",
        )
