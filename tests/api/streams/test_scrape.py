"""What Prometheus reads of the queue, of leases and of this replica."""

import math
import time
from datetime import timedelta

from sqlalchemy import update

from dar.version import __version__
from fakes.live_service import Live
from service.store.tables import JobRow


def scraped(live: Live) -> dict[str, float]:
    lines = live.http.get("/metrics").text.splitlines()
    pairs = [line.rpartition(" ") for line in lines if line[:1] != "#"]
    return {name: float(value) for name, _, value in pairs}


def test_the_queue_the_leases_and_the_replica_are_in_numbers(live: Live) -> None:
    before = scraped(live)
    assert (before["dar_queue_age_seconds"], before["dar_leases"]) == (0, 0)
    assert math.isnan(before["dar_lease_seconds"])
    assert before[f'dar_build_info{{version="{__version__}"}}'] == 1
    job_id = live.submit()["id"]
    with live.runtime.database.write() as transaction:
        earlier = transaction.now - timedelta(seconds=100)
        values = {"queued_at": earlier, "not_before": earlier}
        transaction.execute(update(JobRow).where(JobRow.id == job_id).values(**values))
    assert 100 <= scraped(live)["dar_queue_age_seconds"] < 200
    assert live.claim() is not None
    assert live.http.get("/v1/fine_tuning/jobs/none").status_code == 404
    path = f"/v1/fine_tuning/jobs/{job_id}/stream"
    with live.http.stream("GET", path) as answer:
        lines = answer.iter_lines()
        assert (next(lines), next(lines)) == (": ping", "id: 1")
        after = scraped(live)
    assert (after["dar_queue_age_seconds"], after["dar_leases"]) == (0, 1)
    assert 0 < after["dar_lease_seconds"] <= live.settings.lease_ttl_seconds
    assert after["dar_stream_readers"] == 1
    deadline = time.monotonic() + 10
    while scraped(live)["dar_stream_readers"]:
        assert time.monotonic() < deadline, "a client that has left is no reader"
        time.sleep(0.02)
    counted = 'dar_http_responses_total{status="4xx"}'
    assert after[counted] == before[counted] + 1
    assert after["dar_http_response_seconds_total"] > before["dar_http_response_seconds_total"]
