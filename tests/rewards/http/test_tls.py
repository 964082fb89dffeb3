"""Certificates that do not hold: permanent, with the reason, and never a way around.

Alerts, and TLS that breaks after the handshake, have their reason too.
"""

import _ssl
import contextlib
import os
import socket
import ssl
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpcore2
import pytest
import trustme

from dar.errors import RewardMisconfiguredError
from dar.protocol.reward_spec import RewardRetry, RewardTimeouts
from dar.rewards.base import Scored
from dar.rewards.http.responses import failure_of
from dar.rewards.http_reward import HttpOptions, HttpReward
from dar.rewards.probe.report import ADVICE
from dar.rewards.protocols.plain import PlainProtocol
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


@contextlib.contextmanager
def peer(manner: Callable[[socket.socket], object]) -> Iterator[str]:
    """The address of a server on blocking sockets, which treats each connection in a manner.

    asyncio's server closes without the alert that says why.
    """

    def serve(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, contextlib.suppress(OSError):
                    manner(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        yield f"https://127.0.0.1:{listener.getsockname()[1]}/"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def _read_all(connection: socket.socket) -> None:
    """Read until the client closes: a close before it would be a reset, which drops the alert."""
    connection.settimeout(5)
    while connection.recv(65536):
        pass


async def test_a_server_of_the_last_century_is_permanent(
    authority: trustme.CA, score: Ask, trusting: HttpOptions
) -> None:
    old = context_of(authority.issue_cert("127.0.0.1"))
    old.set_ciphers("DEFAULT:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that is what the test is about
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1

    with (
        peer(lambda connection: old.wrap_socket(connection, server_side=True).close()) as url,
        pytest.raises(RewardMisconfiguredError, match=r"TLS 1\.2 or newer") as caught,
    ):
        await score(url, options=trusting)
    assert caught.value.error_code == "tls.version"


async def test_a_required_client_certificate_is_permanent(
    contexts: dict[str, ssl.SSLContext],
    authority: trustme.CA,
    score: Ask,
    trusting: HttpOptions,
) -> None:
    """With TLS 1.3 the handshake ends before the server asks for it."""
    demanding = contexts["good"]
    demanding.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(demanding)

    def demand(connection: socket.socket) -> None:
        with socket.socket(fileno=os.dup(connection.fileno())) as below:
            with contextlib.suppress(ssl.SSLError):
                demanding.wrap_socket(connection, server_side=True)
            _read_all(below)

    with (
        peer(demand) as url,
        pytest.raises(RewardMisconfiguredError, match="requires a client cert") as caught,
    ):
        await score(url, options=trusting)
    assert caught.value.error_code == "tls.client_certificate"


async def test_a_server_that_resets_after_the_handshake_may_require_a_certificate(
    contexts: dict[str, ssl.SSLContext], score: Ask, trusting: HttpOptions
) -> None:
    """The alert of a server that closes at once is lost if the client writes after it."""

    def reset(connection: socket.socket) -> None:
        with contexts["good"].wrap_socket(connection, server_side=True) as secured:
            secured.recv(65536)
            secured.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with peer(reset) as url:
        found = await score(url, options=replace(trusting, retry=RewardRetry(attempts=1)))
    assert {(result.code, result.is_transient) for result in found} == {("tls.broken", True)}
    assert "right after the TLS handshake; it may require a client cert" in found[0].message


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{"
DAMAGED = b"\x17\x03\x03\x00\x40" + b"x" * 64
BREAKS = {
    "a damaged record before the answer": (b"", DAMAGED),
    "a damaged record in the body": (HEAD, DAMAGED),
    "a damaged record in the body of an error": (HEAD.replace(b"200", b"503"), DAMAGED),
    "an alert without encryption": (b"", b"\x15\x03\x03\x00\x02\x02\x50"),
    "plain text": (b"", b"HTTP/1.1 200 OK\r\n\r\n" * 5),
    "plain text in the body": (HEAD, b"HTTP/1.1 200 OK\r\n\r\n" * 5),
}


@pytest.mark.parametrize("name", BREAKS)
async def test_a_connection_that_breaks_after_the_handshake_is_a_passing_failure(
    contexts: dict[str, ssl.SSLContext], score: Ask, trusting: HttpOptions, name: str
) -> None:
    encrypted, raw = BREAKS[name]

    def answer(connection: socket.socket) -> None:
        with socket.socket(fileno=os.dup(connection.fileno())) as below:
            with contexts["good"].wrap_socket(connection, server_side=True) as secured:
                secured.recv(65536)
                secured.sendall(encrypted)
            below.sendall(raw)
            _read_all(below)

    with peer(answer) as url:
        found = await score(url, options=replace(trusting, retry=RewardRetry(attempts=1)))
    code = "http_503" if "error" in name else "tls.broken"
    assert {(result.code, result.is_transient) for result in found} == {(code, True)}
    assert code != "tls.broken" or "the TLS connection broke" in found[0].message


OPEN = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n"
ENDINGS = {
    "a number that may go on": (OPEN + b" 0.1", "contract.unframed"),
    "an object that does go on": (OPEN + b'{"reward": 0.125', "contract.json"),
    "an object": (OPEN + b'{"reward": 0.125}', None),
    "a number of known length": (
        OPEN.replace(b"\n\r", b"\ncontent-length: 5\r\n\r") + b"0.125",
        None,
    ),
}


@pytest.mark.parametrize("name", ENDINGS)
async def test_what_may_be_cut_off_at_the_end_of_a_connection_is_no_reward(
    contexts: dict[str, ssl.SSLContext], score: Ask, trusting: HttpOptions, name: str
) -> None:
    """TLS ends here without its closing message, as if the connection had been cut."""
    sent, code = ENDINGS[name]

    def answer(connection: socket.socket) -> None:
        with socket.socket(fileno=os.dup(connection.fileno())) as below:
            secured = contexts["good"].wrap_socket(connection, server_side=True)
            secured.recv(65536)
            secured.sendall(sent)
            below.shutdown(socket.SHUT_WR)
            _read_all(below)
            os.close(secured.detach())

    pointer = "/reward" if b"{" in sent else ""
    plain = PlainProtocol("x", pointer)
    options = replace(trusting, retry=RewardRetry(attempts=1), protocol=plain)
    with peer(answer) as url:
        (found,) = await score(url, 1, options=options)
    assert found == Scored(0.125) if code is None else found.code == code


WEAK_GROUP = """\
-----BEGIN DH PARAMETERS-----
MIGHAoGBAP//////////yQ/aoiFowjTExmKLgNwc0SkCTgiKZ8x0Agu+pjsTmyJR
Sgh5jjQE3e+VGbPNOkMbMCsKbfJfFDdP4TVtbVHCReSFtXZiXn7G9ExC6aY37WsL
/1y29Aa37e44a/taiZ+lrp8kEXxLH+ZJKGZR7OZTgf//////////AgEC
-----END DH PARAMETERS-----
"""
"""The 1024-bit group of RFC 2409, with which an OpenSSL of today exchanges no keys."""


async def test_a_weak_key_exchange_is_named_and_permanent(
    authority: trustme.CA, score: Ask, trusting: HttpOptions, tmp_path: Path
) -> None:
    (tmp_path / "dh.pem").write_text(WEAK_GROUP)
    weak = context_of(authority.issue_cert("127.0.0.1", key_type=trustme.KeyType.RSA))
    weak.set_ciphers("DHE-RSA-AES256-GCM-SHA384:@SECLEVEL=0")
    weak.maximum_version = ssl.TLSVersion.TLSv1_2
    weak.load_dh_params(tmp_path / "dh.pem")

    def shake(connection: socket.socket) -> None:
        with contextlib.suppress(ssl.SSLError):
            weak.wrap_socket(connection, server_side=True)

    with (
        peer(shake) as url,
        pytest.raises(RewardMisconfiguredError, match="dh key too small") as caught,
    ):
        await score(url, options=trusting)
    assert caught.value.error_code == "tls.weak"


NO_TLS_SAID = {
    *("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "PACKET_LENGTH_TOO_LONG"),
    *("UNEXPECTED_EOF_WHILE_READING", "WRONG_SSL_VERSION", "BAD_RECORD_TYPE", "UNEXPECTED_RECORD"),
    *("HTTPS_PROXY_REQUEST", "RECORD_TOO_SMALL", "ENCRYPTED_LENGTH_TOO_LONG"),
}


def test_of_all_reasons_of_openssl_only_those_of_a_server_without_tls_blame_its_absence() -> None:
    blamed = set()
    for name in _ssl.err_names_to_codes:
        below = ssl.SSLError(1, name)
        below.reason = name
        error = httpcore2.ConnectError(name)
        error.__cause__ = below
        failure = failure_of(error)
        if "without TLS" in failure.reason:
            blamed.add(name)
        elif failure.code not in {"tls.alert", "tls.version", "tls.client_certificate"}:
            assert name.replace("_", " ").lower() in failure.reason
        assert failure.code in ADVICE
        assert not name.endswith("KEY_TOO_SMALL") or failure.code == "tls.weak"
    assert blamed == NO_TLS_SAID


@pytest.mark.parametrize(
    ("number", "alert", "hint"),
    [
        (40, "handshake failure", "client certificate"),
        (42, "bad certificate", "client certificate"),
        (49, "access denied", "client certificate"),
        (80, "internal error", ""),
        (112, "unrecognized name", "other host names"),
    ],
)
async def test_a_refused_handshake_is_quoted(
    score: Ask, trusting: HttpOptions, number: int, alert: str, hint: str
) -> None:
    def refuse(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"\x15\x03\x03\x00\x02\x02" + bytes([number]))
        _read_all(connection)

    with peer(refuse) as url:
        found = await score(url, options=replace(trusting, retry=RewardRetry(attempts=1)))
    assert {(result.code, result.is_transient) for result in found} == {("tls.alert", True)}
    assert f"alert {alert!r}" in found[0].message
    assert hint in found[0].message
    assert "without TLS" not in found[0].message


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
            _read_all(connection)


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
