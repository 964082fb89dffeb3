"""Which addresses a reward service may have."""

import ipaddress
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from dar.errors import RewardMisconfiguredError
from dar.settings import Settings


@dataclass(frozen=True)
class EgressPolicy:
    """What the operator allows beyond public https addresses."""

    allow_http: tuple[str, ...] = ()
    """Hosts that may be reached without TLS; ``*``: all."""
    allow_hosts: tuple[str, ...] = ()
    """Hosts that may have any address."""
    allow_cidrs: tuple[str, ...] = ()
    """Networks that are reachable though they are private."""

    @classmethod
    def from_settings(cls, settings: Settings) -> "EgressPolicy":
        """The policy of this installation."""
        return cls(
            allow_http=settings.egress_allow_http,
            allow_hosts=settings.egress_allow_hosts,
            allow_cidrs=settings.egress_allow_cidrs,
        )


def check_url(url: str, policy: EgressPolicy) -> None:
    """Raise unless ``url`` may be reached; resolves its host.

    Raises:
        RewardMisconfiguredError: ``config.url`` or ``egress_denied``.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme == "http" and not {host, "*"} & set(policy.allow_http):
        raise RewardMisconfiguredError(
            "reward services are reached by https here; http needs the operator's leave (DAR_EGRESS_ALLOW_HTTP)",
            code="egress_denied",
        )
    if host in policy.allow_hosts:
        return
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except socket.gaierror:
        return  # the request itself says so
    networks = [ipaddress.ip_network(cidr) for cidr in policy.allow_cidrs]
    for *_, address in found:
        ip = ipaddress.ip_address(address[0])
        is_allowed = any(ip in network for network in networks)
        if not is_allowed and not ip.is_global:
            raise RewardMisconfiguredError(
                "this address cannot be used for rewards here", code="egress_denied"
            )
