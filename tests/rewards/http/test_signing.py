"""Standard Webhooks: the reference package and OpenAI's client accept ours, and we accept the
package's.
"""

import base64
from datetime import UTC, datetime, timedelta

import pytest
from openai import InvalidWebhookSignatureError, OpenAI
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from dar.errors import AuthenticationError, ConfigurationError
from dar.rewards.http.signing import decode_secret, sign, signed_headers, verify

BODY = '{"text":"grün"}'.encode()
OTHER = "whsec_" + base64.b64encode(b"o" * 32).decode()
Signed = dict[str, str]


@pytest.fixture
def key(secret: str) -> bytes:
    return decode_secret(secret)


@pytest.fixture
def signed(key: bytes) -> Signed:
    return signed_headers([key], "rwq_1", int(datetime.now(UTC).timestamp()), BODY)


def test_the_reference_package_accepts_our_signature(secret: str, signed: Signed) -> None:
    assert Webhook(secret).verify(BODY, signed) == {"text": "grün"}
    with pytest.raises(WebhookVerificationError):
        Webhook(OTHER).verify(BODY, signed)


def test_openais_verifier_accepts_our_signature(secret: str, key: bytes, signed: Signed) -> None:
    with OpenAI(api_key="none", webhook_secret=secret) as client:
        client.webhooks.verify_signature(BODY, signed)
        rotated = signed_headers(
            [decode_secret(OTHER), key], "rwq_1", int(datetime.now(UTC).timestamp()), BODY
        )
        client.webhooks.verify_signature(BODY, rotated)
        for body, secret_of_reader in ((BODY + b" ", secret), (BODY, OTHER)):
            with pytest.raises(InvalidWebhookSignatureError):
                client.webhooks.verify_signature(body, signed, secret=secret_of_reader)


def test_we_accept_the_reference_packages_signature(secret: str, key: bytes) -> None:
    now = datetime.now(UTC)
    headers = {
        "webhook-id": "msg_1",
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": Webhook(secret).sign("msg_1", now, BODY.decode()),
    }
    verify([key], headers, BODY)


def test_an_old_and_a_new_secret_overlap(key: bytes) -> None:
    new = decode_secret(OTHER)
    both = signed_headers([key, new], "rwq_1", int(datetime.now(UTC).timestamp()), BODY)
    for accepted in ([key], [new], [new, key]):
        verify(accepted, both, BODY)
    with pytest.raises(AuthenticationError):
        verify([b"x" * 32], both, BODY)


@pytest.mark.parametrize(
    "junk", ["junk", "v1,", "v1,!!!", "v2,abc", ",", "v1,\xff\xfe", "v1a,c2ln", "v1,c2ln,x"]
)
def test_junk_beside_a_valid_entry_does_no_harm(key: bytes, signed: Signed, junk: str) -> None:
    entry = signed["webhook-signature"]
    verify([key], {**signed, "webhook-signature": f"{junk} {entry}"}, BODY)
    with pytest.raises(AuthenticationError):
        verify([key], {**signed, "webhook-signature": junk}, BODY)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"webhook-id": "rwq_2"}, "invalid_signature"),
        ({"webhook-id": ""}, "missing_signature"),
        ({"webhook-timestamp": ""}, "missing_signature"),
        ({"webhook-timestamp": "soon"}, "stale_signature"),
        ({"webhook-timestamp": "-1"}, "stale_signature"),
        ({"webhook-timestamp": "1" * 4000}, "stale_signature"),
        ({"webhook-timestamp": "²"}, "stale_signature"),
        ({"webhook-signature": ""}, "missing_signature"),
        ({"webhook-signature": " "}, "invalid_signature"),
    ],
)
def test_altered_headers_are_refused(key: bytes, signed: Signed, change: Signed, code: str) -> None:
    with pytest.raises(AuthenticationError) as caught:
        verify([key], {**signed, **change}, BODY)
    assert caught.value.error_code == code


def test_an_altered_body_is_refused(key: bytes, signed: Signed) -> None:
    with pytest.raises(AuthenticationError, match="altered"):
        verify([key], signed, BODY + b" ")


@pytest.mark.parametrize(
    ("seconds", "is_fresh"), [(299, True), (301, False), (-299, True), (-301, False)]
)
def test_a_signature_is_good_for_five_minutes(key: bytes, seconds: int, is_fresh: bool) -> None:
    at = datetime(2026, 11, 22, tzinfo=UTC)
    headers = signed_headers([key], "rwq_1", int(at.timestamp()), BODY)
    now = at + timedelta(seconds=seconds)
    if is_fresh:
        verify([key], headers, BODY, now=now)
    else:
        with pytest.raises(AuthenticationError, match="clock"):
            verify([key], headers, BODY, now=now)


@pytest.mark.parametrize("bad", ["", "abc", "whsec_", "whsec_!!!!", "whsec_c2hvcnQ=", "whsec_ü"])
def test_a_malformed_secret_is_refused_without_showing_it(bad: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        decode_secret(bad)
    assert len(bad) < 7 or bad not in str(caught.value)


def test_a_signature_depends_on_everything_that_is_signed(key: bytes) -> None:
    signatures = {
        sign(key, "a", 1, b"x"),
        sign(key, "b", 1, b"x"),
        sign(key, "a", 2, b"x"),
        sign(key, "a", 1, b"y"),
        sign(b"k" * 32, "a", 1, b"x"),
    }
    assert len(signatures) == 5
