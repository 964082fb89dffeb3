"""Free JSON in requests: a number that JSON cannot carry is refused by its place, and is never
stored or sent as null.
"""

import importlib
import json
import math
import pkgutil
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import pytest
from pydantic import TypeAdapter, ValidationError

import dar.protocol
from dar.client import Client
from dar.errors import InvalidRequestError
from dar.protocol.base import Input
from dar.protocol.reward_spec import RewardComponent
from dar.protocol.worker import EventRow
from fakes.live_service import Live

NAN, INFINITY = float("nan"), float("inf")
URL = "https://judge.example/score"
TEMPLATE = {"text": "{{completion}}", "more": [1, {"scale": NAN}]}
PLAIN = {"name": "a", "url": URL, "protocol": "plain", "pointer": "/0"}
GRADER = {"name": "a", "url": URL, "protocol": "openai_grader"}
COMPONENTS = "method.dar.rewards.components[0]"
JOBS: dict[str, tuple[dict[str, Any], str]] = {
    "template": ({**PLAIN, "template": TEMPLATE}, f"{COMPONENTS}.template.more[1].scale"),
    "a template that is a number": ({**PLAIN, "template": NAN}, f"{COMPONENTS}.template"),
    "grader": ({**GRADER, "grader": {"range": [-INFINITY, 1]}}, f"{COMPONENTS}.grader.range[0]"),
    "params": (
        {"name": "a", "kind": "builtin", "fn": "length_penalty", "params": {"target": INFINITY}},
        f"{COMPONENTS}.params.target",
    ),
}
SAMPLE = {"prompt": "p", "completion": "c"}
OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "an endpoint's template": (
        "/v1/reward_endpoints",
        {"name": "judge", "url": URL, "protocol": "plain", "pointer": "/0", "template": TEMPLATE},
        "template.more[1].scale",
    ),
    "a probe's columns": (
        "/v1/reward_endpoints/probe",
        {"component": {"name": "a", "url": URL}, "samples": [{**SAMPLE, "columns": {"x": NAN}}]},
        "samples[0].columns.x",
    ),
    "a probe's truth": (
        "/v1/reward_endpoints/probe",
        {"component": {"name": "a", "url": URL}, "samples": [{**SAMPLE, "ground_truth": [NAN]}]},
        "samples[0].ground_truth[0]",
    ),
    "a grader's item": (
        "/v1/fine_tuning/alpha/graders/run",
        {
            "grader": {"type": "endpoint", "name": "a", "endpoint": f"rwe_{'0' * 26}"},
            "model_sample": "x",
            "item": {"prompt": "p", "more": {"y": INFINITY}},
        },
        "item.more.y",
    ),
}


def test_a_request_with_nan_in_its_free_json_is_refused_by_its_place(
    live: Live, error_of: Callable[..., Any]
) -> None:
    spec = live.spec()
    asked = [
        ("/v1/fine_tuning/jobs", {**spec, "method": _method(component)}, param)
        for component, param in JOBS.values()
    ]
    for path, body, param in [*asked, *OTHERS.values()]:
        content = json.dumps(body).encode()  # with the tokens NaN and Infinity
        answer = live.http.post(path, content=content)
        error = error_of(answer)
        assert (answer.status_code, error["errors"][0]["param"]) == (400, param), answer.text
        assert "must be a finite number" in error["errors"][0]["message"]


def test_the_client_sends_no_null_instead(live: Live) -> None:
    with Client(api_key=live.key("api_key"), base_url=live.url) as client:
        component, param = JOBS["template"]
        with pytest.raises(InvalidRequestError, match="finite") as caught:
            client.jobs.create(**{**live.spec(), "method": _method(component)})
    assert caught.value.problems[0].param == param


def test_a_component_that_python_code_makes_is_checked_too() -> None:
    for component, param in JOBS.values():
        with pytest.raises(ValidationError) as caught:
            RewardComponent.model_validate(component)
        [error] = caught.value.errors()
        assert error["type"] == "finite_number"
        names = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]]
        assert f"{COMPONENTS}{''.join(names)}" == param


def _method(component: dict[str, Any]) -> dict[str, Any]:
    rewards = {"components": [component]}
    return {"type": "dar", "dar": {"hyperparameters": {"max_steps": 4}, "rewards": rewards}}


def _inputs(model: type[Input] = Input) -> Iterator[type[Input]]:
    for found in pkgutil.iter_modules(dar.protocol.__path__, "dar.protocol."):
        importlib.import_module(found.name)
    for made in model.__subclasses__():
        yield made
        yield from _inputs(made)


EXEMPT = {(EventRow, "data")}
"""A trainer's event is kept, whatever number is in it."""


def test_every_field_of_free_json_refuses_what_json_cannot_carry() -> None:
    free = {
        (model, name, field)
        for model in _inputs()
        for name, field in model.model_fields.items()
        if "typing.Any" in str(field.annotation) and (model, name) not in EXEMPT
    }
    assert len(free) >= 8
    for model, name, field in free:
        adapter: TypeAdapter[Any] = TypeAdapter(
            Annotated[field.annotation, "free", *field.metadata]
        )
        types: set[str] = set()
        for wrong in (
            math.nan,
            [math.nan],
            {"a": math.inf},
            [{"a": [math.nan]}],
            {"a": {"b": math.nan}},
        ):
            with pytest.raises(ValidationError) as caught:
                adapter.validate_python(wrong)
            types |= {error["type"] for error in caught.value.errors()}
        assert "finite_number" in types, f"{model.__name__}.{name}"
