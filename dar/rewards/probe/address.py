"""Step 1 of a probe: may this address be called, does anybody listen there, and does its certificate hold."""

import ipaddress
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime

import httpcore2

from dar.rewards.http.dns import RESOLVE_SECONDS
from dar.rewards.http.egress import EgressPolicy, GuardedBackend, Resolver, Target
from dar.rewards.http.endpoint import default_tls
from dar.rewards.http.responses import failure_of
from dar.rewards.probe.report import Notes

DAYS_LEFT = 14
"""Days that a certificate should still be valid."""
SECONDS_OF_DAY = 86_400
SHOWN_ADDRESSES = 4


@dataclass(frozen=True, slots=True)
class Path:
    """How a service is reached."""

    target: Target
    guard: EgressPolicy | None
    tls: ssl.SSLContext | None
    resolver: Resolver | None
    connect_seconds: float


async def check_address(path: Path, notes: Notes) -> None:
    """Resolve the host, connect once and look at the certificate; sends nothing."""
    backend = GuardedBackend(path.guard, path.resolver)
    target = path.target
    try:
        addresses = await backend.addresses(target.host, target.port, RESOLVE_SECONDS)
        stream = await backend.connect_tcp(target.host, target.port, path.connect_seconds)
        try:
            security = await _security(path, stream, notes) if target.scheme == "https" else ""
        finally:
            await stream.aclose()
    except (httpcore2.NetworkError, httpcore2.TimeoutException) as error:
        failure = failure_of(error)
        notes.error(failure.code, failure.full_reason)
        return
    notes.done("; ".join(filter(None, [_where(path, addresses), security])))
    if target.scheme == "http" and not all(map(_is_loopback, addresses)):
        notes.warn("config.plain_http", "requests and rewards travel unencrypted")


async def _security(path: Path, stream: httpcore2.AsyncNetworkStream, notes: Notes) -> str:
    context = path.tls or default_tls()
    context.minimum_version = max(context.minimum_version, ssl.TLSVersion.TLSv1_2)
    secured = await stream.start_tls(context, path.target.host, path.connect_seconds)
    found = secured.get_extra_info("ssl_object")
    certificate = found.getpeercert() or {}
    until = certificate.get("notAfter")
    if until is None:
        return f"{found.version()}"
    days = (ssl.cert_time_to_seconds(until) - datetime.now(UTC).timestamp()) / SECONDS_OF_DAY
    if days < DAYS_LEFT:
        notes.warn("tls.expires_soon", f"its certificate is valid for {days:.1f} more days")
    return f"{found.version()}, certificate valid until {until}"


def _where(path: Path, addresses: list[str]) -> str:
    if path.guard is not None:  # what names mean in this network is nobody's business
        return f"{len(addresses)} address{'es' * (len(addresses) > 1)}, allowed"
    public = EgressPolicy()
    private = [
        address
        for address in addresses
        if not public.allows_address(ipaddress.ip_address(address), path.target.host)
    ]
    shown = ", ".join(addresses[:SHOWN_ADDRESSES])
    return f"{shown} (not public: the operator of an installation elsewhere must allow it)" if private else shown  # fmt: skip


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback
