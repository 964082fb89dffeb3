"""What an attempt did after the step from which its successor started is shown only on request."""

from collections.abc import Callable
from typing import Any

import pytest

from fakes.live_service import Live


def metric(step: int, loss: float) -> dict[str, Any]:
    return {"type": "metrics", "step": step, "values": {"dar/loss": loss}}


def event(step: int, message: str) -> dict[str, Any]:
    return {"type": "event", "level": "info", "message": message, "step": step}


def test_a_zombie_is_told_to_stop_and_its_rows_are_kept_apart(
    live: Live, error_of: Callable[..., Any]
) -> None:
    job_id, zombie = live.running()
    sent = zombie.say(metric(1, 1.0), metric(2, 2.0), metric(3, 3.0), event(3, "undone"))
    assert sent.json() == {"acked_seq": 4}
    zombie.checkpoint(2)
    cursor = live.job(job_id, "/metrics")["cursor"]
    seen = live.job(job_id, "/events")
    rewound = next(one for one in seen["data"] if one["message"] == "undone")
    tag = live.http.get(f"/v1/fine_tuning/jobs/{job_id}/metrics").headers["etag"]

    successor = live.claim(incarnation="life-2")
    assert successor is not None
    assert zombie.say(metric(4, 4.0)).json() == {"acked_seq": 5, "is_fenced": True}
    answer = live.http.get(
        f"/v1/fine_tuning/jobs/{job_id}/metrics", headers={"if-none-match": tag}
    ).json()
    assert answer["series"]["dar/loss"]["step"] == [1, 2]
    assert not {"rewound", "rewound_to"} & set(answer)
    successor.say(metric(3, 30.0), event(4, "done"))
    newer = live.job(job_id, "/metrics", after=cursor, rewound=True)
    assert (newer["series"]["dar/loss"]["value"], newer["rewound_to"]) == ([30.0], 2)
    [undone] = newer["rewound"]
    assert (undone["attempt"], undone["series"]["dar/loss"]["step"]) == (1, [3, 4])
    assert "rewound_to" not in live.job(job_id, "/metrics", after=newer["cursor"])
    late = zombie.say(metric(4, 5.0)).json()
    assert late["is_fenced"]
    last = live.job(job_id, "/metrics", after=newer["cursor"])
    assert (last["series"], "rewound_to" in last) == ({}, False)
    assert "rewound_to" not in live.job(job_id, "/metrics", after=last["cursor"])

    shown = live.job(job_id, "/events", limit=100)["data"]
    assert not any("rewound" in one for one in shown)
    messages = [one["message"] for one in shown]
    assert "done" in messages
    assert "undone" not in messages
    whole = live.job(job_id, "/events", limit=100, rewound=True)["data"]
    assert [one["data"].get("step") for one in whole if one.get("rewound")] == [None, 3]
    # A client that follows the events may have seen a rewound one last.
    after = live.job(job_id, "/events", order="asc", after=rewound["id"])["data"]
    assert after[-1]["message"] == "done"


@pytest.mark.parametrize(
    "row",
    [
        metric(4000, 1.0),
        event(5, "ahead"),
        {"type": "rewards", "step": 5, "requests": [], "failures": []},
    ],
)
def test_a_row_of_a_step_that_the_job_does_not_have_is_refused(
    live: Live, error_of: Callable[..., Any], row: dict[str, Any]
) -> None:
    job_id, lease = live.running()
    answer = lease.say(metric(1, 1.0), row)
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "rows[1].step"
    assert live.job(job_id, "/metrics")["series"] == {}


def test_a_trainer_cannot_be_ahead_of_its_last_step(
    live: Live, error_of: Callable[..., Any]
) -> None:
    job_id, lease = live.running()
    beat = lease.post("/heartbeat", progress={"phase": "training", "step": 4000})
    assert (beat.status_code, error_of(beat)["param"]) == (400, "progress.step")
    ahead = lease.announce(5, {"model.safetensors": b"x"})
    assert (ahead.status_code, error_of(ahead)["param"]) == (400, "manifest.step")
    assert live.job(job_id)["progress"]["step"] == 0
