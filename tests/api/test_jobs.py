"""Jobs over HTTP: submitted once, listed, cancelled, and shown as OpenAI's clients expect."""

import json
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from dar.protocol import spec_checks
from dar.protocol.spec import JobSpec
from fakes.live_service import Live
from service.jobs.submission import body_digest

PATH = "/v1/fine_tuning/jobs"


def test_a_submitted_job_waits_and_shows_its_whole_spec(live: Live) -> None:
    spec = live.spec(suffix="mine", seed=7, metadata={"team": "a"})
    answer = live.http.post(PATH, json=spec)
    job = answer.json()
    assert answer.headers["location"] == f"{PATH}/{job['id']}"
    assert (job["object"], job["status"], job["seed"]) == ("fine_tuning.job", "queued", 7)
    assert (job["metadata"], job["suffix"]) == ({"team": "a"}, "mine")
    assert job["fine_tuned_model"] is job["error"] is job["finished_at"] is None
    assert job["method"]["dar"]["hyperparameters"]["dar_wclip"] == 20.0
    assert job["progress"] == {
        "step": 0,
        "total_steps": 4,
        "percent": 0.0,
        "tokens": 0,
        "calibration_completions": 0,
        "calibration_tokens": 0,
    }
    assert live.job(job["id"]) == job
    for name, path in job["links"].items():
        assert live.http.get(path).status_code == 200, name


def test_a_job_without_a_seed_gets_one_that_is_told(live: Live) -> None:
    seeds = {live.submit()["seed"] for _ in range(3)}
    assert len(seeds) == 3


@pytest.mark.parametrize(
    ("values", "param", "code"),
    [
        ({"model": "nothing"}, "model", "model_not_found"),
        ({"model": "../home"}, "model", "model_not_found"),
        ({"model": ".."}, "model", "model_not_found"),
        ({"model": "other/model"}, "model", "model_not_found"),
        ({"training_file": "file-none"}, "training_file", "file_not_found"),
        ({"metadata": {"k": 3}}, "metadata.k", "string_type"),
        ({"seed": -1}, "seed", "greater_than_equal"),
        ({"webhook": "https://h"}, "webhook", "extra_forbidden"),
        ({"validation_file": "file-none"}, None, "evaluation_incomplete"),
        (
            {"validation_file": "file-none", "dar": {"evaluation": {"every_steps": 2}}},
            "validation_file",
            "file_not_found",
        ),
        ({"training_file": "hf://trl-lib"}, "training_file", "invalid_request"),
        ({"training_file": "hf://a/b?split=x&split=y"}, "training_file", "invalid_request"),
        ({"training_file": "hf://other/data"}, "training_file", "dataset_not_allowed"),
        (
            {"dar": {"hyperparameters": {"dar_k": 1, "batch_size": 1, "max_steps": 1}}},
            "method.dar.hyperparameters.dar_k",
            "nothing_to_compare",
        ),
        *(
            (
                {"dar": {"peft": {"type": "lora", "target_modules": targets}}},
                "method.dar.peft.target_modules",
                "no_target",
            )
            for targets in ([], "", [""], ["q_proj", " "])
        ),
        (
            {"dar": {"resources": {"processes": 1, "strategy": "fsdp"}}},
            "method.dar.resources.strategy",
            "one_process",
        ),
        (
            {
                "dar": {
                    "resources": {"processes": 2, "strategy": "zero3"},
                    "hyperparameters": {"optim": "adafactor", "max_steps": 1},
                }
            },
            "method.dar.hyperparameters.optim",
            "optimizer_not_sharded",
        ),
        (
            {"dar": {"hyperparameters": {"max_steps": 1, "warmup_steps": 15}}},
            "method.dar.hyperparameters.warmup_steps",
            "no_learning_rate",
        ),
        (
            {
                "dar": {
                    "hyperparameters": {
                        "max_steps": 2,
                        "learning_rate": 1e300,
                        "learning_rate_multiplier": 1e300,
                    }
                }
            },
            "method.dar.hyperparameters.learning_rate_multiplier",
            "no_learning_rate",
        ),
        (
            {"dar": {"preset": "paper", "hyperparameters": {"n_epochs": 1}}},
            "method.dar.hyperparameters.warmup_steps",
            "no_learning_rate",
        ),
        (
            {"training_file": "hf://trl-lib/data", "dar": {"hyperparameters": {}}},
            "method.dar.hyperparameters.max_steps",
            "missing",
        ),
    ],
)
def test_what_cannot_run_is_refused_at_submission(
    serve: Callable[..., Any],
    error_of: Callable[..., Any],
    values: dict[str, Any],
    param: str | None,
    code: str,
) -> None:
    live = serve(hub_models=("Qwen/*",), hub_datasets=("trl-lib/*",))
    answer = live.http.post(PATH, json=live.spec(**values))
    error = error_of(answer)
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code)
    assert live.http.get(PATH).json()["data"] == []


REPEATED = {
    b'"max_steps": 4': (b'"max_steps": 9, "max_steps": 4', "method.dar.hyperparameters.max_steps"),
    b'"model": "base"': (b'"model": "x", "mo\\u0064el": "base"', "model"),
    b'"name": "letters"': (
        b'"name": "letters", "name": "letters"',
        "method.dar.rewards.components[0].name",
    ),
    b'"seed": 1': (b'"seed": 1, "metadata": {"a": "b", "a": "c"}', "metadata.a"),
}


@pytest.mark.parametrize("place", REPEATED)
def test_a_key_that_is_given_twice_is_named(
    live: Live, error_of: Callable[..., Any], place: bytes
) -> None:
    repeating, param = REPEATED[place]
    body = json.dumps(live.spec(seed=1)).encode()
    assert body.count(place) == 1
    headers = {"content-type": "application/json"}
    answer = live.http.post(PATH, content=body.replace(place, repeating), headers=headers)
    error = error_of(answer)
    assert (answer.status_code, error["param"], error["code"]) == (400, param, "duplicate_key")
    assert live.http.get(PATH).json()["data"] == []


def test_what_a_kl_budget_cannot_be_combined_with_is_refused_by_both_names(
    live: Live, error_of: Callable[..., Any]
) -> None:
    hyper = "method.dar.hyperparameters"
    normalized = {"name": "taste", "url": "http://127.0.0.1:61999/score", "normalize": "group"}
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"alpha": 0.1}, {}, f"{hyper}.alpha"),
        ({"beta": 0.3}, {}, f"{hyper}.beta"),
        ({"adv_norm": "batch"}, {}, f"{hyper}.adv_norm"),
        ({"weight_norm": "per_prompt"}, {}, f"{hyper}.weight_norm"),
        ({"log_ratio": "mean"}, {}, f"{hyper}.log_ratio"),
        ({"drop_ties": True}, {}, f"{hyper}.drop_ties"),
        ({"behavior": "policy"}, {}, f"{hyper}.behavior"),
        ({}, {"sampling": {"temperature": 0.7}}, "method.dar.sampling.temperature"),
        (
            {},
            {"rewards": {"components": [normalized]}},
            "method.dar.rewards.components.0.normalize",
        ),
    ]
    for options, further, param in cases:
        sent = {"max_steps": 1, "kl_budget": 1.0, **options}
        answer = live.http.post(PATH, json=live.spec(dar={"hyperparameters": sent, **further}))
        error = error_of(answer)
        assert (answer.status_code, error["param"], error["code"]) == (
            400,
            param,
            "kl_budget_conflict",
        )
        assert "kl_budget" in error["message"]
        assert param.split(".")[-1] in error["message"]
    allowed = {"max_steps": 1, "kl_budget": 1.0, "min_ess": 0.2, "baseline": "mean"}
    live.submit(dar={"hyperparameters": allowed})


def test_a_job_that_was_accepted_before_a_rule_came_is_still_given_out(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    dar = {"resources": {"processes": 1, "strategy": "fsdp"}}
    with monkeypatch.context() as patched:
        patched.setattr(spec_checks, "problems_of", lambda _: [])
        job = live.submit(dar=dar)
    lease = live.claim()
    assert lease.body["job_id"] == job["id"]
    assert lease.body["spec"]["method"]["dar"]["resources"]["strategy"] == "fsdp"


def test_an_unknown_model_is_answered_with_those_there_are(
    live: Live, error_of: Callable[..., Any]
) -> None:
    error = error_of(live.http.post(PATH, json=live.spec(model="bose")))
    assert "there is no model 'bose'; did you mean 'base'?" in error["message"]
    for number in range(20):
        (live.settings.home / "models" / f"other-{number:02}").mkdir()
        (live.settings.home / "models" / f"other-{number:02}" / "config.json").write_text("{}")
    error = error_of(live.http.post(PATH, json=live.spec(model="zzz")))
    assert "among them base, other-00, other-01, other-02, other-03, …. A new" in error["message"]


def test_an_allowed_hub_model_is_left_to_the_worker(serve: Callable[..., Any]) -> None:
    live = serve(hub_models=("Qwen/*",))
    job = live.submit(model="Qwen/Qwen3-0.6B")
    lease = live.claim()
    assert lease.body["job_id"] == job["id"]
    assert lease.body["model"]["kind"] == "hub"
    assert lease.body["model"]["name"] == "Qwen/Qwen3-0.6B"


def test_an_allowed_hub_data_set_is_left_to_the_worker(serve: Callable[..., Any]) -> None:
    live = serve(hub_datasets=("trl-lib/*",))
    address = "hf://trl-lib/ultrafeedback-prompt?split=train"
    job_id, lease = live.running(training_file=address)
    assert live.job(job_id)["training_file"] == lease.body["spec"]["training_file"] == address
    names = [file["name"] for file in lease.http.get("/inputs").json()["files"]]
    assert names == ["model/config.json"]


def test_a_validation_file_is_shown_kept_and_given_to_the_worker(
    live: Live, error_of: Callable[..., Any]
) -> None:
    content = b'{"prompt": "try"}\n'
    file_id = live.upload(content).json()["id"]
    dar = {"evaluation": {"every_steps": 2}}
    job_id, lease = live.running(validation_file=file_id, dar=dar)
    job = live.job(job_id)
    assert (job["validation_file"], job["training_file"] != file_id) == (file_id, True)
    assert lease.http.get("/inputs/validation_file").content == content
    answer = live.http.delete(f"/v1/files/{file_id}")
    assert (answer.status_code, error_of(answer)["code"]) == (409, "file_in_use")
    lease.post("/fail", kind="user", code="training_failed", message="over")
    assert live.http.delete(f"/v1/files/{file_id}").status_code == 200


def test_the_same_key_and_body_make_one_job(live: Live, error_of: Callable[..., Any]) -> None:
    spec, headers = live.spec(), {"idempotency-key": "k1"}
    first = live.http.post(PATH, json=spec, headers=headers)
    again = live.http.post(PATH, json=dict(reversed(spec.items())), headers=headers)
    assert again.json() == first.json()
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    other = live.http.post(PATH, json=spec | {"seed": 5}, headers=headers)
    assert (other.status_code, error_of(other)["code"]) == (409, "idempotency_mismatch")
    assert len(live.http.get(PATH).json()["data"]) == 1


DIGEST = "de2972da8ca7cef5e1f76ebea835a4374023026aac54a6e9d55a4a9324f7baf7"
"""Of `with_rewards`, as the version that still had ``by``, ``adaptive`` and ``mode`` computed
it."""


def with_rewards(batch: dict[str, Any], limits: dict[str, Any], combine: dict[str, Any]) -> Any:
    builtin = {"kind": "builtin", "fn": "length_penalty", "params": {"target": 20}}
    components = [
        {
            "name": "judge",
            "url": "https://rewards.example/score",
            "batch": {"max_samples": 8} | batch,
            "limits": {"rps": 5.0} | limits,
        },
        {"name": "short", "weight": 0.1} | builtin,
    ]
    rewards = {"components": components, "combine": {"tie_eps": 0.01} | combine}
    method = {"type": "dar", "dar": {"rewards": rewards}}
    return {"model": "base", "training_file": "file-1", "method": method}


def test_retired_fields_of_a_spec_do_not_change_its_digest() -> None:
    older = with_rewards({"by": "group"}, {"adaptive": False}, {"mode": "weighted_sum"})
    for given in (older, with_rewards({}, {}, {})):
        spec = JobSpec.model_validate_json(json.dumps(given))
        assert body_digest(spec) == DIGEST
        assert JobSpec.model_validate(spec.model_dump(mode="json")) == spec


def test_a_learning_rate_of_null_and_a_multiplier_of_1_do_not_change_a_digest() -> None:
    sent = with_rewards({}, {}, {})
    for hyper in ({"learning_rate": None}, {"learning_rate_multiplier": "auto"}):
        sent["method"]["dar"]["hyperparameters"] = hyper
        assert body_digest(JobSpec.model_validate(sent)) == DIGEST
    for hyper in ({"learning_rate": 1e-5}, {"learning_rate_multiplier": 2}):
        sent["method"]["dar"]["hyperparameters"] = hyper
        assert body_digest(JobSpec.model_validate(sent)) != DIGEST


def test_a_default_kl_budget_does_not_change_a_digest() -> None:
    sent = with_rewards({}, {}, {})
    for hyper in ({}, {"kl_budget": 1.0}, {"kl_budget": None}, {"alpha": 0.1}):
        sent["method"]["dar"]["hyperparameters"] = hyper
        assert body_digest(JobSpec.model_validate(sent)) == DIGEST
    for hyper in ({"kl_budget": 0.5}, {"alpha": 0.2}):
        sent["method"]["dar"]["hyperparameters"] = hyper
        assert body_digest(JobSpec.model_validate(sent)) != DIGEST
    offline = {**sent, "method": {"type": "dar", "dar": {}}}
    plain = body_digest(JobSpec.model_validate(offline))
    offline["method"]["dar"] = {"hyperparameters": {"kl_budget": 1.0}}
    assert body_digest(JobSpec.model_validate(offline)) != plain


@pytest.mark.parametrize(
    ("dar", "budget"),
    [
        ({}, 1.0),
        ({"sampling": {"temperature": 0.9}}, 1.0),
        ({"hyperparameters": {"kl_budget": 0.5}}, 0.5),
        ({"hyperparameters": {"min_ess": 0.2, "baseline": "mean"}}, 1.0),
        ({"hyperparameters": {"kl_budget": None}}, None),
        ({"hyperparameters": {"alpha": 0.1}}, None),
        ({"hyperparameters": {"beta": 0.3}}, None),
        ({"hyperparameters": {"adv_norm": "per_prompt"}}, None),
        ({"hyperparameters": {"drop_ties": True}}, None),
        ({"sampling": {"temperature": 0.7}}, None),
        ({"preset": "paper"}, None),
        ({"preset": "reference"}, None),
    ],
)
def test_a_kl_budget_of_1_is_the_default_where_nothing_that_was_sent_conflicts_with_it(
    live: Live, dar: dict[str, Any], budget: float | None
) -> None:
    """What the job shows can be sent again, and means the same."""
    hyper = {"max_steps": 2, **dar.get("hyperparameters", {})}
    shown = live.submit(dar={**dar, "hyperparameters": hyper})["method"]["dar"]
    assert shown["hyperparameters"].get("kl_budget") == budget
    assert ("alpha" in shown["hyperparameters"]) == (budget is None)
    assert live.submit(dar=shown)["method"]["dar"] == shown


def test_normalised_components_and_offline_jobs_have_no_default_kl_budget() -> None:
    sent = with_rewards({}, {}, {})
    assert JobSpec.model_validate(sent).dar.hyperparameters.kl_budget == 1.0
    for component in sent["method"]["dar"]["rewards"]["components"]:
        component["normalize"] = "running"
    for dar in (sent["method"]["dar"], {}):
        sent["method"]["dar"] = dar
        hyper = JobSpec.model_validate(sent).dar.hyperparameters
        assert (hyper.kl_budget, hyper.alpha, hyper.beta) == (None, 0.1, 0.3)


def test_a_job_shows_whether_its_learning_rate_was_given(live: Live) -> None:
    def shown(**hyper: Any) -> Any:
        return live.submit(dar={"hyperparameters": {"max_steps": 2, **hyper}})["hyperparameters"]

    assert shown()["learning_rate"] is None
    assert "learning_rate_multiplier" not in shown(learning_rate_multiplier="auto")
    assert shown(learning_rate_multiplier=0.5)["learning_rate_multiplier"] == 0.5
    assert shown(learning_rate=2e-5)["learning_rate"] == 2e-5


@pytest.mark.parametrize("preset", ["paper", "reference"])
def test_a_preset_of_a_job_keeps_its_learning_rate(live: Live, preset: str) -> None:
    dar = {"preset": preset, "hyperparameters": {"max_steps": 2}}
    assert live.submit(dar=dar)["hyperparameters"]["learning_rate"] == 1e-6


@pytest.mark.parametrize(
    ("part", "field", "neutral", "other"),
    [
        ("batch", "by", "group", "sample"),
        ("limits", "adaptive", False, True),
        ("limits", "adaptive", False, 0),
        ("combine", "mode", "weighted_sum", "product"),
    ],
)
def test_a_retired_field_is_accepted_at_its_neutral_value_only(
    live: Live, error_of: Callable[..., Any], part: str, field: str, neutral: Any, other: Any
) -> None:
    def post(value: Any, key: str) -> Any:
        component = {"name": "letters", "url": "http://127.0.0.1:61999/score"}
        rewards: dict[str, Any] = {"components": [component]}
        (rewards if part == "combine" else component)[part] = {field: value}
        spec = live.spec(dar={"rewards": rewards}, training_file=file_id)
        return live.http.post(PATH, json=spec, headers={"idempotency-key": key})

    file_id = live.upload().json()["id"]
    job = post(neutral, "k")
    assert job.status_code == 200
    dar = job.json()["method"]["dar"]
    place = dar["rewards"] if part == "combine" else dar["rewards"]["components"][0]
    assert field not in place[part]
    refused = post(other, "l")
    prefix = "method.dar.rewards" if part == "combine" else "method.dar.rewards.components[0]"
    assert refused.status_code == 400
    error = error_of(refused)
    assert (error["param"], error["code"]) == (f"{prefix}.{part}.{field}", "unsupported_value")
    assert "this version supports only" in error["message"]


def test_the_same_key_at_the_same_instant_makes_one_job(live: Live) -> None:
    spec, answers = live.spec(), []

    def post() -> None:
        client = live.client(live.key("api_key"), **{"idempotency-key": "k"})
        answers.append(client.post(PATH, json=spec))

    threads = [threading.Thread(target=post) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 8
    assert len({answer.json()["id"] for answer in answers}) == 1


def test_lists_are_pages_with_filters(live: Live, error_of: Callable[..., Any]) -> None:
    made = [live.submit(metadata={"n": str(n % 2), "a b": "c&d"})["id"] for n in range(5)]
    page = live.http.get(PATH, params={"limit": 2}).json()
    assert [job["id"] for job in page["data"]] == made[:2:-1]
    assert (page["object"], page["has_more"]) == ("list", True)
    assert (page["first_id"], page["last_id"]) == (made[4], made[3])
    rest = live.http.get(PATH, params={"after": made[3], "limit": 100}).json()
    assert ([job["id"] for job in rest["data"]], rest["has_more"]) == (made[2::-1], False)
    odd = live.http.get(PATH, params={"metadata[n]": "1", "metadata[a b]": "c&d"}).json()
    assert [job["id"] for job in odd["data"]] == [made[3], made[1]]
    queued = live.http.get(PATH, params={"status": "running", "order": "asc"}).json()
    assert queued["data"] == []
    assert error_of(live.http.get(PATH, params={"status": "asleep"}))["param"] == "status"
    both = live.http.get(PATH, params={"after": made[0], "before": made[1]})
    assert error_of(both)["param"] == "before"
    for query in (
        *("metadata[n=1", "metadata[]=1", "metadata[n]x=1", "metadata[=1", "metadata=1"),
        *("metadata.n=1", "metadata[n]=1&metadata[n]=0", "limit[x]=1", "status[=queued"),
        "limit=1&limit=2",
    ):
        answer = live.http.get(f"{PATH}?{query}")
        error = error_of(answer)
        assert answer.status_code == 400, query
        assert query.startswith(f"{error['param']}="), query
    for count, status in [(16, 200), (17, 400), (1200, 400)]:
        answer = live.http.get(PATH, params={f"metadata[{n}]": "v" for n in range(count)})
        assert answer.status_code == status
        assert status == 200 or error_of(answer)["param"] == "metadata"


def test_cancelling_twice_is_cancelling_once(live: Live, error_of: Callable[..., Any]) -> None:
    job_id = live.submit()["id"]
    for _ in range(2):
        answer = live.http.post(f"{PATH}/{job_id}/cancel")
        assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    assert live.job(job_id)["actions"] == ["resume"]
    assert error_of(live.http.post(f"{PATH}/nothing/cancel"))["code"] == "not_found"


def test_a_failed_job_cannot_be_cancelled(live: Live, error_of: Callable[..., Any]) -> None:
    job_id, lease = live.running()
    lease.post("/fail", kind="user", code="training_failed", message="the model does not load")
    answer = live.http.post(f"{PATH}/{job_id}/cancel")
    assert (answer.status_code, error_of(answer)["code"]) == (409, "invalid_state")
    job = live.job(job_id)
    assert (job["status"], job["status_detail"]) == ("failed", "user_error")
    assert job["error"]["message"] == "the model does not load"


def test_a_submission_takes_milliseconds(live: Live) -> None:
    spec, taken = live.spec(), []
    for _ in range(40):
        started = time.perf_counter()
        assert live.http.post(PATH, json=spec).status_code == 200
        taken.append(time.perf_counter() - started)
    # The goal is 20 ms on an idle machine; other tests share this one's two cores.
    assert statistics.median(taken) < 0.1
