"""Which checkpoints a job keeps, and which is its result."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from dar.client import Client
from fakes.live_service import Live
from service.store import checkpoints


def metrics(step: int, **values: float | None) -> dict[str, Any]:
    return {"type": "metrics", "step": step, "values": {f"dar/{k}": v for k, v in values.items()}}


def evaluated(step: int, reward: float) -> dict[str, Any]:
    return {"type": "metrics", "step": step, "values": {"eval_dar/rewards_mean": reward}}


def run(live: Live, rewards: Mapping[int, float], **values: Any) -> tuple[str, dict[int, str]]:
    """A job of four steps with checkpoints of steps 1, 3 and 4; returns it and their ids."""
    job_id, lease = live.running(**values)
    made = {}
    for step in range(1, 5):
        lease.say(metrics(step, rewards_mean=rewards[step]))
        if values.get("validation_file") and step in {1, 3}:
            lease.say(evaluated(step, 1 / step))
        if step != 2:
            files = {"model.safetensors": b"weights-%d" % step, "resume/state.json": b"{}"}
            made[step] = lease.checkpoint(step, files)
    ended = lease.post("/complete", last_seq=lease.seq, checkpoint_id=made[4])
    assert ended.json()["status"] == "succeeded"
    return job_id, made


def weights_of(live: Live, model: str) -> bytes:
    """Weights that a job on ``model`` starts from."""
    _, later = live.running(model=model)
    content = later.http.get("/inputs/model/model.safetensors").content
    later.post("/fail", kind="user", code="over", message="over")
    return content


REWARDS = {1: 0.2, 2: 0.9, 3: 0.5, 4: 0.6}
"""Since the checkpoint before: 0.2, 0.7 and 0.6."""


@pytest.mark.parametrize("keeps_best", [False, True])
def test_the_result_is_the_last_step_or_with_keep_best_the_best(
    live: Live, keeps_best: bool
) -> None:
    job_id, made = run(live, REWARDS, dar={"checkpointing": {"keep_best": keeps_best}})
    job = live.job(job_id)
    assert job["best_checkpoint"] == made[3]
    shown = {item["step_number"]: item for item in live.job(job_id, "/checkpoints")["data"]}
    assert [shown[step]["reward"] for step in (1, 3, 4)] == pytest.approx([0.2, 0.7, 0.6])
    assert [step for step, item in shown.items() if item["is_best"]] == [3]
    assert weights_of(live, job["fine_tuned_model"]) == b"weights-%d" % (3 if keeps_best else 4)
    assert ("of step 3, the best checkpoint" in job["status_message"]) is keeps_best


def test_with_evaluation_only_its_reward_counts(live: Live) -> None:
    file_id = live.upload().json()["id"]
    dar = {"evaluation": {"every_steps": 1}}
    job_id, made = run(live, REWARDS, dar=dar, validation_file=file_id)
    assert live.job(job_id)["best_checkpoint"] == made[1]
    rewards = [item["reward"] for item in live.job(job_id, "/checkpoints")["data"]]
    assert rewards == [None, pytest.approx(1 / 3), 1.0]


def test_a_best_checkpoint_and_a_result_survive_however_many_follow(live: Live) -> None:
    dar = {"checkpointing": {"keep_last": 1, "keep_best": True}}
    job_id, _ = run(live, REWARDS, dar=dar)
    with live.runtime.database.write() as transaction:
        checkpoints.mark_superseded(transaction)
    assert [item["step_number"] for item in live.job(job_id, "/checkpoints")["data"]] == [4, 3]


def test_a_pin_keeps_a_checkpoint_and_a_stranger_has_none(
    live: Live, error_of: Callable[..., Any]
) -> None:
    job_id, lease = live.running()
    checkpoint = lease.checkpoint(1)
    with Client(live.key("api_key"), live.url) as client:
        assert client.checkpoints.pin(job_id, checkpoint).is_pinned
        assert client.checkpoints.retrieve(job_id, checkpoint).is_pinned
        assert not client.checkpoints.unpin(job_id, checkpoint).is_pinned
    answer = live.http.post(f"/v1/fine_tuning/jobs/{job_id}/checkpoints/ckpt-x/pin")
    assert (answer.status_code, error_of(answer)["code"]) == (404, "not_found")


def test_a_spec_says_how_many_of_the_history_are_kept(live: Live) -> None:
    job_id, lease = live.running(dar={"checkpointing": {"keep_every": 2}})
    assert live.job(job_id)["method"]["dar"]["checkpointing"]["keep_every"] == 2
    assert lease.body["spec"]["method"]["dar"]["checkpointing"]["keep_every"] == 2
    live.submit()
    plain = live.claim(slot="1")
    assert plain is not None
    # Workers of the version before know no such field.
    assert "keep_every" not in plain.body["spec"]["method"]["dar"]["checkpointing"]
