"""Rewards that can never work are refused when a job is submitted, each with its place in the
spec.
"""

from collections.abc import Callable
from typing import Any

import pytest

from fakes.live_service import Live

PATH = "method.dar.rewards.components"
SERVICE = {"name": "a", "url": "http://127.0.0.1:9/score"}


def answer_to(live: Live, *components: dict[str, Any], rows: bytes | None = None) -> Any:
    spec = live.spec(
        dar={"rewards": {"components": list(components)}},
        **({} if rows is None else {"training_file": live.upload(rows).json()["id"]}),
    )
    return live.http.post("/v1/fine_tuning/jobs", json=spec)


@pytest.mark.parametrize(
    ("component", "param", "code", "message"),
    [
        ({"kind": "builtin", "fn": "shortness"}, "fn", "unknown_builtin", "there are contains, exact_match"),
        ({"kind": "builtin", "fn": "length_penalty"}, "params.target", "missing", "parameters of length_penalty"),
        ({"kind": "builtin", "fn": "length_penalty", "params": {"target": 3, "to": 1}}, "params.to", "extra_forbidden", "target"),
        ({"kind": "builtin", "fn": "regex_match", "params": {"pattern": "(?<=a)b"}}, "params.pattern", "regular_expression", "RE2"),
        ({"kind": "builtin", "fn": "exact_match", "params": {"column": "answer"}}, "params.column", "missing_column", "'answer'"),
        ({"url": "http://h/", "protocol": "plain", "template": {"a": ["{{reply}}"]}, "pointer": "/x"}, "template.a[0]", "invalid_template", "reply"),
        ({"url": "http://h/", "protocol": "plain", "template": "{{columns.b}}", "pointer": "/x"}, "template", "invalid_template", "columns"),
        ({"url": "http://h/", "protocol": "plain", "template": "{{prompt}}", "pointer": "/x"}, "template", "invalid_template", "no completion"),
        ({"url": "http://h/", "protocol": "plain", "template": "{{text}}", "pointer": "/a~2"}, "pointer", "invalid_pointer", "~0 for a tilde"),
        ({"normalize": {"tanh": -1}}, "normalize.tanh", "greater_than", "greater than 0, but it is -1"),
        ({"normalize": {"minmax": [0]}}, "normalize.minmax", "too_short", "at least 2 items"),
        ({"normalize": {"minmax": [1, 0]}}, "normalize.minmax", "clip_order", "below the upper one"),
        ({"normalize": {"minmax": [0, 1], "tanh": 1}}, "normalize", "union_form", '{"tanh": scale}, but it is an object'),
        ({"normalize": "batch"}, "normalize", "union_form", 'must be "none", "running", "group"'),
        ({"cache": {"enabled": "yes"}}, "cache.enabled", "union_form", 'must be "auto", true or false, but it is "yes"'),
        ({"url": "http://h/", "coerce": True}, "coerce", "unsupported_value", "numbers alone"),
        ({"kind": "hf_model", "model": "nowhere"}, "model", "model_not_found", "config.json"),
        ({"kind": "hf_model", "model": "a/b/c"}, "model", "model_not_found", "owner/name"),
        ({"kind": "hf_model", "model": "../base"}, "model", "model_not_found", "owner/name"),
    ],
)  # fmt: skip
def test_a_component_that_cannot_work_is_refused_with_its_place(
    live: Live,
    error_of: Callable[..., Any],
    component: dict[str, Any],
    param: str,
    code: str,
    message: str,
) -> None:
    answer = answer_to(live, SERVICE, {"name": "b", **component})
    error = error_of(answer)
    assert (answer.status_code, error["param"], error["code"]) == (400, f"{PATH}[1].{param}", code)
    assert message in error["message"]
    assert live.http.get("/v1/fine_tuning/jobs").json()["data"] == []


@pytest.mark.parametrize(
    ("dar", "param", "message"),
    [
        (
            {
                "rewards": {
                    "components": [SERVICE],
                    "failure": {"on_error": {"fallback_value": "0"}},
                }
            },
            "rewards.failure.on_error.fallback_value",
            'valid number, but it is the text "0"',
        ),
        (
            {"rewards": {"components": [SERVICE], "failure": {"on_error": "retry"}}},
            "rewards.failure.on_error",
            '{"fallback_value": reward}, but it is "retry"',
        ),
        ({"peft": {"type": "lora", "target_modules": 3}}, "peft.target_modules", "list of names"),
    ],
)
def test_one_error_tells_what_a_field_of_several_forms_may_be(
    live: Live, error_of: Callable[..., Any], dar: dict[str, Any], param: str, message: str
) -> None:
    error = error_of(live.http.post("/v1/fine_tuning/jobs", json=live.spec(dar=dar)))
    assert error["param"] == f"method.dar.{param}"
    assert message in error["message"]
    assert len(error["errors"]) == 1


def test_everything_that_is_wrong_is_told_at_once(live: Live, error_of: Callable[..., Any]) -> None:
    wrong = {"kind": "builtin", "fn": "nothing", "weight": 0}
    error = error_of(answer_to(live, {"name": "a", **wrong}, {"name": "b", **wrong}))
    told = [problem["param"] for problem in error["errors"]]
    assert told == [f"{PATH}[0].fn", f"{PATH}[1].fn", PATH]


@pytest.mark.parametrize(
    ("field", "value"),
    [("weight", 0.5), ("required", False), ("clip", [0, 1]), ("normalize", "group")],
)
def test_what_has_no_meaning_for_a_gate_is_refused(
    live: Live, error_of: Callable[..., Any], field: str, value: Any
) -> None:
    gate = {"name": "gate", "role": "gate", "kind": "builtin", "fn": "json_valid"}
    term = {"name": "a", "kind": "builtin", "fn": "length_penalty", "params": {"target": 9}}
    assert answer_to(live, term, gate).status_code == 200
    error = error_of(answer_to(live, term, gate | {field: value}))
    assert (error["param"], error["code"]) == (f"{PATH}[1]", "field_of_a_term")
    assert field in error["message"]


def test_gates_alone_are_no_reward(live: Live, error_of: Callable[..., Any]) -> None:
    gate = {"name": "gate", "role": "gate", "kind": "builtin", "fn": "json_valid"}
    error = error_of(answer_to(live, gate))
    assert (error["param"], error["code"]) == (PATH, "no_reward")
    assert "only gates" in error["message"]


def test_a_hub_model_outside_of_the_allow_list_gives_no_rewards(
    serve: Callable[..., Any], error_of: Callable[..., Any]
) -> None:
    live = serve(hub_models=("mine/*",))
    answer = answer_to(live, {"name": "rm", "kind": "hf_model", "model": "theirs/rm"})
    assert error_of(answer)["param"] == f"{PATH}[0].model"
    assert (
        answer_to(live, {"name": "rm", "kind": "hf_model", "model": "mine/rm"}).status_code == 200
    )


def test_a_row_without_a_builtins_value_is_skipped_and_not_refused(live: Live) -> None:
    rows = b'{"prompt": "a", "ground_truth": 1}\n{"prompt": "b"}\n'
    component = {"name": "right", "kind": "builtin", "fn": "numeric_answer"}
    assert answer_to(live, component, rows=rows).status_code == 200


def test_the_files_of_a_reward_model_reach_a_worker(live: Live) -> None:
    folder = live.settings.models_path / "judge"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text('{"num_labels": 1}')
    (folder / "sub" / "weights").write_text("w")
    (folder / ".hidden").write_text("no")
    components = [
        {"name": "rm", "kind": "hf_model", "model": "judge"},
        {"name": "hub", "kind": "hf_model", "model": "owner/judge"},
    ]
    _, lease = live.running(dar={"rewards": {"components": components}})
    names = sorted(file["name"] for file in lease.http.get("/inputs").json()["files"])
    assert names == [
        "model/config.json",
        "reward_models/rm/config.json",
        "reward_models/rm/sub/weights",
        "training_file",
    ]
    got = lease.http.get("/inputs/reward_models/rm/config.json")
    assert got.content == b'{"num_labels": 1}'
