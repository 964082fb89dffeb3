"""Messages about frequent mistakes name the value that was sent, and what to send instead."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from fakes.live_service import Live

JOBS = "/v1/fine_tuning/jobs"


@pytest.mark.parametrize(
    ("given", "param", "said"),
    [
        ({"learning_rate": "1e-5"}, "learning_rate", 'but it is the text "1e-5"; send it without quotes'),
        ({"learning_rate": "small"}, "learning_rate", 'but it is the text "small"'),
        ({"learning_rate": -1.5}, "learning_rate", "should be greater than 0, but it is -1.5"),
        ({"learning_rate_multiplier": "2"}, "learning_rate_multiplier", 'but it is the text "2"; send it without quotes'),
        ({"learning_rate_multiplier": 0}, "learning_rate_multiplier", "should be greater than 0, but it is 0"),
        ({"batch_size": 1.5}, "batch_size", "but it is 1.5"),
        ({"batch_size": [8]}, "batch_size", "but it is a list"),
        ({"batch_size": None}, "batch_size", "but it is null"),
        ({"drop_ties": "true"}, "drop_ties", 'but it is the text "true"; send it without quotes'),
        ({"adv_norm": "x" * 200}, "adv_norm", "'none', 'per_prompt' or 'batch', but it is \"xxx"),
    ],
)  # fmt: skip
def test_a_value_that_is_refused_is_shown(
    live: Live, error_of: Callable[..., Any], given: dict[str, Any], param: str, said: str
) -> None:
    spec = live.spec(dar={"hyperparameters": {"max_steps": 1, **given}})
    error = error_of(live.http.post(JOBS, json=spec))
    assert error["param"] == f"method.dar.hyperparameters.{param}"
    assert said in error["message"]
    assert len(error["message"]) < 200


def test_a_text_that_may_be_a_secret_is_not_shown(live: Live, error_of: Callable[..., Any]) -> None:
    body = {"name": "judge", "url": "https://judge.example/score", "headers": "s3cret-of-mine"}
    answer = live.http.post("/v1/reward_endpoints", json=body)
    assert error_of(answer)["param"] == "headers"
    assert "s3cret" not in answer.text


@pytest.mark.parametrize(
    ("given", "param", "place"),
    [
        ({"hyperparameters": {"n_epochs": 3}}, "hyperparameters", "method.dar.hyperparameters"),
        ({"learning_rate": 1e-6}, "learning_rate", "method.dar.hyperparameters"),
        ({"max_new_tokens": 8}, "max_new_tokens", "method.dar.sampling"),
        ({"rewards": {}}, "rewards", "method.dar"),
    ],
)
def test_a_field_in_a_wrong_place_is_told_where_it_belongs(
    live: Live, error_of: Callable[..., Any], given: dict[str, Any], param: str, place: str
) -> None:
    error = error_of(live.http.post(JOBS, json={**live.spec(), **given}))
    assert error["param"] == param
    assert error["message"].rstrip().endswith(place)


@pytest.mark.parametrize("path", ["/fine_tuning/jobs", "/files", "/models"])
def test_a_base_url_without_v1_is_recognised(
    live: Live, error_of: Callable[..., Any], path: str
) -> None:
    error = error_of(live.http.get(path))
    assert error["code"] == "not_found"
    assert f"it is /v1{path}: let the client's base_url end with /v1" in error["message"]
    assert "base_url" not in error_of(live.http.get("/v1/nothing"))["message"]


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({}, "no API key was sent"),
        ({"authorization": "KEY"}, "holds a key without 'Bearer ' before it"),
        ({"authorization": "Bearer"}, "has no key after 'Bearer'"),
        ({"authorization": "Basic KEY"}, "has another scheme than Bearer"),
        ({"x-api-key": "KEY"}, "was sent in the header x-api-key, which is not read"),
    ],
)
def test_a_key_that_is_sent_in_another_way_is_recognised(
    live: Live, error_of: Callable[..., Any], headers: dict[str, str], said: str
) -> None:
    key = live.key("api_key")
    given = {name: value.replace("KEY", key) for name, value in headers.items()}
    answer = httpx2.get(f"{live.url}{JOBS}", headers=given)
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (401, "missing_api_key")
    assert said in error["message"]
    assert "'Authorization: Bearer <key>'" in error["message"]
    assert key not in answer.text


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"prompt": null}', "the prompt is null"),
        ('{"question": "Why?", "answer": "So."}', "rename the column 'question' to 'prompt'"),
        ('{"Instruction": "Do it."}', "rename the column 'Instruction' to 'prompt'"),
        (
            '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}',
            "but 'messages': rename the column to 'prompt', and leave out the assistant's answer",
        ),
        ('{"a": 1, "b": 2}', "the row has no 'prompt'; its columns: a, b"),
    ],
)
def test_a_row_without_a_prompt_is_told_what_to_rename(
    live: Live, error_of: Callable[..., Any], row: str, said: str
) -> None:
    error = error_of(live.upload(f"{row}\n".encode()))
    assert error["code"] == "invalid_training_file"
    assert said in error["message"]


@pytest.mark.parametrize("name", ["/srv/models/base", "./base", "~/models/base", "a/b/base"])
def test_a_model_given_as_a_path_is_told_to_be_a_name(
    live: Live, error_of: Callable[..., Any], name: str
) -> None:
    error = error_of(live.http.post(JOBS, json=live.spec(model=name)))
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert f"{name!r} is a path, but a model is named" in error["message"]
    assert "'base'" in error["message"]


@pytest.mark.parametrize("name", ["nothing", "/srv/models/x", "../base", "a/b/c", "tinny", "x"])
def test_a_message_about_a_model_names_no_folder_of_the_server(
    live: Live, home: Path, error_of: Callable[..., Any], name: str
) -> None:
    reward = {"name": "j", "kind": "hf_model", "model": name}
    for spec in (
        live.spec(model=name),
        live.spec(dar={"rewards": {"components": [reward]}}),
    ):
        answer = live.http.post(JOBS, json=spec)
        assert answer.status_code == 400
        assert error_of(answer)["code"] == "model_not_found"
        assert str(home) not in answer.text
