"""Small runs of the chaos suite: what it promises at full size must hold at any size."""

import pytest

from chaos.buckets import OUTAGES, Outage, unusable_bucket
from chaos.freezes import freeze_at_random
from chaos.instants import strike_instants
from chaos.kills import kill_at_random
from chaos.outages import empty_broker
from chaos.scoreboard import Result
from chaos.stack import Dialect
from chaos.submissions import submit_under_kills

SLOW = pytest.mark.slow  # whole installations are killed and started again
pytestmark = [SLOW, pytest.mark.timeout(300)]
DIALECTS = ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)]


def assert_holds(result: Result) -> None:
    assert result.holds, (result.figures, result.problems)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("has_keys", [True, False])
def test_killed_services_lose_and_double_no_submission(dialect: Dialect, *, has_keys: bool) -> None:
    replicas = 2 if dialect == "postgresql" and has_keys else 1
    assert_holds(
        submit_under_kills(dialect, has_keys=has_keys, replicas=replicas, submissions=60, kills=2)
    )


@pytest.mark.parametrize("dialect", DIALECTS)
def test_jobs_survive_kills_of_workers_and_trainers(dialect: Dialect) -> None:
    assert_holds(kill_at_random(dialect, most=6, jobs=5))


def test_jobs_survive_kills_with_their_files_in_a_bucket() -> None:
    assert_holds(kill_at_random("sqlite", most=6, jobs=5, has_bucket=True))


@pytest.mark.parametrize("what", OUTAGES)
def test_a_bucket_that_is_unusable_stops_no_training_and_loses_nothing(what: Outage) -> None:
    assert_holds(unusable_bucket(what))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_jobs_survive_kills_at_every_marked_instant(dialect: Dialect) -> None:
    assert_holds(strike_instants(dialect, strikes=1, has_bucket=dialect == "sqlite"))


def test_a_frozen_worker_is_turned_away_when_it_wakes() -> None:
    assert_holds(freeze_at_random("sqlite", is_fenced=True, most=3, jobs=4))


def test_without_the_fence_the_auditor_finds_something() -> None:
    assert_holds(freeze_at_random("sqlite", is_fenced=False, most=4, jobs=4))


def test_a_broker_that_comes_back_empty_delays_nothing() -> None:
    assert_holds(empty_broker(jobs=6))
