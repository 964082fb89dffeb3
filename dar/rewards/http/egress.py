"""The egress guard: which addresses requests to reward services may reach.

A user chooses the URL, and could make this machine call its own network. A check of the name before
the call does not help, as the name may resolve to another address a moment later. So the name is
resolved once, every address is checked, and only checked addresses are dialled. Host name, SNI and
certificate stay those of the URL.
"""

import asyncio
import ipaddress
import socket
import time
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import httpcore2
import httpx2

from dar.errors import ConfigurationError, RewardMisconfiguredError
from dar.rewards.http.connection import CURRENT, JoinedStream
from dar.rewards.http.dns import RESOLVE_SECONDS, resolve_in_thread
from dar.settings import Settings

MAX_URL = 2048
MAX_HOST, MAX_LABEL = 253, 63
"""Longest host name, and longest part between its dots (RFC 1035)."""
MAX_ANSWERS = 16
"""A name with more addresses is rejected."""
MAX_DIALLED = 4
"""Most addresses of one name that are dialled."""
DEFAULT_PORTS = {"http": 80, "https": 443}
FIRST_FREE_PORT = 1024
DENIED = "the address of the reward service is not allowed; ask the operator of this installation"
"""The same text for everything blocked, so that it reveals nothing about the network."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolver = Callable[[str, int], Sequence[str]]
"""Addresses of a host name, as text; blocks. Raises ``socket.gaierror`` or another `OSError`."""

# ``is_global`` is true for several of these, and ``is_private`` false for others (Python 3.11).
_BLOCKED: tuple[Network, ...] = tuple(
    map(
        ipaddress.ip_network,
        (
            "0.0.0.0/8", "100.64.0.0/10", "168.63.129.16/32", "192.0.0.0/24", "192.88.99.0/24", "198.18.0.0/15", "240.0.0.0/4",
            "::/96", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "2001::/32", "2002::/16", "fc00::/7", "fe80::/10", "fec0::/10",
        ),
    )
)  # fmt: skip
_METADATA: frozenset[Address] = frozenset(
    map(
        ipaddress.ip_address,
        (
            "169.254.169.254", "169.254.170.2", "169.254.170.23", "168.63.129.16", "100.100.100.200", "192.0.0.192",
            "fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254",
        ),
    )
)  # fmt: skip
"""Metadata services of clouds, which hand out credentials. An operator cannot allow them."""


@dataclass(frozen=True, slots=True)
class EgressPolicy:
    """What the operator allows besides public HTTPS services; a job spec cannot change it.

    Raises:
        ConfigurationError: An entry of ``allow_cidrs`` is not a network.
    """

    allow_http: tuple[str, ...] = ()
    """Hosts that may be reached over plain HTTP; ``*.example.org``: all subdomains, ``*``: all
    hosts."""
    allow_hosts: tuple[str, ...] = ()
    """Hosts whose addresses may be private, in the same form."""
    allow_cidrs: tuple[str, ...] = ()
    """Networks that may be reached although they are not public."""
    ports: tuple[int, ...] | None = None
    """Allowed ports; None: 443, 80 for plain HTTP, and 1024 and above."""

    def __post_init__(self) -> None:
        _networks(self.allow_cidrs)

    @classmethod
    def from_settings(cls, settings: Settings) -> "EgressPolicy":
        """The policy in the settings."""
        return cls(
            allow_http=settings.egress_allow_http,
            allow_hosts=settings.egress_allow_hosts,
            allow_cidrs=settings.egress_allow_cidrs,
            ports=settings.egress_ports or None,
        )

    def allows_address(self, address: Address, host: str) -> bool:
        """Whether ``address``, to which ``host`` resolves, may be dialled."""
        if getattr(address, "scope_id", None) is not None:
            return False
        plain = _unwrapped(address)
        if not _METADATA.isdisjoint(_embedded(plain)):
            return False
        if _matches(host, self.allow_hosts):
            return True
        if any(plain in network for network in _networks(self.allow_cidrs)):
            return True
        return not _is_special(plain)

    def allows_port(self, port: int, scheme: str) -> bool:
        """Whether ``port`` may be used."""
        if self.ports is not None:
            return port in self.ports
        return port >= FIRST_FREE_PORT or port == 443 or (port == 80 and scheme == "http")


@lru_cache(maxsize=64)
def _networks(cidrs: tuple[str, ...]) -> tuple[Network, ...]:
    try:
        return tuple(ipaddress.ip_network(cidr) for cidr in cidrs)
    except ValueError as error:
        raise ConfigurationError(f"DAR_EGRESS_ALLOW_CIDRS: {error}") from None


def _matches(host: str, patterns: Iterable[str]) -> bool:
    return any(
        pattern in {"*", host} or (pattern.startswith("*.") and host.endswith(pattern[1:]))
        for pattern in patterns
    )


def _unwrapped(address: Address) -> Address:
    """The IPv4 address in an IPv4-mapped IPv6 address, as the kernel dials IPv4."""
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _embedded(address: Address) -> set[Address]:
    """The address and those that tunnels and translators forward it to."""
    found: set[Address] = {address}
    if isinstance(address, ipaddress.IPv6Address):
        found.add(ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF))
        found.update(filter(None, (address.sixtofour, *(address.teredo or ()))))
    return found


def _is_special(address: Address) -> bool:
    return (
        not address.is_global
        or address.is_multicast
        or address.is_reserved
        or address.is_unspecified
        or address.is_loopback
        or address.is_link_local
        or any(address in network for network in _BLOCKED)
    )


@dataclass(frozen=True, slots=True)
class Target:
    """A parsed URL."""

    scheme: str
    host: str
    """Lower case, IDNA, without brackets."""
    port: int
    target: str
    """Path and query."""

    @property
    def origin(self) -> str:
        """Scheme, host and port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"

    @property
    def authority(self) -> str:
        """Content of the ``Host`` header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        is_default = self.port == DEFAULT_PORTS[self.scheme]
        return host if is_default else f"{host}:{self.port}"

    @property
    def label(self) -> str:
        """The URL without its query, which may hold a secret."""
        return f"{self.scheme}://{self.authority}{self.target.partition('?')[0]}"


def parse_url(url: str, policy: EgressPolicy | None) -> Target:
    """Parse and check ``url``.

    Raises:
        RewardMisconfiguredError: ``config.url``: the URL is invalid, or its host cannot exist;
            ``egress_denied``: the policy forbids it.
    """
    found, given = _parsed(url)
    if ":" not in found.host:
        _check_name(found.host)
    if policy is not None:
        _check_target(found, given, policy)
    return found


def origin_of(url: str) -> str:
    """Scheme, host and port of a stored URL, also of a host that cannot exist.

    Raises:
        RewardMisconfiguredError: The URL is invalid.
    """
    return _parsed(url)[0].origin


def _parsed(url: str) -> tuple[Target, str]:
    """The parts of ``url``, and its host name before the conversion to IDNA.

    Raises:
        RewardMisconfiguredError: ``config.url``: the URL is invalid.
    """
    try:
        parts = httpx2.URL(url)
        host = parts.raw_host.decode("ascii").lower().removesuffix(".")
        given = unicodedata.normalize("NFKC", parts.host).lower().removesuffix(".")
        target = parts.raw_path.decode("ascii")
    except (httpx2.InvalidURL, UnicodeError, TypeError):
        raise _bad_url("it cannot be parsed") from None
    if parts.scheme not in {"http", "https"}:
        raise _bad_url("it must start with https://")
    if not host or len(url) > MAX_URL:
        raise _bad_url(f"it names no host, or is longer than {MAX_URL} characters")
    if parts.userinfo or parts.fragment or "%" in host:
        raise _bad_url("it holds a user name, a fragment or a zone")
    return Target(parts.scheme, host, parts.port or DEFAULT_PORTS[parts.scheme], target), given


def _check_name(host: str) -> None:
    labels = host.split(".")
    if "" in labels:
        raise _bad_url("its host name has nothing between two dots")
    if len(host) > MAX_HOST or max(map(len, labels)) > MAX_LABEL:
        raise _bad_url(
            f"its host name is longer than {MAX_HOST} characters, or a part of it than {MAX_LABEL}"
        )


def _check_target(target: Target, given: str, policy: EgressPolicy) -> None:
    if target.scheme == "http" and not _matches(target.host, policy.allow_http):
        raise _bad_url("it must start with https://; only named hosts may use http://")
    if not policy.allows_port(target.port, target.scheme):
        raise _bad_url(f"port {target.port} is not allowed")
    if any(_is_number(host) for host in (target.host, given)):
        raise denied()
    address = _as_address(target.host)
    if address is not None and not policy.allows_address(address, target.host):
        raise denied()


def _is_number(host: str) -> bool:
    """Whether ``host`` is an IPv4 address in an unusual form (``127.1``, ``0x7f000001``)."""
    last = host.rpartition(".")[2]
    is_numeric = last.isdigit() or (
        last.startswith("0x") and all(ch in "0123456789abcdef" for ch in last[2:])
    )
    return is_numeric and _as_address(host) is None


def _as_address(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _bad_url(why: str) -> RewardMisconfiguredError:
    return RewardMisconfiguredError(f"not a usable reward URL: {why}", code="config.url")


def denied() -> RewardMisconfiguredError:
    """The error for everything blocked."""
    return RewardMisconfiguredError(DENIED, code="egress_denied")


class EgressDeniedError(httpcore2.ConnectError):
    """An address is blocked and was not dialled."""


class GuardedBackend(httpcore2.AsyncNetworkBackend):
    """Opens connections for the pool: resolves once, checks every address, dials only those.

    Args:
        policy: What is allowed; None: everything, for scripts on a user's own machine.
        resolver: Looks up host names; None: the system's resolver.
    """

    def __init__(self, policy: EgressPolicy | None, resolver: Resolver | None = None) -> None:
        self.policy = policy
        self._resolver = resolver or system_addresses
        self._dialler = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - part of the base class
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Connect to the first address that accepts.

        Raises:
            EgressDeniedError: An address is blocked.
            httpcore2.ConnectError: No address could be reached, or there is none.
            httpcore2.ConnectTimeout: No address accepted within ``timeout`` seconds.
        """
        timings = CURRENT.get()
        if timings is not None:
            timings.has_dialled = True
        ends_at = time.monotonic() + (RESOLVE_SECONDS if timeout is None else timeout)
        addresses = (await self._checked_addresses(host, port, ends_at))[:MAX_DIALLED]
        if timings is not None:
            timings.resolved()
        failure: Exception = httpcore2.ConnectError("no address")
        for place, address in enumerate(addresses):
            share = max(0.001, ends_at - time.monotonic()) / (len(addresses) - place)
            try:
                stream = await self._dialler.connect_tcp(
                    str(address), port, share, local_address, socket_options
                )
                return JoinedStream(stream)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure

    async def addresses(self, host: str, port: int, seconds: float) -> list[str]:
        """The addresses that would be dialled for ``host``.

        Raises:
            EgressDeniedError: One of them is blocked.
            httpcore2.ConnectError: There is none.
        """
        found = await self._checked_addresses(host, port, time.monotonic() + seconds)
        return [str(address) for address in found]

    async def _checked_addresses(self, host: str, port: int, ends_at: float) -> list[Address]:
        literal = _as_address(host)
        found = [literal] if literal is not None else await self._resolve(host, port, ends_at)
        if self.policy is not None:
            allowed = all(self.policy.allows_address(address, host) for address in found)
            if not allowed or len(found) > MAX_ANSWERS or _is_number(host):
                raise EgressDeniedError(DENIED)
        return [_unwrapped(address) for address in found]

    async def _resolve(self, host: str, port: int, ends_at: float) -> list[Address]:
        seconds = min(RESOLVE_SECONDS, max(0.001, ends_at - time.monotonic()))
        try:
            texts = await self._looked_up(host, port, seconds)
        except (socket.gaierror, UnicodeError) as error:
            # The pool drops the cause of an error but keeps its context, which is the same here.
            raise httpcore2.ConnectError(str(error)) from error
        return list(dict.fromkeys(map(ipaddress.ip_address, texts)))

    async def _looked_up(self, host: str, port: int, seconds: float) -> Sequence[str]:
        """Addresses of ``host``, at least one.

        Raises:
            socket.gaierror: There is none, or the look-up failed.
            UnicodeError: The name cannot be written for DNS.
        """
        try:
            async with asyncio.timeout(seconds):
                found = await resolve_in_thread(lambda: self._resolver(host, port))
        except TimeoutError:
            reason = "the resolver did not answer in time"
            raise socket.gaierror(socket.EAI_AGAIN, reason) from None
        except socket.gaierror:
            raise
        except OSError as error:  # of the system, as when it has no file left for a socket
            raise socket.gaierror(socket.EAI_SYSTEM, str(error)) from None
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "the name has no address")
        return found

    async def connect_unix_socket(self, *_: object, **__: object) -> httpcore2.AsyncNetworkStream:
        """Reject: a reward service has no Unix socket.

        Raises:
            EgressDeniedError: Always.
        """
        raise EgressDeniedError(DENIED)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def system_addresses(host: str, port: int) -> list[str]:
    """The addresses of ``host`` from the system's resolver."""
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
