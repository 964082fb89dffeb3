"""Jobs whose rewards come from every kind of source, and from services that were written for other
systems.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from dar.errors import CheckpointError, InvalidRequestError, RewardBudgetError
from dar.protocol.reward_spec import Rewards
from dar.training import DARTrainer, JobInputs, NullControl, train_job
from dar.training.checkpoint.fingerprint import reward_terms
from fakes import loopback, tiny_models
from fakes.recording_sink import RecordingSink

COUNT = {"name": "count", "kind": "builtin", "fn": "contains", "params": {"values": ["w40"]}}


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    return tiny_models.save(tiny_models.judge(3, num_hidden_layers=1), tmp_path / "judge")


@pytest.fixture
def job(
    job_inputs: Callable[..., JobInputs], prompts: list[dict[str, Any]]
) -> Callable[..., JobInputs]:
    rows = [row | {"ground_truth": "w40"} for row in prompts]

    def make(rewards: dict[str, Any], **fields: Any) -> JobInputs:
        method = {"rewards": rewards, "checkpointing": {"every_steps": 2}}
        return job_inputs(method, rows=rows, **fields)

    return make


@contextmanager
def serving(handle: Callable[[dict[str, Any]], Any]) -> Iterator[str]:
    async def endpoint(request: Request) -> JSONResponse:
        return JSONResponse(handle(await request.json()))

    app = Starlette(routes=[Route("/score", endpoint, methods=["POST"])])
    with loopback.serving(app) as url:
        yield f"{url}/score"


def test_a_builtin_and_a_reward_model_are_summed_with_their_weights(
    job: Callable[..., JobInputs], judge: Path, sink: RecordingSink
) -> None:
    components = [
        COUNT | {"weight": 0.5},
        {"name": "rm", "kind": "hf_model", "model": "judge", "weight": 2.0},
    ]
    inputs = job({"components": components}, reward_models={"rm": judge})
    assert train_job(inputs, sink, NullControl()) == "finished"
    rows = [row for shown in sink.shown.values() for row in shown]
    for row in rows:
        expected = 0.5 * row.components["count"] + 2 * row.components["rm"]
        assert row.reward == pytest.approx(expected)
        assert row.components["count"] == float("w40" in row.completion)
    assert len({row.components["rm"] for row in rows}) > 1
    assert {"rewards/count/mean", "rewards/rm/mean"} <= sink.reports[1].keys()


def accuracy(
    prompts: list[str], completions: list[str], ground_truth: list[str], **_: Any
) -> list[float]:
    """A reward function as TRL's documentation describes them."""
    assert len(prompts) == len(completions)
    return [
        text.split().count(right) / 8 for text, right in zip(completions, ground_truth, strict=True)
    ]


def remote_model(data: dict[str, Any]) -> dict[str, Any]:
    """A remote reward model as OpenRLHF calls them."""
    rewards = [
        query.removeprefix(prompt).split().count(label) / 8
        for query, prompt, label in zip(data["query"], data["prompts"], data["labels"], strict=True)
    ]
    return {"rewards": rewards, "scores": rewards, "extra_logs": {"dummy_scores": rewards}}


@pytest.mark.parametrize(
    ("protocol", "handle"),
    [("trl", lambda data: accuracy(**data)), ("openrlhf", remote_model)],
)
def test_a_service_of_another_system_scores_a_job_unchanged(
    job: Callable[..., JobInputs], sink: RecordingSink, protocol: str, handle: Callable[..., Any]
) -> None:
    with serving(handle) as url:
        component = {"name": "theirs", "url": url, "protocol": protocol}
        assert train_job(job({"components": [component]}), sink, NullControl()) == "finished"
    rows = [row for shown in sink.shown.values() for row in shown]
    assert rows
    for row in rows:
        assert row.reward == row.components["theirs"] == row.completion.split().count("w40") / 8


def test_running_moments_survive_a_resume_bit_by_bit(
    job: Callable[..., JobInputs],
    judge: Path,
    sink: RecordingSink,
    new_sink: type[RecordingSink],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dar.rewards.scoring.normalize.WARM_UP", 10)
    component = {"name": "rm", "kind": "hf_model", "model": "judge", "normalize": "running"}
    rewards, places = {"components": [component]}, {"rm": judge}
    train_job(job(rewards, reward_models=places), sink, NullControl())
    again = new_sink()
    resumed = job(
        rewards, reward_models=places, work_dir=tmp_path / "again", resume_from=sink.published[0][1]
    )
    assert train_job(resumed, again, NullControl()) == "finished"
    one, two = (load_file(s.published[-1][1] / "model.safetensors") for s in (sink, again))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [row.reward for row in again.shown[4]] == [row.reward for row in sink.shown[4]]
    last = sink.shown[4]
    assert all(row.reward != row.components["rm"] for row in last)  # they were normalised
    other = {"components": [component | {"normalize": "none"}]}
    with pytest.raises(
        CheckpointError, match='normalize of the reward rm was "running" and is null'
    ):
        train_job(
            job(other, reward_models=places, resume_from=sink.published[0][1]),
            new_sink(),
            NullControl(),
        )


def test_a_fallback_is_the_reward_of_what_failed_and_the_failure_stays_visible(
    job: Callable[..., JobInputs], sink: RecordingSink
) -> None:
    numbers = {"name": "right", "kind": "builtin", "fn": "numeric_answer"}  # ground_truth is a word
    rewards = {
        "components": [numbers],
        "failure": {"on_error": {"fallback_value": -0.25}, "max_failed_fraction": 1.0},
    }
    assert train_job(job(rewards), sink, NullControl()) == "finished"
    for row in sink.shown[1]:
        assert (row.reward, row.reward_status) == (-0.25, "error")
        assert "holds no number" in str(row.reward_message)
    assert sink.reports[1]["rewards/fallback_fraction"] == 1.0
    assert sink.reports[1]["rewards/right/missing_fraction"] == 1.0
    assert sink.reports[1]["rewards/missing_fraction"] == 0.0


def test_a_gate_and_a_partial_skip_reach_the_rewards_and_are_told(
    job: Callable[..., JobInputs], new_sink: type[RecordingSink]
) -> None:
    length = {
        "name": "length",
        "kind": "builtin",
        "fn": "length_penalty",
        "params": {"target": 1, "max_penalty": 9},
    }
    gate = {
        "name": "gate",
        "role": "gate",
        "kind": "builtin",
        "fn": "regex_match",
        "params": {"pattern": "w1"},
    }
    sink = new_sink()
    assert train_job(job({"components": [length, gate]}), sink, NullControl()) == "finished"
    rows = [row for shown in sink.shown.values() for row in shown]
    assert {row.components["gate"] for row in rows} == {0.0, 1.0}
    for row in rows:
        assert row.reward == row.components["length"] * row.components["gate"]
    assert sink.reports[1]["rewards/zeroed_fraction"] == 0.0
    assert not zeroed(sink)

    def some(data: dict[str, Any]) -> list[float | None]:
        return [1.0 if "w40" in text else None for text in data["completions"]]

    with serving(some) as url:
        components = [length, {"name": "some", "url": url, "protocol": "trl"}]
        sink = new_sink()
        rewards = {"components": components, "combine": {"on_partial_skip": "zero"}}
        assert train_job(job(rewards), sink, NullControl()) == "finished"
    told = zeroed(sink)
    completions = 3 * max(row.index + 1 for row in sink.shown[1])
    assert {(data["component"], level) for level, data in told} == {("some", "warn")}
    for _, data in told:
        fraction = sink.reports[data["step"]]["rewards/zeroed_fraction"]
        assert fraction * completions == pytest.approx(data["count"])


def zeroed(sink: RecordingSink) -> list[tuple[str, dict[str, Any]]]:
    return [(level, data) for level, _, data in sink.events if data["kind"] == "reward_zeroed"]


def test_a_spent_budget_names_the_samples(
    job: Callable[..., JobInputs], sink: RecordingSink
) -> None:
    numbers = {"name": "right", "kind": "builtin", "fn": "numeric_answer"}  # ground_truth is a word
    failure = {"on_error": {"fallback_value": 0.0}, "max_failed_fraction": 0.001}
    with pytest.raises(RewardBudgetError) as caught:
        train_job(job({"components": [numbers], "failure": failure}), sink, NullControl())
    assert caught.value.sample_ids
    assert all(name.startswith("s") for name in caught.value.sample_ids)
    assert f"samples {', '.join(caught.value.sample_ids)}" in caught.value.message


def test_reward_models_are_given_by_the_names_of_the_spec(
    train: Callable[..., DARTrainer], judge: Path, sink: RecordingSink
) -> None:
    rewards = Rewards.model_validate(
        {"components": [{"name": "rm", "kind": "hf_model", "model": str(judge)}]}
    )
    train(reward_funcs=rewards, sink=sink, settings={"max_steps": 1})
    assert list(sink.shown[1][0].components) == ["rm"]
    with pytest.raises(InvalidRequestError, match="no component of kind hf_model"):
        train(reward_funcs=rewards, reward_model={"other": str(judge)})
    with pytest.raises(InvalidRequestError, match="by component name"):
        train(reward_funcs=rewards, reward_model=str(judge))
    with pytest.raises(InvalidRequestError, match="only by the rewards of a job spec"):
        train(reward_model={"rm": str(judge)})


def test_all_that_decides_a_reward_is_part_of_the_digest_and_nothing_else() -> None:
    def terms(component: dict[str, Any], **rewards: Any) -> Any:
        values = {"components": [{"name": "a", **component}], **rewards}
        return reward_terms(Rewards.model_validate(values), None)

    service = {"url": "http://h/a"}
    plain = [{"name": "a", "weight": 1.0, "clip": None}]
    assert terms(service) == terms({"url": "http://h/b", "retry": {"attempts": 2}}) == plain
    changed = [
        terms(service | {"normalize": "group"}),
        terms(service | {"normalize": {"tanh": 2}}),
        terms(service | {"required": False}),
        terms(service, combine={"clip": [0, 1]}),
        terms(service, failure={"on_error": "drop_group"}),
        terms(service, failure={"on_error": {"fallback_value": 1}}),
        terms({"kind": "builtin", "fn": "length_penalty", "params": {"target": 1}}),
        terms({"kind": "builtin", "fn": "length_penalty", "params": {"target": 2}}),
    ]
    assert len({json.dumps(one) for one in [plain, *changed]}) == len(changed) + 1
    assert terms(service, failure={"max_empty_steps": 9}) == plain


def test_retired_fields_of_a_spec_are_no_part_of_its_digest() -> None:
    component = {"name": "a", "url": "http://h/a"}
    older = component | {"batch": {"by": "group"}, "limits": {"adaptive": False}}
    stored = {"components": [older], "combine": {"mode": "weighted_sum", "tie_eps": 0.01}}
    now = {"components": [component], "combine": {"tie_eps": 0.01}}
    assert Rewards.model_validate(stored) == Rewards.model_validate(now)
    assert reward_terms(Rewards.model_validate(stored), None) == [
        {"name": "a", "weight": 1.0, "clip": None, "combine": {"tie_eps": 0.01}}
    ]
