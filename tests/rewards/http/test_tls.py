"""Certificates that do not hold: permanent, with the reason, and never a way around."""

import contextlib
import socket
import ssl
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import trustme

from dar.errors import RewardMisconfiguredError
from dar.protocol.reward_spec import RewardRetry, RewardTimeouts
from dar.rewards.base import Scored
from dar.rewards.http_reward import HttpOptions, HttpReward
from fakes.hostile_manners import hostile_server
from fakes.reward_types import MakeSamples

Ask = Callable[..., Any]


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def trusting(authority: trustme.CA, credentials: HttpOptions) -> HttpOptions:
    """Options that trust the test's authority."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return replace(credentials, tls=context)


def context_of(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


@pytest.fixture
def contexts(authority: trustme.CA) -> dict[str, ssl.SSLContext]:
    yesterday = datetime.now(UTC) - timedelta(days=1)
    return {
        "good": context_of(authority.issue_cert("127.0.0.1")),
        "expired": context_of(authority.issue_cert("127.0.0.1", not_after=yesterday)),
        "unknown": context_of(trustme.CA().issue_cert("127.0.0.1")),
        "wrong name": context_of(authority.issue_cert("other.example")),
    }


@pytest.mark.parametrize(
    ("name", "code", "word"),
    [
        ("expired", "tls.certificate", "expired"),
        ("unknown", "tls.certificate", "certificate"),
        ("wrong name", "tls.certificate", "127.0.0.1"),
    ],
)
async def test_a_bad_certificate_is_permanent_and_nothing_is_sent(
    contexts: dict[str, ssl.SSLContext],
    score: Ask,
    trusting: HttpOptions,
    name: str,
    code: str,
    word: str,
) -> None:
    with hostile_server(contexts[name]) as server:
        with pytest.raises(RewardMisconfiguredError, match=word) as caught:
            await score(server.at("fine"), options=trusting)
        assert caught.value.error_code == code
        assert server.requests == []


async def test_a_server_of_the_last_century_is_permanent(
    authority: trustme.CA, score: Ask, trusting: HttpOptions
) -> None:
    """On blocking sockets: asyncio's server closes without the alert that says why."""
    old = context_of(authority.issue_cert("127.0.0.1"))
    old.set_ciphers("DEFAULT:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that is what the test is about
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1

    def serve(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    old.wrap_socket(connection, server_side=True).close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        with pytest.raises(RewardMisconfiguredError, match=r"TLS 1\.2 or newer") as caught:
            await score(f"https://127.0.0.1:{listener.getsockname()[1]}/", options=trusting)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert caught.value.error_code == "tls.version"


async def test_a_handshake_that_takes_too_long_leaves_no_connection(
    score: Ask, trusting: HttpOptions
) -> None:
    timeouts = RewardTimeouts(connect=10, read=20, attempt=0.4, deadline=60)
    options = replace(trusting, timeouts=timeouts, retry=RewardRetry(attempts=1))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        found = await score(f"https://127.0.0.1:{listener.getsockname()[1]}/", options=options)
        assert {result.code for result in found} == {"timeout"}
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(5)
            while connection.recv(65536):  # until the client closes it
                pass


async def test_a_server_that_does_not_shake_hands_is_told_from_one_that_is_not_reached(
    score: Ask, trusting: HttpOptions
) -> None:
    timeouts = RewardTimeouts(connect=0.2, read=20, attempt=20, deadline=60)
    options = replace(trusting, timeouts=timeouts, retry=RewardRetry(attempts=1))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        found = await score(f"https://127.0.0.1:{listener.getsockname()[1]}/", options=options)
    assert {(result.code, result.is_transient) for result in found} == {("tls.timeout", True)}
    assert "connected, but the TLS handshake did not end in time" in found[0].message


async def test_a_good_certificate_is_believed(
    contexts: dict[str, ssl.SSLContext], score: Ask, trusting: HttpOptions
) -> None:
    with hostile_server(contexts["good"]) as server:
        found = await score(server.at("fine"), options=trusting)
    assert found == [Scored(n / 8) for n in range(4)]


async def test_a_certificate_that_changes_during_a_job_stops_it(
    contexts: dict[str, ssl.SSLContext],
    authority: trustme.CA,
    trusting: HttpOptions,
    make_samples: MakeSamples,
    context: Any,
) -> None:
    with hostile_server(contexts["good"]) as server:
        source = HttpReward("r", server.at("closes-idle"), options=trusting)
        await source.score(make_samples(4), context)
        authority_of_another = trustme.CA()
        authority_of_another.issue_cert("127.0.0.1").configure_cert(contexts["good"])
        with pytest.raises(RewardMisconfiguredError, match="certificate"):
            await source.score(make_samples(4), context)
        assert len(server.requests) == 1
        await source.aclose()
