"""Rows that are sent again, late, in another order or altered."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fakes.live_service import Live
from fakes.row_audit import audit_rows


def loss(step: int) -> float:
    return 1 / step


def test_rows_count_once_however_often_and_in_which_order_they_come(
    live: Live, error_of: Callable[..., Any]
) -> None:
    job_id, lease = live.running()

    def metric(seq: int, step: int) -> dict[str, Any]:
        values = {"dar/loss": loss(step)}
        return {"type": "metrics", "seq": seq, "at": 1.0, "step": step, "values": values}

    note = {"type": "event", "seq": 3, "at": 1.0, "level": "info", "message": "note", "step": 2}
    rows = [metric(1, 1), metric(2, 2), note, metric(4, 3), metric(5, 4)]

    def send(*sent: dict[str, Any]) -> Any:
        return lease.post("/batch", rows=list(sent))

    assert error_of(send(*rows[3:]))["code"] == "seq_gap"
    with ThreadPoolExecutor(4) as pool:  # retries that overtake each other
        answers = list(pool.map(lambda _: send(*rows[:3]), range(4)))
    assert {answer.json()["acked_seq"] for answer in answers} == {3}
    for start, end, acked in ((0, 2, 3), (1, 4, 4), (3, 4, 4), (0, 4, 4)):
        assert send(*rows[start:end]).json() == {"acked_seq": acked}
    altered = rows[1] | {"values": {"dar/loss": 9.0}}
    for sent in ([altered], [altered, *rows[2:]]):
        answer = send(*sent)
        assert (answer.status_code, error_of(answer)["code"]) == (409, "integrity")
    last = send(rows[4]).json()
    assert last == {"acked_seq": 5}
    assert audit_rows(live.runtime.database, job_id, "dar/loss", loss) == []
    events = live.job(job_id, "/events", order="asc", limit=100)["data"]
    assert [event["message"] for event in events].count("note") == 1
    assert [event["data"]["step"] for event in events if event["type"] == "metrics"] == [1, 2, 3, 4]
    assert [event["data"]["kind"] for event in events if event["level"] == "error"] == [
        "integrity",
        "integrity",
    ]
