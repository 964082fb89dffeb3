"""Rewards whose size does not fit alpha + beta, as a user of the trainer meets them."""

import json
import logging
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dar.protocol.hints import HINTS
from dar.training import DARTrainer
from dar.training.step.learning import LearningWatch
from fakes.recording_sink import RecordingSink

Score = Callable[..., Sequence[float | None]]
GIVEN = {"alpha": 0.1, "beta": 0.3}
FIRST = HINTS.advantages_steps
FITTING = 1.118 * 4 / 3
"""Deviation of the advantages of rewards 0, 1, 2, 3 with a leave-one-out baseline."""


def in_order(scale: float) -> Score:
    """Rewards 0, 1, 2, 3 times ``scale`` for the completions of a prompt."""

    def score(completions: list[str], **_: Any) -> list[float]:
        return [scale * (i % 4) for i in range(len(completions))]

    return score


def hints_of(sink: RecordingSink, *kinds: str) -> list[tuple[str, dict[str, Any]]]:
    kinds = kinds or ("small_advantages", "clipped_weights")
    return [
        (message, dict(data))
        for level, message, data in sink.events
        if level == "warn" and data is not None and data["kind"] in kinds
    ]


@pytest.mark.parametrize(
    ("scale", "kind", "advice"),
    [
        (1e-3, "small_advantages", "lower alpha + beta to about 0.0015, which would fit"),
        (1, None, ""),
        (1e3, "clipped_weights", "raise alpha + beta to about 1.5e+03, which would fit"),
    ],
)
def test_a_reward_of_another_size_than_alpha_and_beta_is_reported_once(
    train: Callable[..., DARTrainer], sink: RecordingSink, scale: float, kind: str, advice: str
) -> None:
    settings = GIVEN | {"max_steps": FIRST + 2, "lr_scheduler_type": "constant"}
    train(sink=sink, reward_funcs=in_order(scale), settings=settings)
    found = hints_of(sink)
    if kind is None:
        assert found == []
        return
    ((message, data),) = found
    assert (data["kind"], data["step"], data["learning_rate"]) == (kind, FIRST, 3e-3)
    assert data["reward_std"] == pytest.approx(1.118 * scale, rel=1e-3)
    assert data["fitting_alpha_plus_beta"] == pytest.approx(FITTING * scale, rel=1e-3)
    assert data["alpha_plus_beta"] == pytest.approx(0.4)
    said = (f"std(reward) is {1.118 * scale:.3g}", advice, "the learning rate is 0.003")
    assert all(part in message for part in said), message


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_settings_that_a_hint_names_bring_no_hint(
    train: Callable[..., DARTrainer], new_sink: type[RecordingSink], scale: float
) -> None:
    sink = new_sink()
    train(sink=sink, reward_funcs=in_order(scale), settings=GIVEN | {"max_steps": FIRST})
    ((_, data),) = hints_of(sink)
    total, after = data["fitting_alpha_plus_beta"], new_sink()
    settings = {"max_steps": FIRST, "alpha": total / 4, "beta": total * 3 / 4}
    train(sink=after, reward_funcs=in_order(scale), settings=settings)
    assert hints_of(after) == []


@pytest.mark.parametrize("cut", [1, FIRST - 1, FIRST])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_a_hint_comes_once_although_the_run_is_interrupted(
    train: Callable[..., DARTrainer], new_sink: type[RecordingSink], scale: float, cut: int
) -> None:
    first, second = new_sink(), new_sink()
    settings = GIVEN | {"max_steps": FIRST + 2, "save_steps": cut, "save_strategy": "steps"}
    trainer = train(sink=first, reward_funcs=in_order(scale), settings=settings)
    resume = trainer.checkpoints / f"step-{cut}"
    train(resume=resume, sink=second, reward_funcs=in_order(scale), settings=settings)
    assert len(hints_of(first)) == 1
    assert hints_of(second) == (hints_of(first) if cut < FIRST else [])


def test_a_run_that_is_too_short_to_wait_is_judged_at_its_end(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    train(sink=sink, reward_funcs=in_order(1e-3), settings=GIVEN | {"max_steps": 2})
    ((message, data),) = hints_of(sink)
    assert data["step"] == 2
    assert "in the first 2 steps" in message


def test_the_clip_is_judged_over_several_steps_and_not_by_one(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    def once(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
        return in_order(1e3 if trainer_state.global_step == 6 else 1)(completions)

    train(sink=sink, reward_funcs=once, settings=GIVEN | {"max_steps": 8})
    assert sink.reports[7]["dar/weights_clip_fraction"] == 0.5
    assert hints_of(sink) == []


def test_rewards_that_seldom_differ_are_not_called_small(
    train: Callable[..., DARTrainer], sink: RecordingSink, prompts: list[dict[str, Any]]
) -> None:
    calls: list[int] = []

    def rare(completions: list[str], **_: Any) -> list[float]:
        calls.append(1)
        return [float(len(calls) == 1 and i == 0) for i in range(len(completions))]

    settings = {"max_steps": FIRST, "per_device_train_batch_size": 5, "alpha": 1.0, "beta": 1.5}
    train(sink=sink, reward_funcs=rare, settings=settings)
    ((message, data),) = hints_of(sink)
    assert "only 0.04 of the completions differ in reward" in message
    assert data["fitting_alpha_plus_beta"] == pytest.approx(0.577, rel=1e-2)


def test_the_least_deviation_is_named_where_rewards_deviate_by_less(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    settings = GIVEN | {"max_steps": FIRST, "adv_norm": "per_prompt"}
    train(sink=sink, reward_funcs=in_order(1e-9), settings=settings)
    ((message, _),) = hints_of(sink)
    assert "adv_norm per_prompt divides by at least 1e-06" in message


def test_advantages_that_fit_are_clipped_by_the_distance_from_the_reference(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    settings = {"max_steps": FIRST, "dar_wclip": 0.9, "alpha": 1.0, "beta": 1.0}
    train(sink=sink, reward_funcs=in_order(1), settings=settings)
    ((message, _),) = hints_of(sink)
    assert "lower the learning rate, or raise dar_wclip" in message


def test_a_script_sees_a_hint_in_its_log(
    train: Callable[..., DARTrainer], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "dar.training.report.sink"):
        train(reward_funcs=in_order(1e-3), settings=GIVEN | {"max_steps": FIRST})
    assert len([one for one in caplog.records if "hardly any effect" in one.message]) == 1


def test_offline_rewards_are_judged_too(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    rows = [
        {"prompt": f"w{n}", "completions": ["w4", "w5"], "rewards": [0.0, 1e-3]} for n in range(9)
    ]
    train(train_dataset=rows, reward_funcs=None, sink=sink, settings=GIVEN | {"max_steps": FIRST})
    assert [data["kind"] for _, data in hints_of(sink)] == ["small_advantages"]


def step_of(advantages: list[float], number: int, kl: float = 0.0) -> Any:
    """A step as far as the watch reads it."""
    rows = range(len(advantages))
    return SimpleNamespace(
        number=number,
        valid_count=len(advantages),
        valid_rows=list(rows),
        rewards=[SimpleNamespace(reward=value) for value in advantages],
        advantages_B=torch.tensor(advantages),
        clipped_B=torch.zeros(len(advantages), dtype=torch.bool),
        behavior_logps_B=torch.full((len(advantages),), -20.0),
        ref_logps_B=torch.full((len(advantages),), -20.0 - kl),
    )


@pytest.mark.parametrize(("budget", "count"), [(None, 1), (1.0, 0)])
def test_with_a_budget_of_kl_the_size_of_advantages_is_not_judged(
    config: Callable[..., Any], budget: float | None, count: int
) -> None:
    arguments = config() if budget is None else config(kl_budget=budget)
    watch = LearningWatch(arguments)
    due = [
        event
        for number in range(1, FIRST + 1)
        for event in watch.add(step_of([-1e-3, 1e-3], number), 100, learning_rate=1e-3)
    ]
    assert len(due) == count


@pytest.mark.parametrize(("kl", "count"), [(0.049, 1), (0.051, 0)])
def test_a_kl_far_below_its_budget_is_reported_once_when_a_third_of_the_steps_are_done(
    config: Callable[..., Any], kl: float, count: int
) -> None:
    watch = LearningWatch(config(kl_budget=0.5))
    due = []
    for number in range(1, 31):
        due += watch.add(step_of([-0.4, 0.4], number, kl), 30, learning_rate=1e-4)
        state, watch = watch.state(), LearningWatch(config(kl_budget=0.5))
        watch.restore(json.loads(json.dumps(state)))
    assert len(due) == count
    for message, data in due:
        assert (data["kind"], data["step"], data["kl_budget"]) == ("slow_kl", 10, 0.5)
        assert "the KL to the reference is 0.049 nats" in message
        assert "raise the learning rate, or train" in message
        assert "would fit" not in message, "alpha and beta follow from the budget"
        assert message.endswith("the learning rate is 0.0001")


@pytest.mark.parametrize(("kl", "count"), [(1.01, 1), (0.99, 0)])
def test_a_kl_far_above_its_budget_is_reported_once(
    config: Callable[..., Any], kl: float, count: int
) -> None:
    watch = LearningWatch(config(kl_budget=0.5))
    due = []
    for number in range(1, 31):
        due += watch.add(step_of([-0.4, 0.4], number, kl), 30, learning_rate=1e-3)
    assert len(due) == count
    for message, data in due:
        assert (data["kind"], data["step"], data["kl"]) == ("large_kl", 10, pytest.approx(kl))
        assert "more than 2 times kl_budget = 0.5" in message
        assert "lower the learning rate" in message
