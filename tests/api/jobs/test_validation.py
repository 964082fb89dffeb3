"""A dry run says all that a submission would be refused for, and what the job would take."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from dar.client import Client
from dar.errors import InvalidRequestError
from fakes.live_service import Judge, Live

PATH = "/v1/fine_tuning/jobs"
CONFIG = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
PARAMETERS = 1000 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128)


def dar(judge: Judge, columns: list[str] | None = None, **hyper: Any) -> dict[str, Any]:
    component = {"name": "length", "url": judge.url, **({"columns": columns} if columns else {})}
    return {
        "hyperparameters": {"max_steps": 3, "batch_size": 10, "dar_k": 4, **hyper},
        "sampling": {"max_new_tokens": 20},
        "rewards": {"components": [component]},
    }


def test_a_dry_run_shows_what_a_job_would_be_and_stores_nothing(
    live: Live, sdk: Client, judge: Judge
) -> None:
    (live.settings.home / "models" / "base" / "config.json").write_text(json.dumps(CONFIG))
    found = sdk.jobs.validate(live.spec(dar=dar(judge)))
    assert found.allowed_to_proceed, found.problems
    assert [one.code for one in found.warnings] == ["no_worker"]
    assert found.method["dar"]["hyperparameters"]["dar_wclip"] == 20.0
    assert (found.data.num_rows, found.data.columns) == (2, ["prompt"])
    [check] = found.rewards
    assert (check.component, check.status) == ("length", "ok")
    assert check.report is not None
    assert judge.seen
    estimate = found.estimate
    assert estimate is not None
    # A request has at most 16 completions: those of 4 prompts, so a step of 10 prompts has 3.
    assert (estimate.total_steps, estimate.completions, estimate.reward_calls) == (3, 120, 9)
    assert (estimate.most_completion_tokens, estimate.seconds) == (2400, None)
    memory = found.memory
    assert memory.parameters == PARAMETERS
    assert memory.least_bytes == PARAMETERS * 4 * 5  # with gradients, Adam and the reference
    assert memory.peak_bytes is not None
    assert memory.peak_bytes > memory.least_bytes
    assert memory.fits is None
    assert live.http.get(PATH).json()["data"] == []
    assert live.submit(dar=dar(judge))["status"] == "queued"


def test_all_problems_are_said_at_once_each_with_its_place(
    live: Live, judge: Judge, error_of: Callable[..., Any]
) -> None:
    rows = b'{"prompt": "a", "answer": "x"}\n{"prompt": "b"}\n'
    spec = live.spec(
        model="nothing",
        training_file=live.upload(rows).json()["id"],
        dar=dar(judge, ["answer"], warmup_steps=30, max_steps=2),
    )
    answer = live.http.post(f"{PATH}/validate", json=spec)
    found = answer.json()
    assert (answer.status_code, found["allowed_to_proceed"]) == (200, False)
    assert {one["code"]: one["row"] for one in found["problems"]} == {
        "model_not_found": None,
        "missing_column": 2,
    } | {one["code"]: None for one in found["problems"] if one["param"].endswith("warmup_steps")}
    assert error_of(live.http.post(PATH, json=spec))["code"] in {
        one["code"] for one in found["problems"]
    }


def test_every_row_that_lacks_a_value_is_named(live: Live, judge: Judge) -> None:
    rows = [{"prompt": str(n), **({} if n % 3 else {"answer": "x"})} for n in range(90)]
    content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    spec = live.spec(
        training_file=live.upload(content).json()["id"], dar=dar(judge, ["answer", "nothing"])
    )
    found = live.http.post(f"{PATH}/validate", json=spec).json()
    places = [(one["param"].rpartition(".")[2], one["row"]) for one in found["problems"]]
    lacking = [number for number in range(1, 91) if (number - 1) % 3]
    assert places[:2] == [("columns[0]", 2), ("columns[1]", 1)]
    assert places[2:] == [("columns[0]", number) for number in lacking[1:50]]


def test_what_a_submission_refuses_may_not_proceed(serve: Callable[..., Live]) -> None:
    live = serve(hub_models=("Qwen/*",), hub_datasets=("trl-lib/*",))
    file_id = live.upload().json()["id"]
    cases: list[dict[str, Any]] = [
        {"model": "../home"},
        {"model": "other/model"},
        {"training_file": "file-none"},
        {"training_file": "hf://other/data"},
        {"validation_file": "file-none", "dar": {"evaluation": {"every_steps": 2}}},
        {"dar": {"hyperparameters": {"dar_k": 1, "batch_size": 1, "max_steps": 1}}},
        {"dar": {"rewards": {"components": [{"name": "a", "endpoint": "rwe_none"}]}}},
        {"dar": {"rewards": {"components": [{"name": "a", "builtin": "nothing"}]}}},
        {"dar": {"rewards": {"components": [{"name": "a", "url": "http://10.0.0.1/score"}]}}},
        {"dar": {"rewards": None}},
    ]
    for values in cases:
        spec = live.spec(**{"training_file": file_id, **values})
        refused = live.http.post(PATH, json=spec)
        assert refused.status_code == 400, values
        error = refused.json()["error"]
        answer = live.http.post(f"{PATH}/validate", json=spec)
        if answer.status_code == 400:  # no spec at all
            assert answer.json()["error"]["code"] == error["code"]
            continue
        found = answer.json()
        assert not found["allowed_to_proceed"]
        codes = [(one["param"], one["code"]) for one in found["problems"]]
        assert (error["param"], error["code"]) in codes


def test_a_reward_service_is_refused_waited_for_or_not_called(
    live: Live, sdk: Client, judge: Judge
) -> None:
    spec = live.spec(dar=dar(judge))
    judge.status = 503
    waiting = sdk.jobs.validate(spec)
    assert (waiting.allowed_to_proceed, waiting.rewards[0].status) == (True, "waiting")
    assert any(one.param == waiting.rewards[0].param for one in waiting.warnings)
    judge.status = 401
    refused = sdk.jobs.validate(spec)
    assert (refused.allowed_to_proceed, refused.rewards[0].status) == (False, "failed")
    assert refused.problems[0].param == "method.dar.rewards.components[0].url"
    count = len(judge.seen)
    skipped = sdk.jobs.validate(spec, skip_validation=True)
    assert (skipped.allowed_to_proceed, skipped.rewards[0].status) == (True, "skipped")
    assert len(judge.seen) == count
    with pytest.raises(InvalidRequestError) as caught:
        sdk.jobs.validate(spec, steps=3)
    assert caught.value.param == "steps"


def test_an_earlier_job_of_the_model_tells_how_long_it_takes(
    live: Live, sdk: Client, judge: Judge
) -> None:
    _, lease = live.running(dar=dar(judge))
    lease.say({"type": "metrics", "step": 1, "values": {"dar/loss": 0.1, "time/step_seconds": 2.0}})
    twice = sdk.jobs.validate(live.spec(dar=dar(judge, max_steps=5, dar_k=8))).estimate
    assert twice is not None
    assert twice.seconds == pytest.approx(5 * 2.0 * 2)


def test_a_worker_with_room_is_found_and_a_hub_model_is_left_to_it(
    serve: Callable[..., Live], judge: Judge
) -> None:
    live = serve(hub_models=("Qwen/*",))
    (live.settings.home / "models" / "base" / "config.json").write_text(json.dumps(CONFIG))

    def validated(**values: Any) -> Any:
        spec = live.spec(dar=dar(judge), **values)
        return live.http.post(f"{PATH}/validate", json=spec).json()

    asks = {"node": "n", "slot": "0", "incarnation": "i", "boot_id": "b", "wants_job": False}
    report = {
        "version": "1",
        "machine": "m",
        "devices": [],
        "disk_free": 10**12,
        "disk_total": 10**12,
        "memory_free": 10**12,
        "interval_seconds": 10.0,
    }
    for free, fits in ((10**12, True), (1000, False)):
        told = live.worker().post(
            "/v1/worker/leases/claim", json={**asks, "report": report | {"memory_free": free}}
        )
        assert told.status_code == 204
        found = validated()
        assert (found["memory"]["fits"], found["warnings"]) == (fits, [])
    memory = validated(model="Qwen/small")["memory"]
    assert (memory["parameters"], memory["peak_bytes"], memory["fits"]) == (None, None, None)
    assert "hub model" in memory["message"]
