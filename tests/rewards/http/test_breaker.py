"""The circuit breaker and the retry budget, on a clock of the test's own."""

import asyncio

import pytest

from dar.errors import RewardMisconfiguredError
from dar.rewards.http.breaker import BreakerOptions, Call, CircuitBreaker
from dar.rewards.http.retry import RetryBudget, RetryBudgetOptions


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def states() -> list[str]:
    return []


@pytest.fixture
def breaker(clock: Clock, states: list[str]) -> CircuitBreaker:
    return CircuitBreaker(BreakerOptions(), lambda state, _reason: states.append(state), clock)


def entered(breaker: CircuitBreaker) -> Call:
    call = breaker.enter()
    assert call is not None
    return call


def opened(breaker: CircuitBreaker) -> None:
    for _ in range(10):
        breaker.done(entered(breaker), "failed", "http_500")


def test_it_opens_at_half_of_at_least_ten(breaker: CircuitBreaker, states: list[str]) -> None:
    for _ in range(9):
        breaker.done(entered(breaker), "failed")
    assert breaker.state == "closed"
    breaker.done(entered(breaker), "failed")
    assert breaker.state == "open"
    assert breaker.enter() is None
    assert states == ["open"]


def test_less_than_half_does_not_open_it(breaker: CircuitBreaker) -> None:
    for _ in range(100):
        breaker.done(entered(breaker), "ok")
        breaker.done(entered(breaker), "ok")
        breaker.done(entered(breaker), "failed")
    assert breaker.state == "closed"


def test_old_failures_are_forgotten(breaker: CircuitBreaker, clock: Clock) -> None:
    for _ in range(9):
        breaker.done(entered(breaker), "failed")
    clock.now += 61
    breaker.done(entered(breaker), "failed")
    assert breaker.state == "closed"


def test_what_says_nothing_about_the_service_does_not_count(breaker: CircuitBreaker) -> None:
    for _ in range(50):
        breaker.done(entered(breaker), "neutral")
    assert breaker.state == "closed"
    opened(breaker)
    assert breaker.state == "open"


def test_one_probe_of_twenty_gets_through(
    breaker: CircuitBreaker, clock: Clock, states: list[str]
) -> None:
    opened(breaker)
    clock.now += 4.9
    assert breaker.enter() is None
    clock.now += 0.2
    calls = [breaker.enter() for _ in range(20)]
    assert [call is not None for call in calls] == [True] + [False] * 19
    probe = calls[0]
    assert probe is not None
    assert probe.is_probe
    breaker.done(probe, "ok")
    assert states == ["open", "half_open", "closed"]
    assert all(breaker.enter() is not None for _ in range(20))


def test_pauses_double_up_to_the_longest_and_start_anew(
    breaker: CircuitBreaker, clock: Clock
) -> None:
    opened(breaker)
    for seconds in (5, 10, 20, 40, 80, 120, 120):
        clock.now += seconds - 0.1
        assert breaker.enter() is None
        clock.now += 0.2
        breaker.done(entered(breaker), "failed")
    clock.now += 121
    breaker.done(entered(breaker), "ok")
    opened(breaker)
    clock.now += 5.1
    assert entered(breaker).is_probe


def test_a_cancelled_probe_leaves_its_place_to_the_next(
    breaker: CircuitBreaker, clock: Clock
) -> None:
    opened(breaker)
    clock.now += 5.1
    breaker.done(entered(breaker), "neutral")
    assert breaker.state == "half_open"
    assert entered(breaker).is_probe


def test_what_was_under_way_when_it_opened_no_longer_counts(
    breaker: CircuitBreaker, clock: Clock
) -> None:
    late = [entered(breaker) for _ in range(3)]
    opened(breaker)
    breaker.done(late[0], "ok")
    assert breaker.state == "open"
    clock.now += 5.1
    probe = entered(breaker)
    breaker.done(late[1], "failed")
    assert breaker.enter() is None
    breaker.done(probe, "ok")
    breaker.done(late[2], "failed")
    assert breaker.state == "closed"


def test_a_refusal_is_kept_until_a_probe_is_answered(
    breaker: CircuitBreaker, clock: Clock, states: list[str]
) -> None:
    error = RewardMisconfiguredError("no", code="http_401")
    for _ in range(50):
        breaker.trip(error)
    assert states == ["misconfigured"]
    assert breaker.refusal is error
    clock.now += 5.1
    probe = entered(breaker)
    assert breaker.refusal is error
    breaker.done(probe, "ok")
    assert breaker.refusal is None


async def test_waiting_ends_with_the_pause_or_with_a_change(states: list[str]) -> None:
    options = BreakerOptions(open_seconds=0.05)
    breaker = CircuitBreaker(options, lambda state, _: states.append(state))
    opened(breaker)
    async with asyncio.timeout(10):
        await breaker.changed(100)
    probe = entered(breaker)
    waiting = asyncio.create_task(breaker.changed(100))
    await asyncio.sleep(0)
    breaker.done(probe, "ok")
    async with asyncio.timeout(10):
        await waiting


def test_a_budget_delays_what_is_beyond_it(clock: Clock) -> None:
    budget = RetryBudget(RetryBudgetOptions(minimum=2), clock)
    assert [budget.reserve() for _ in range(5)] == [0, 0, 60, 60, 120]
    clock.now += 30
    assert budget.reserve() == 90


def test_a_budget_grows_with_first_attempts(clock: Clock) -> None:
    budget = RetryBudget(RetryBudgetOptions(), clock)
    for _ in range(100):
        budget.first_attempt()
    assert [budget.reserve() for _ in range(21)] == [0] * 20 + [60]
    budget.give_back()
    clock.now += 61
    assert budget.reserve() == 0
