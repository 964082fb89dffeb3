"""When a job will end, from its first step on."""

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import update

from fakes.live_service import Lease, Live
from service.store.tables import JobRow


def step(number: int, at: float, seconds: float) -> dict[str, Any]:
    values = {"dar/loss": 0.5, "time/step_seconds": seconds}
    return {"type": "metrics", "step": number, "at": at, "values": values}


def left(live: Live, job_id: str) -> float | None:
    """Seconds until the job's estimated finish."""
    finish = live.job(job_id)["estimated_finish"]
    return None if finish is None else finish - datetime.now(UTC).timestamp()


def test_the_first_estimate_counts_steps_and_not_the_loading_of_the_model(live: Live) -> None:
    job_id, lease = live.running()
    with live.runtime.database.write() as transaction:
        # As of a job whose model has been loading for an hour.
        hour_ago = transaction.now - timedelta(hours=1)
        transaction.execute(update(JobRow).values(started_at=hour_ago))
    assert left(live, job_id) is None
    lease.say(step(1, 1.7e9, 100.0))
    first = left(live, job_id)
    assert first is not None
    assert 290 < first <= 301  # three steps are left
    shown = live.job(job_id)
    assert live.job(job_id) == shown  # nothing changes between two steps
    lease.say(step(2, 1.7e9 + 40, 40.0))
    second = left(live, job_id)
    assert second is not None
    assert 70 < second <= 81


def test_a_later_attempt_has_the_pace_of_the_one_before_until_its_first_step(live: Live) -> None:
    job_id, lease = live.running()
    lease.say(step(1, 1.7e9, 9.0), step(2, 1.7e9 + 50, 50.0))
    lease.post("/release", reason="drained")
    assert left(live, job_id) is None  # it does not run
    again = live.claim()
    assert isinstance(again, Lease)
    expected = left(live, job_id)
    assert expected is not None
    assert 190 < expected <= 201  # all four steps: there was no checkpoint
    again.say(step(1, 1.7e9, 20.0))
    faster = left(live, job_id)
    assert faster is not None
    assert 50 < faster <= 61
