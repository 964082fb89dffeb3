"""Progress of a job: steps that are done, and the tokens of these steps."""

from typing import Any

from dar.protocol.jobs import Job
from fakes.live_service import Lease, Live


def done(live: Live, job_id: str) -> tuple[int, float, int, int | None]:
    job = live.job(job_id)
    progress = job["progress"]
    return progress["step"], progress["percent"], progress["tokens"], job["trained_tokens"]


def beat(lease: Lease, step: int, **values: Any) -> None:
    progress = {"phase": "training", "step": step, **values}
    assert lease.post("/heartbeat", progress=progress).status_code == 200


def end_step(lease: Lease, step: int, tokens: int) -> None:
    values = {"dar/loss": 1.0, "train/tokens": float(tokens)}
    assert lease.say({"type": "metrics", "step": step, "values": values}).status_code == 200


def test_tokens_follow_the_steps_and_are_shown_while_the_job_runs(live: Live) -> None:
    assert done(live, live.submit()["id"]) == (0, 0.0, 0, None)
    lease = live.claim()
    assert lease is not None
    job_id = lease.body["job_id"]
    assert done(live, job_id) == (0, 0.0, 0, 0)
    beat(lease, 1, tokens=30)
    assert done(live, job_id) == (1, 25.0, 30, 30)
    end_step(lease, 1, 30)
    end_step(lease, 2, 70)
    beat(lease, 1, tokens=30)  # was on its way while the rows arrived
    assert done(live, job_id) == (2, 50.0, 70, 70)


def test_a_resumed_job_shows_the_progress_of_its_checkpoint_at_once(live: Live) -> None:
    job_id, lease = live.running()
    end_step(lease, 1, 30)
    end_step(lease, 2, 70)
    lease.metrics = {"train/tokens": 70.0}
    lease.checkpoint(2)
    end_step(lease, 3, 90)
    assert lease.post("/release", reason="drained").status_code == 200
    again = live.claim()
    assert again is not None
    assert done(live, job_id) == (2, 50.0, 70, 70)
    beat(again, 0, phase="starting")
    assert done(live, job_id) == (2, 50.0, 70, 70)


def test_a_job_that_never_got_a_checkpoint_begins_again_at_0(live: Live) -> None:
    job_id, lease = live.running()
    end_step(lease, 3, 90)
    assert lease.post("/release", reason="drained").status_code == 200
    assert live.claim() is not None
    assert done(live, job_id) == (0, 0.0, 0, 0)


def test_a_cancelled_job_has_no_error_and_a_message_that_is_true(live: Live) -> None:
    job_id = live.submit()["id"]
    cancel = f"/v1/fine_tuning/jobs/{job_id}/cancel"
    lease = live.claim()
    assert lease is not None
    asks = {"reason": "paused_reward", "message": "HTTP 503", "code": "http_503"}
    assert lease.post("/release", is_outage=True, **asks).status_code == 200
    assert live.job(job_id)["error"]["code"] == "http_503"
    job = live.http.post(cancel).json()
    assert (job["status"], job["error"]) == ("cancelled", None)
    assert job["status_message"] == "cancelled while it was paused"
    assert live.http.post(cancel.replace("cancel", "resume")).status_code == 200
    assert live.http.post(cancel).json()["status_message"] == "cancelled while it was queued"


def test_a_job_that_never_ran_is_cancelled_before_it_ran(live: Live) -> None:
    job_id = live.submit()["id"]
    job = live.http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel").json()
    assert job["status_message"] == "cancelled before it ran"


def test_a_job_with_a_kl_budget_shows_alpha_and_the_forecast_once_it_has_calibrated(
    live: Live,
) -> None:
    live.submit(dar={"hyperparameters": {"max_steps": 4, "kl_budget": 1.0}})
    lease = live.claim()
    assert lease is not None
    job_id = lease.body["job_id"]
    doing = {"phase": "calibrating", "step": 0}
    assert lease.post("/heartbeat", progress=doing).status_code == 200
    job = live.job(job_id)
    assert job["forecast"] is None
    assert job["status_detail"] == "calibrating"
    assert job["progress"]["calibration_completions"] == 0
    forecast = {
        "step": 0, "phase": "base", "method": "frontier", "ending": "reached", "kl_budget": 1.0, "alpha": 0.2,
        "beta": 0.6, "reward_std": 0.3, "prompts": 16, "completions": 256, "tokens": 5000,
        "spent_completions": 300, "spent_tokens": 6000, "samples_per_prompt": 16,
        "start_reward": 0.1, "reward": 0.6, "kl": 1.0, "frontier": [{"alpha": 0.4, "reward": 0.4, "kl": 0.5}],
    }  # fmt: skip
    data = {"kind": "calibration", **forecast}
    row = {"type": "event", "level": "info", "message": "alpha is 0.2", "data": data}
    assert lease.say(row).status_code == 200
    job = live.job(job_id)
    assert job["forecast"] == forecast
    spent = {"calibration_completions": 300, "calibration_tokens": 6000}
    assert job["progress"].items() >= {"tokens": 0, **spent}.items()
    assert Job.model_validate(live.job(job_id)).forecast is not None
