"""Where requests to reward services may go.

A listening socket shows that nothing reaches a blocked address.
"""

import asyncio
import contextlib
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import httpcore2
import pytest
import trustme

from dar.errors import ConfigurationError, RewardMisconfiguredError
from dar.protocol.reward_spec import RewardTimeouts
from dar.rewards.base import Failed, Scored
from dar.rewards.http.egress import EgressPolicy, GuardedBackend, origin_of, parse_url
from dar.rewards.http.endpoint import Endpoint, EndpointConfig
from dar.rewards.http_reward import HttpOptions
from dar.settings import Settings
from fakes.hostile_manners import hostile_server
from fakes.reward_server import RewardServer

Ask = Callable[..., Any]
STRICT = EgressPolicy()
ON_LOOPBACK = EgressPolicy(allow_http=("*",), allow_cidrs=("127.0.0.0/8",))


class Trap:
    """A listener on loopback that counts who connects."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]

    @property
    def connections(self) -> int:
        self._socket.settimeout(0.1)
        count = 0
        while True:
            try:
                self._socket.accept()[0].close()
            except TimeoutError:
                return count
            count += 1

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def trap() -> Iterator[Trap]:
    trap = Trap()
    yield trap
    trap.close()


def answering(*answers: Sequence[str]) -> Callable[[str, int], Sequence[str]]:
    """A resolver that gives these answers in turn, and repeats the last."""
    left = list(answers)
    return lambda _host, _port: left.pop(0) if len(left) > 1 else left[0]


LOOPBACKS = {
    "loopback": ["127.0.0.1"],
    "mapped": ["::ffff:127.0.0.1"],
    "compatible": ["::127.0.0.1"],
    "unspecified": ["0.0.0.0"],
    "nat64": ["64:ff9b::7f00:1"],
    "local nat64": ["64:ff9b:1::7f00:1"],
    "6to4": ["2002:7f00:1::"],
    "teredo": ["2001:0:7f00:1::"],
    "v6 loopback": ["::1"],
    "mixed, public first": ["93.184.216.34", "127.0.0.1"],
    "mixed, public last": ["127.0.0.1", "93.184.216.34"],
    "mixed families": ["2606:2800:220:1::1", "::ffff:10.0.0.1"],
    "far too many": [f"93.184.216.{n}" for n in range(17)],
    "zone": ["fe80::1%lo"],
}


@pytest.mark.parametrize("name", LOOPBACKS)
async def test_a_name_with_a_blocked_answer_is_not_dialled_at_all(
    trap: Trap, score: Ask, credentials: HttpOptions, name: str
) -> None:
    policy = EgressPolicy(allow_http=("*",))
    resolver = answering(LOOPBACKS[name])
    options = replace(credentials, guard=policy, resolver=resolver)
    with pytest.raises(RewardMisconfiguredError) as caught:
        await score(f"http://rewards.example:{trap.port}/score", options=options)
    assert caught.value.error_code == "egress_denied"
    assert not any(address in caught.value.message for address in LOOPBACKS[name])
    assert trap.connections == 0


async def test_a_name_that_moves_to_loopback_is_caught_at_the_next_connection(
    trap: Trap, score: Ask, server: RewardServer, credentials: HttpOptions
) -> None:
    """Public at the check, private when it is dialled: here each connection has its own answer,
    checked before it is used.
    """
    asked: list[str] = []

    def moving(host: str, _port: int) -> Sequence[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["127.0.0.2"]

    first_only = EgressPolicy(allow_http=("*",), allow_cidrs=("127.0.0.1/32",))
    options = replace(credentials, guard=first_only, resolver=moving)
    url = server.at("closes-idle").replace("127.0.0.1", "rewards.example")
    parse_url(url, first_only)
    assert await score(url, options=options) == [Scored(n / 8) for n in range(4)]
    await asyncio.sleep(0.05)
    with pytest.raises(RewardMisconfiguredError, match="not allowed"):
        await score(url, options=options)
    assert asked == ["rewards.example"] * 2
    assert server.connections == 1


async def test_an_answer_that_changes_between_look_ups_is_never_asked_for_twice(
    trap: Trap, score: Ask, credentials: HttpOptions
) -> None:
    """The first answer is public and leads nowhere.

    Dialling the name again would reach the trap.
    """
    resolver = answering(["192.0.2.1"], ["127.0.0.1"])
    options = replace(credentials, guard=EgressPolicy(allow_http=("*",)), resolver=resolver)
    with pytest.raises(RewardMisconfiguredError):
        await score(f"http://rewards.example:{trap.port}/", options=options)
    backend = GuardedBackend(
        EgressPolicy(allow_cidrs=("192.0.2.0/24",)), answering(["192.0.2.1"], ["127.0.0.1"])
    )
    with pytest.raises((httpcore2.ConnectError, httpcore2.ConnectTimeout)):
        await backend.connect_tcp("rewards.example", trap.port, timeout=0.2)
    assert trap.connections == 0


NUMBERS = [
    "2130706433", "127.1", "0x7f000001", "0177.0.0.1", "0x7f.1", "127.0.1", "00.0.0.0", "127.0.0.1.", "017700000001",
    "[::1]", "[::ffff:7f00:1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "127.0.0.1", "0.0.0.0", "10.0.0.1", "100.64.0.1",
    "169.254.169.254", "168.63.129.16", "192.88.99.1", "224.0.0.1", "[fec0::1]", "[fd00:ec2::254]", "①②⑦.0.0.1",
]  # fmt: skip


@pytest.mark.parametrize("host", NUMBERS)
async def test_numbers_that_lead_inside_are_refused_before_anything_is_sent(
    trap: Trap, score: Ask, credentials: HttpOptions, host: str
) -> None:
    options = replace(credentials, guard=EgressPolicy(allow_http=("*",)))
    with pytest.raises(RewardMisconfiguredError) as caught:
        await score(f"http://{host}:{trap.port}/score", options=options)
    assert caught.value.error_code in {"egress_denied", "config.url"}
    assert trap.connections == 0


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("https://rewards.example/score", None),
        ("https://rewards.example:8443/score", None),
        ("https://93.184.216.34/score", None),
        ("https://[2606:2800:220:1::1]/score", None),
        ("https://bücher.example/score", None),
        ("http://rewards.example/score", "config.url"),
        ("http://allowed.example/score", None),
        ("http://a.sub.example/score", None),
        ("http://sub.example/score", "config.url"),
        ("https://rewards.example:22/score", "config.url"),
        ("https://rewards.example:80/score", "config.url"),
        ("http://allowed.example:80/score", None),
        ("https://user@rewards.example/", "config.url"),
        ("https://rewards.example/#x", "config.url"),
        ("https://[fe80::1%25eth0]/", "config.url"),
        ("https://rewards.example/" + "x" * 2048, "config.url"),
        ("https:///score", "config.url"),
        ("ftp://rewards.example/", "config.url"),
        ("unix:///run/x", "config.url"),
        ("file:///etc/passwd", "config.url"),
        ("https://rewards..example/", "config.url"),
        ("https://.rewards.example/", "config.url"),
        ("https://rewards.example../", "config.url"),
        ("https://./", "config.url"),
        (f"https://{'a' * 63}.example/", None),
        (f"https://{'a' * 64}.example/", "config.url"),
        (f"https://{'a.' * 130}example/", "config.url"),
        ("https://rewards.example./", None),
        ("https://localhost/", None),  # a name; what it resolves to is refused
        ("https://127.0.0.1/", "egress_denied"),
    ],
)
def test_rules_for_urls(url: str, code: str | None) -> None:
    policy = EgressPolicy(allow_http=("allowed.example", "*.sub.example"))
    if code is None:
        parse_url(url, policy)
    else:
        with pytest.raises(RewardMisconfiguredError) as caught:
            parse_url(url, policy)
        assert caught.value.error_code == code


def test_the_origin_of_a_stored_url_is_known_although_its_host_cannot_exist() -> None:
    assert origin_of("https://rewards..example/score") == "https://rewards..example:443"


async def test_a_name_that_the_resolver_cannot_write_is_not_found(
    score: Ask, credentials: HttpOptions
) -> None:
    def unwritable(host: str, _port: int) -> Sequence[str]:
        raise UnicodeError(f"label of {host} empty or too long")

    options = replace(credentials, guard=None, resolver=unwritable)
    with pytest.raises(RewardMisconfiguredError, match="host name was not found") as caught:
        await score("https://rewards.example/score", options=options)
    assert caught.value.error_code == "dns"


def test_a_host_is_normalised() -> None:
    target = parse_url("https://Rewards.EXAMPLE./a?b=1", STRICT)
    assert (target.host, target.port, target.target) == ("rewards.example", 443, "/a?b=1")
    assert target.label == "https://rewards.example/a"
    assert parse_url("https://bücher.example/", STRICT).host == "xn--bcher-kva.example"


def test_operators_may_allow_networks_and_hosts_but_never_metadata() -> None:
    allowing = EgressPolicy(
        allow_cidrs=("10.0.0.0/8", "169.254.0.0/16", "fd00::/8", "::/0"),
        allow_hosts=("in.example",),
    )
    address = ipaddress.ip_address
    assert allowing.allows_address(address("10.1.2.3"), "x")
    assert allowing.allows_address(address("::ffff:10.1.2.3"), "x")
    assert not allowing.allows_address(address("192.168.0.1"), "x")
    assert allowing.allows_address(address("192.168.0.1"), "in.example")
    for metadata in (
        "169.254.169.254",
        "168.63.129.16",
        "::ffff:169.254.169.254",
        "64:ff9b::a9fe:a9fe",
        "2002:a9fe:a9fe::",
        "fd00:ec2::254",
    ):
        assert not allowing.allows_address(address(metadata), "x")
        assert not allowing.allows_address(address(metadata), "in.example")


def test_a_port_list_replaces_the_rule() -> None:
    policy = EgressPolicy(ports=(8443,))
    parse_url("https://rewards.example:8443/", policy)
    with pytest.raises(RewardMisconfiguredError):
        parse_url("https://rewards.example/", policy)


def test_the_policy_comes_from_the_settings() -> None:
    given = {
        "egress_allow_hosts": "a.example, *.b.example",
        "egress_allow_cidrs": "10.0.0.0/8",
        "egress_allow_http": "a.example",
        "egress_ports": "443,9000",
    }
    settings = Settings.model_validate(given)
    policy = EgressPolicy.from_settings(settings)
    assert policy == EgressPolicy(
        ("a.example",), ("a.example", "*.b.example"), ("10.0.0.0/8",), (443, 9000)
    )
    with pytest.raises(ConfigurationError, match="EGRESS"):
        EgressPolicy(allow_cidrs=("10.0.0.1/8",))


async def test_the_guard_is_what_the_pool_dials_with() -> None:
    connection = EndpointConfig(
        target=parse_url("https://rewards.example/", STRICT),
        secrets=(),
        headers=(),
        limits=(1, None),
        guard=STRICT,
        breaker=HttpOptions().breaker,
        budget=HttpOptions().budget,
        tls=None,
        resolver=None,
        owner=None,
    )
    endpoint = Endpoint(connection, {})
    backend = endpoint._pool._network_backend
    assert isinstance(backend, GuardedBackend)
    assert backend.policy is STRICT
    assert endpoint._pool._uds is None
    assert not endpoint._pool._http2
    with pytest.raises(httpcore2.ConnectError):
        await backend.connect_unix_socket("/run/docker.sock")


async def test_names_that_do_not_exist_and_resolvers_that_are_stuck(
    score: Ask, credentials: HttpOptions
) -> None:
    def missing(_host: str, _port: int) -> Sequence[str]:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    options = replace(credentials, guard=ON_LOOPBACK, resolver=missing)
    with pytest.raises(RewardMisconfiguredError) as caught:
        await score("https://missing.example/", options=options)
    assert caught.value.error_code == "dns"
    stuck = threading.Event()
    timeouts = RewardTimeouts(connect=0.1, read=20, attempt=20, deadline=60)
    slow = replace(
        credentials, guard=ON_LOOPBACK, timeouts=timeouts, resolver=lambda *_: [str(stuck.wait(20))]
    )
    started = time.monotonic()
    found = await score("https://slow.example/", options=slow)
    assert time.monotonic() - started < 10
    assert {(type(result), result.code) for result in found} == {(Failed, "dns")}
    stuck.set()


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (socket.gaierror(socket.EAI_AGAIN, "x"), "could not be looked up: the name server did not"),
        (socket.gaierror(socket.EAI_FAIL, "x"), "could not be looked up: the name server reported"),
        (socket.gaierror(socket.EAI_SYSTEM, "x"), "could not be looked up: the resolver failed"),
        (OSError(24, "Too many open files"), "could not be looked up: the resolver failed"),
        (OSError("odd"), "could not be looked up: the resolver failed"),
        (socket.gaierror(socket.EAI_NONAME, "x"), "was not found"),
        ([], "was not found"),
    ],
    ids=repr,
)
async def test_only_a_name_that_does_not_exist_is_not_found(
    score: Ask, credentials: HttpOptions, outcome: list[str] | OSError, said: str
) -> None:
    def resolver(_host: str, _port: int) -> Sequence[str]:
        if isinstance(outcome, OSError):
            raise outcome
        return outcome

    options = replace(credentials, guard=ON_LOOPBACK, resolver=resolver)
    expectation: Any = pytest.raises(RewardMisconfiguredError, match=said)
    if said != "was not found":
        expectation = contextlib.nullcontext()
    found: list[Any] = []
    with expectation as caught:
        found = await score("https://judge.example/", options=options)
    codes = {(result.code, result.is_transient) for result in found}
    assert codes == {("dns", True)} or caught.value.error_code == "dns"
    assert all(f"its host name {said}" in result.message for result in found)


async def test_proxies_of_the_environment_are_not_used(
    trap: Trap, server: RewardServer, score: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{trap.port}")
    assert await score(server.at("fine")) == [Scored(n / 8) for n in range(4)]
    assert trap.connections == 0


async def test_the_certificate_is_checked_for_the_name_though_an_address_is_dialled(
    score: Ask, credentials: HttpOptions
) -> None:
    authority = trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("rewards.example").configure_cert(tls)
    names: list[str | None] = []
    tls.sni_callback = lambda _socket, name, _context: names.append(name)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    with hostile_server(tls) as server:
        options = replace(
            credentials, guard=ON_LOOPBACK, tls=trusting, resolver=answering(["127.0.0.1"])
        )
        url = server.at("fine").replace("127.0.0.1", "rewards.example")
        assert await score(url, options=options) == [Scored(n / 8) for n in range(4)]
        assert names == ["rewards.example"]
        assert server.requests[0].headers["host"] == f"rewards.example:{server.port}"
        with pytest.raises(RewardMisconfiguredError) as caught:
            await score(url.replace("rewards.", "other."), options=options)
    assert caught.value.error_code == "tls.certificate"
