"""What a worker may send and ask for, at the edges: models, room, repeated cancellations, values
that cannot be kept, rows of attempts that have lost their job.
"""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from dar.settings import Settings
from fakes.live_service import Live

WEIGHTS = b"weights" * 1000


def test_a_base_model_is_served_as_it_is_now_without_what_is_hidden(live: Live) -> None:
    folder = live.settings.models_path / "base"
    (folder / ".cache").mkdir()
    (folder / ".cache" / "blob").write_bytes(b"weights")
    (folder / "model.safetensors").symlink_to(folder / ".cache" / "blob")
    _, lease = live.running()

    def digests() -> dict[str, str]:
        files = lease.http.get("/inputs").json()["files"]
        return {file["name"]: file["sha256"] for file in files if file["name"] != "training_file"}

    first = digests()
    assert set(first) == {"model/config.json", "model/model.safetensors"}
    assert lease.http.get("/inputs/model/model.safetensors").content == b"weights"
    (folder / "config.json").write_text('{"a": 1}')
    second = digests()
    assert second["model/config.json"] != first["model/config.json"]
    assert second["model/model.safetensors"] == first["model/model.safetensors"]


def test_only_bytes_that_are_still_to_come_need_room(
    live: Live, error_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, lease = live.running()
    files = {"model.safetensors": WEIGHTS}
    checkpoint_id = lease.announce(2, files).json()["checkpoint_id"]
    lease.put(checkpoint_id, "model.safetensors", WEIGHTS[:6000])
    needed = 1000 + Settings().min_free_bytes
    room = [needed]
    usage = SimpleNamespace
    monkeypatch.setattr(
        "service.storage.folder.shutil.disk_usage", lambda _: usage(free=room[0], total=2 * needed)
    )
    again = lease.announce(2, files)
    assert again.json()["received"]["model.safetensors"] == 6000
    room[0] = needed - 1
    full = lease.announce(2, files)
    assert (full.status_code, error_of(full)["code"]) == (503, "storage_full")
    said = error_of(full)["message"]
    assert f"1,000 more bytes, for which {needed:,} must be free" in said


def test_a_worker_that_was_told_of_a_cancellation_is_not_told_every_second(live: Live) -> None:
    job_id, lease = live.running()
    live.http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
    told = lease.http.get("/directives", params={"wait": 5}).json()
    started = time.monotonic()
    after = {"after": told["cursor"], "wait": 2.5}
    assert lease.http.get("/directives", params=after).json()["directives"] == []
    assert time.monotonic() - started > 2.4


@pytest.mark.parametrize(
    ("row", "param"),
    [
        ({"type": "event", "level": "info", "message": "a\0b"}, "rows[0].message"),
        (
            {"type": "event", "level": "info", "message": "a", "data": {"n": 10**19}},
            "rows[0].data.n",
        ),
        (
            {"type": "event", "level": "info", "message": "a", "data": {"n": ["\0"]}},
            "rows[0].data.n[0]",
        ),
        ({"type": "metrics", "step": 1, "values": {"train/tokens": 1e300}}, "rows[0].values"),
        ({"type": "event", "level": "info", "message": "a", "at": 1e20}, "rows[0].event.at"),
        ({"type": "event", "level": "info", "message": "a", "at": -5}, "rows[0].event.at"),
    ],
)
def test_what_no_database_can_store_is_a_400(
    live: Live, error_of: Callable[..., Any], row: dict[str, Any], param: str
) -> None:
    _, lease = live.running()
    refused = lease.say(row)
    assert (refused.status_code, error_of(refused)["param"]) == (400, param)


def test_a_text_that_only_looks_like_nul_is_stored(live: Live) -> None:
    _, lease = live.running()
    data = {"digits": "1234567890123456789", "float": 0.1234567890123456789}
    row = {"type": "event", "level": "info", "message": r"\u0000", "data": data}
    assert lease.say(row).json() == {"acked_seq": 1}


def metric_row(step: int, loss: float) -> dict[str, Any]:
    return {"type": "metrics", "step": step, "values": {"dar/loss": loss}}


def event_row(step: int, message: str) -> dict[str, Any]:
    return {"type": "event", "level": "info", "message": message, "step": step}


def test_a_zombie_is_told_to_stop_and_its_rows_are_kept_apart(
    live: Live, error_of: Callable[..., Any]
) -> None:
    job_id, zombie = live.running()
    sent = zombie.say(
        metric_row(1, 1.0), metric_row(2, 2.0), metric_row(3, 3.0), event_row(3, "undone")
    )
    assert sent.json() == {"acked_seq": 4}
    zombie.checkpoint(2)
    cursor = live.job(job_id, "/metrics")["cursor"]
    seen = live.job(job_id, "/events")
    rewound = next(one for one in seen["data"] if one["message"] == "undone")
    tag = live.http.get(f"/v1/fine_tuning/jobs/{job_id}/metrics").headers["etag"]

    successor = live.claim(incarnation="life-2")
    assert successor is not None
    assert zombie.say(metric_row(4, 4.0)).json() == {"acked_seq": 5, "is_fenced": True}
    answer = live.http.get(
        f"/v1/fine_tuning/jobs/{job_id}/metrics", headers={"if-none-match": tag}
    ).json()
    assert answer["series"]["dar/loss"]["step"] == [1, 2]
    assert not {"rewound", "rewound_to"} & set(answer)
    successor.say(metric_row(3, 30.0), event_row(4, "done"))
    newer = live.job(job_id, "/metrics", after=cursor, rewound=True)
    assert (newer["series"]["dar/loss"]["value"], newer["rewound_to"]) == ([30.0], 2)
    [undone] = newer["rewound"]
    assert (undone["attempt"], undone["series"]["dar/loss"]["step"]) == (1, [3, 4])
    assert "rewound_to" not in live.job(job_id, "/metrics", after=newer["cursor"])
    late = zombie.say(metric_row(4, 5.0)).json()
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
        metric_row(4000, 1.0),
        event_row(5, "ahead"),
        {"type": "rewards", "step": 5, "requests": [], "failures": []},
    ],
)
def test_a_row_of_a_step_that_the_job_does_not_have_is_refused(
    live: Live, error_of: Callable[..., Any], row: dict[str, Any]
) -> None:
    job_id, lease = live.running()
    answer = lease.say(metric_row(1, 1.0), row)
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
