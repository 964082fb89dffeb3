"""Which failures are tried again, how often, and after how long."""

import socket
from typing import Any

import httpcore2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dar.protocol.reward_spec import RewardRetry
from dar.rewards.http.responses import failure_of
from dar.rewards.http.retry import (
    RETRIES,
    AttemptFailedError,
    FailureKind,
    RetrySchedule,
    parse_retry_after,
)


def waits(kind: FailureKind, *, deadline: float = 100.0, **options: Any) -> list[float]:
    """All waits of a request that always fails in the same way."""
    reported: list[float] = []
    schedule = RetrySchedule(
        RewardRetry(**options), deadline, lambda _error, _attempt, wait: reported.append(wait)
    )
    found = []
    while (wait := schedule.wait_after(AttemptFailedError(kind, "c", "r"))) is not None:
        found.append(wait)
    assert reported == found
    assert schedule.attempt == len(found) + 2
    return found


@pytest.mark.parametrize(
    ("kind", "retries"),
    [
        ("transient", 5),
        ("contract", 1),
        ("name", 2),
        ("refused", 0),
        ("too_large", 0),
        ("permanent", 0),
    ],
)
def test_each_kind_of_failure_has_its_number_of_retries(kind: FailureKind, retries: int) -> None:
    assert kind in RETRIES
    assert len(waits(kind, attempts=6)) == retries
    assert waits(kind, attempts=1) == []


def test_waits_grow_with_full_jitter_up_to_the_cap() -> None:
    found = [waits("transient", attempts=6, base=0.5, cap=3.0) for _ in range(200)]
    longest = [max(column) for column in zip(*found, strict=True)]
    for wait, bound in zip(longest, [1.0, 2.0, 3.0, 3.0, 3.0], strict=True):
        assert 0.8 * bound < wait <= bound
    assert min(wait for column in found for wait in column) < 0.1


def test_no_wait_reaches_beyond_the_deadline() -> None:
    assert waits("transient", attempts=20, base=60, cap=600, deadline=1e-9) == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2", 2.0),
        ("0", 0.0),
        ("-1", None),
        ("nan", None),
        ("inf", None),
        ("soon", None),
        ("", None),
        (None, None),
        ("Sun, 06 Nov 1994 08:49:37 GMT", None),
        ("Sun, 99 Nov 1994 08:49:37 GMT", None),
        ("Fri, 31 Dec 99999999999999999999 23:59:59 GMT", None),
        ("Fri, 31 Dec 2094 23:59:59 +999999999999999", None),
        ("1_0", None),
        ("\u0663", None),
        ("1e400", None),
    ],
)
def test_retry_after_is_a_number_of_seconds_or_nothing(
    text: str | None, seconds: float | None
) -> None:
    assert parse_retry_after(text) == seconds


@given(
    st.one_of(
        st.text(), st.from_regex(r"[A-Z][a-z]{2}, \d+ [A-Z][a-z]{2} \d+ \d+:\d+:\d+ [-+A-Z0-9]+")
    )
)
def test_whatever_is_asked_for_is_a_wait_or_nothing(text: str) -> None:
    wait = parse_retry_after(text)
    assert wait is None or 0 <= wait < float("inf")


def test_retry_after_may_be_a_date() -> None:
    found = parse_retry_after("Sun, 06 Nov 2094 08:49:37 GMT")
    assert found is not None
    assert found > 1e9


@pytest.mark.parametrize(
    ("number", "kind"), [(socket.EAI_NONAME, "name"), (socket.EAI_AGAIN, "transient")]
)
def test_a_name_that_does_not_exist_is_told_from_a_resolver_that_is_down(
    number: int, kind: str
) -> None:
    error = httpcore2.ConnectError("failed")
    error.__cause__ = ExceptionGroup("all attempts", [socket.gaierror(number, "no")])
    failure = failure_of(error)
    assert (failure.kind, failure.code) == (kind, "dns")
