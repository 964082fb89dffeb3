"""Step 1 of a probe: TLS versions, certificates and what a name resolves to."""

import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import trustme
from starlette.applications import Starlette

from dar.rewards.http.egress import EgressPolicy
from fakes.hostile_manners import hostile_server
from fakes.probed_services import Codes, CodeSet, Services, Statuses
from fakes.reward_server import RewardServer

Probe = Callable[..., Any]
DENIED = ["93.184.215.14", "10.0.0.1"]


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.fixture
def serve_tls(authority: trustme.CA) -> Callable[..., Any]:
    """A service behind a certificate for ``host`` that ends in so many days."""

    def serve(host: str = "127.0.0.1", days: float = 90) -> Any:
        until = datetime.now(UTC) + timedelta(days=days)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(host, not_after=until).configure_cert(context)
        return hostile_server(context)

    return serve


@pytest.mark.parametrize(
    ("host", "days", "word"),
    [("127.0.0.1", -1, "expired"), ("other.example", 90, "127.0.0.1")],
)
async def test_a_certificate_that_does_not_hold_is_an_error_and_nothing_is_sent(
    ask_probe: Probe,
    failed: Codes,
    serve_tls: Any,
    trusting: ssl.SSLContext,
    host: str,
    days: float,
    word: str,
) -> None:
    with serve_tls(host, days) as server:
        report = await ask_probe(server.at("fine"), tls=trusting)
        assert server.requests == []
    assert failed(report) == [(1, "tls.certificate")]
    assert word in report.errors[0].detail


async def test_a_certificate_that_ends_soon_is_warned_of(
    ask_probe: Probe, warned: CodeSet, serve_tls: Any, trusting: ssl.SSLContext
) -> None:
    with serve_tls(days=5) as server:
        report = await ask_probe(server.at("fine"), tls=trusting, light=True)
    assert report.ok
    assert (1, "tls.expires_soon") in warned(report)
    assert (
        "4.9 more days" in report.warnings[0].detail or "5.0 more days" in report.warnings[0].detail
    )


async def test_a_good_certificate_is_told_about(
    ask_probe: Probe, statuses: Statuses, serve_tls: Any, trusting: ssl.SSLContext
) -> None:
    with serve_tls() as server:
        report = await ask_probe(server.at("fine"), tls=trusting, light=True)
    assert statuses(report)[1] == "ok"
    assert "TLSv1.3, certificate valid until" in report.steps[0].detail


async def test_a_service_without_tls_is_no_https_service(
    ask_probe: Probe, failed: Codes, serve_app: Callable[[Starlette], str]
) -> None:
    report = await ask_probe(serve_app(Starlette()).replace("http:", "https:"))
    assert failed(report) == [(1, "protocol")]
    assert "without TLS" in report.errors[0].detail


async def test_behind_a_guard_addresses_are_counted_and_not_named(
    ask_probe: Probe, statuses: Statuses, hostile: Callable[..., RewardServer], services: Services
) -> None:
    guard = EgressPolicy(allow_http=("reward.test",), allow_hosts=("reward.test",))
    url = hostile(services.good).url.replace("127.0.0.1", "reward.test")
    report = await ask_probe(url, guard=guard, resolver=lambda *_: ["127.0.0.1"], light=True)
    assert statuses(report)[1] == "ok"
    assert report.steps[0].detail == "1 address, allowed"


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("https://10.0.0.1/score", "egress_denied"),
        ("http://reward.example/score", "config.url"),
        ("https://metadata.example/score", "egress_denied"),
    ],
)
async def test_a_forbidden_address_ends_at_step_one_and_is_not_named(
    ask_probe: Probe, failed: Codes, statuses: Statuses, url: str, code: str
) -> None:
    report = await ask_probe(url, guard=EgressPolicy(), resolver=lambda *_: DENIED)
    assert failed(report) == [(1, code)]
    assert set(statuses(report).values()) == {"fail", "skipped"}
    found = report.model_dump_json(include={"errors": {"__all__": {"detail"}}, "steps": True})
    assert "10.0.0.1" not in found
