"""Step 1 of a probe: egress policy, name resolution, one connection, and the certificate."""

import ipaddress
import ssl
from datetime import UTC, datetime

import httpcore2

from dar.protocol.hints import HINTS
from dar.rewards.http.dns import RESOLVE_SECONDS
from dar.rewards.http.egress import EgressPolicy, GuardedBackend, Target, parse_url
from dar.rewards.http.endpoint import default_tls
from dar.rewards.http.responses import failure_of
from dar.rewards.probe.client import ProbeTarget
from dar.rewards.probe.report import ReportBuilder

SECONDS_OF_DAY = 86_400
SHOWN_ADDRESSES = 4


async def check_address(target: ProbeTarget, report: ReportBuilder) -> None:
    """Resolve the host, connect once and check the certificate; sends no request."""
    backend = GuardedBackend(target.guard, target.resolver)
    url = parse_url(target.url, target.guard)
    try:
        addresses = await backend.addresses(url.host, url.port, RESOLVE_SECONDS)
        stream = await backend.connect_tcp(url.host, url.port, target.component.timeouts.connect)
        try:
            security = await _security(target, url, stream, report) if url.scheme == "https" else ""
        finally:
            await stream.aclose()
    except (httpcore2.NetworkError, httpcore2.TimeoutException) as error:
        failure = failure_of(error)
        report.error(failure.code, failure.full_reason)
        return
    where = _where(target.guard, url.host, addresses)
    report.done("; ".join(filter(None, [where, security])))
    if url.scheme == "http" and not all(map(_is_loopback, addresses)):
        report.warn("config.plain_http", "requests and rewards are not encrypted")


async def _security(
    target: ProbeTarget, url: Target, stream: httpcore2.AsyncNetworkStream, report: ReportBuilder
) -> str:
    context = target.tls or default_tls()
    context.minimum_version = max(context.minimum_version, ssl.TLSVersion.TLSv1_2)
    secured = await stream.start_tls(context, url.host, target.component.timeouts.connect)
    found = secured.get_extra_info("ssl_object")
    certificate = found.getpeercert() or {}
    until = certificate.get("notAfter")
    if until is None:
        return f"{found.version()}"
    days = (ssl.cert_time_to_seconds(until) - datetime.now(UTC).timestamp()) / SECONDS_OF_DAY
    if days < HINTS.probe_certificate_days:
        report.warn("tls.expires_soon", f"its certificate is valid for {days:.1f} more days")
    return f"{found.version()}, certificate valid until {until}"


def _where(guard: EgressPolicy | None, host: str, addresses: list[str]) -> str:
    if guard is not None:  # a report of the service must not show how names resolve in its network
        return f"{len(addresses)} address{'es' * (len(addresses) > 1)}, allowed"
    public = EgressPolicy()
    shown = ", ".join(addresses[:SHOWN_ADDRESSES])
    if all(public.allows_address(ipaddress.ip_address(address), host) for address in addresses):
        return shown
    return f"{shown} (not a public address: the operator of a DAR service must allow it)"


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback
