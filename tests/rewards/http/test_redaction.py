"""What is a secret is shown nowhere, whatever a service makes of it.

Everything else stays readable.
"""

import json

import pytest

from dar.rewards.http.redaction import REDACTED, Redactor


@pytest.mark.parametrize(
    "text",
    [
        "authorization: Bearer s3cr3t/t0ken+value",
        "it was s3cr3t/t0ken",
        "s3cr3t%2Ft0ken%2Bvalue",
        '{"auth":"s3cr3t\\/t0ken+value"}',
        "czNjcjN0L3Qwa2VuK3ZhbHVl",
        "signed with MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw!",
        "whsec_somebodyelses1234567",
        "authorization: bearer of-somebody-else",
        "rwt_0123456789abcdef0123456789",
    ],
)
def test_secrets_are_found_in_every_disguise(text: str, secret: str) -> None:
    redact = Redactor([secret], ["Bearer s3cr3t/t0ken+value"])
    shown = redact(text)
    assert "[redacted]" in shown
    for part in ("s3cr3t", "t0ken", "czNjcjN0", "MfKQ9r8G", "somebody", "0123456789ab"):
        assert part not in shown


def test_other_texts_stay_as_they_are(secret: str) -> None:
    redact = Redactor([secret], ["abc"], "/score?q")
    assert redact("abc: the quick whsec of a bearer") == "abc: the quick whsec of a bearer"


def test_a_json_value_loses_secrets_in_names_and_texts_at_any_depth() -> None:
    key = 'a "quoted" key'
    redact = Redactor(headers=[key], url="https://judge.example/score?key=9f8e7d6c5b4a")
    sent = [json.dumps({"x-key": key}), {"at 9f8e7d6c5b4a": key}]
    said = {"sent": sent, "latency": 1.5, "ok": True, "none": None}
    shown = redact.in_json(said)
    assert "quoted" not in str(shown)
    assert shown["sent"][1] == {f"at {REDACTED}": REDACTED}
    assert (shown["latency"], shown["ok"], shown["none"]) == (1.5, True, None)
