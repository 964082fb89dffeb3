"""`kl_budget`: alpha and beta are chosen from rewards of the base model's completions."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from dar.errors import CheckpointError, InvalidRequestError
from dar.protocol.jobs import Forecast
from dar.protocol.reward_spec import Rewards
from dar.training import DARConfig, DARTrainer, JobInputs, NullControl, train_job
from dar.training.calibration import calibration
from fakes.recording_sink import RecordingSink, ScriptedControl

WIDE = {
    "per_device_train_batch_size": 5,
    "dar_k": 32,
    "max_steps": 3,
    "max_new_tokens": 5,
    "kl_budget": 0.25,
}
"""Enough completions for a calibration of 5 prompts x 96."""
LONG = {
    "per_device_train_batch_size": 5,
    "dar_k": 4,
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 1,
    "kl_budget": 1.5,
}
"""More KL than the samples of the first calibration can show."""
SHARE = calibration.SHARE


def share_of_even(completions: list[str], **columns: Any) -> list[float]:
    """How many of a completion's words have an even number."""
    words = [text.split() for text in completions]
    return [sum(int(w[1:]) % 2 == 0 for w in some) / max(1, len(some)) for some in words]


def scaled(factor: float) -> Callable[..., list[float]]:
    def reward(completions: list[str], **columns: Any) -> list[float]:
        return [factor * value for value in share_of_even(completions)]

    return reward


def weights_of(trainer: DARTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same(one: DARTrainer, other: DARTrainer) -> None:
    assert (one.args.alpha, one.args.beta) == (other.args.alpha, other.args.beta)
    theirs = weights_of(other)
    for name, weight in weights_of(one).items():
        assert torch.equal(weight, theirs[name]), name


def calibrations(sink: RecordingSink) -> list[tuple[str, str, dict[str, Any]]]:
    """Level, message and facts of each choice."""
    return [
        (level, message, dict(data))
        for level, message, data in sink.events
        if data and data["kind"] == "calibration"
    ]


@pytest.fixture(autouse=True)
def generous(monkeypatch: pytest.MonkeyPatch) -> None:
    """A calibration may spend as many completions as the run, so that the run can be short."""
    monkeypatch.setattr(calibration, "SHARE", 1)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second calibration may come after a few steps, whatever the KL does."""
    monkeypatch.setattr(calibration, "LEAST_STEPS", 2)
    monkeypatch.setattr(calibration, "WINDOW", 1)
    monkeypatch.setattr(calibration, "AT_REST", 1e9)


def test_a_budget_chooses_alpha_and_beta_before_the_first_step_and_says_where_it_leads(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    trainer = train(settings=WIDE, reward_funcs=share_of_even, sink=sink)
    [(level, message, facts)] = calibrations(sink)
    assert level == "info"
    assert facts["method"] == "frontier"
    assert facts["ending"] == "reached"
    assert facts["kl"] == pytest.approx(0.25, abs=1e-6)
    assert facts["reward"] > facts["start_reward"]
    assert facts["completions"] in (5 * 48, 2 * 5 * 48)
    assert facts["alpha"] == trainer.args.alpha != 0.1
    assert trainer.args.beta == 3 * trainer.args.alpha == facts["beta"]
    assert f"alpha is {trainer.args.alpha:.4g}" in message
    # about a normal distribution: KL = s^2 / (2 alpha^2)
    assert trainer.args.alpha == pytest.approx(facts["reward_std"] / math.sqrt(0.5), rel=0.5)
    kinds = [data["kind"] for _, _, data in sink.events if data]
    assert kinds.index("calibration_start") < kinds.index("calibration")
    assert ("calibrating", 0, None) in sink.phases
    assert "evaluating" not in {phase for phase, _, _ in sink.phases}
    assert facts["spent_completions"] == facts["completions"]
    assert facts["spent_tokens"] == facts["tokens"] > 0


def test_every_step_reports_how_far_it_is_from_the_frontier(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    train(settings=WIDE, reward_funcs=share_of_even, sink=sink)
    [(_, _, facts)] = calibrations(sink)
    assert len(facts["frontier"]) > 0
    for values in sink.reports.values():
        excess = values.get("dar/kl_excess")
        if values["dar/rewards_mean"] <= facts["start_reward"]:  # no KL is needed for it
            assert excess == pytest.approx(values["dar/kl_ref"])
        elif values["dar/rewards_mean"] <= facts["frontier"][0]["reward"]:
            assert values["dar/kl_ref"] - facts["frontier"][0]["kl"] <= excess
    assert any("dar/kl_excess" in values for values in sink.reports.values())


def test_the_arguments_of_the_user_are_not_changed(
    train: Callable[..., DARTrainer], config: Callable[..., DARConfig]
) -> None:
    args = config(**WIDE)
    train(args=args, reward_funcs=share_of_even)
    assert (args.alpha, args.beta) == (0.1, 0.3)


def test_rewards_in_another_unit_give_the_same_weights_to_the_last_bit(
    train: Callable[..., DARTrainer],
) -> None:
    one = train(settings=WIDE, reward_funcs=share_of_even)
    for factor in (2.0**-7, 2.0**7):
        other = train(settings=WIDE, reward_funcs=scaled(factor))
        assert other.args.alpha == factor * one.args.alpha
        theirs = weights_of(other)
        for name, weight in weights_of(one).items():
            assert torch.equal(weight, theirs[name]), name


def test_a_baseline_that_includes_the_completion_lowers_alpha(
    train: Callable[..., DARTrainer],
) -> None:
    """With the mean of all K an advantage is 1 - 1/K of the other one, so alpha must be too."""
    usual = train(settings=WIDE, reward_funcs=share_of_even)
    mean = train(settings=WIDE | {"baseline": "mean"}, reward_funcs=share_of_even)
    assert mean.args.alpha == pytest.approx(usual.args.alpha * 31 / 32)


def test_a_short_run_takes_the_deviation_of_few_rewards_and_warns(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    trainer = train(settings={"kl_budget": 0.5}, reward_funcs=share_of_even, sink=sink)
    [(level, message, facts)] = calibrations(sink)
    assert level == "warn"
    assert "too few rewards for a forecast" in message
    assert facts["completions"] <= 3 * 3 * 4
    assert trainer.args.alpha == pytest.approx(facts["reward_std"])


def test_a_calibration_spends_at_most_a_quarter_of_the_completions(
    train: Callable[..., DARTrainer], sink: RecordingSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "SHARE", SHARE)
    train(settings=LONG | {"dar_k": 12, "kl_budget": 3.0}, reward_funcs=share_of_even, sink=sink)
    [(_, _, facts)] = calibrations(sink)
    assert facts["ending"] == "untrusted"
    assert facts["completions"] == 5 * 16
    assert 2 * facts["completions"] > 5 * 12 * 8 // 4


def test_missing_rewards_are_left_out_and_equal_ones_leave_alpha_as_it_is(
    train: Callable[..., DARTrainer], sink: RecordingSink, new_sink: type[RecordingSink]
) -> None:
    def half(completions: list[str], **columns: Any) -> list[float | None]:
        return [v if i % 2 else None for i, v in enumerate(share_of_even(completions))]

    train(settings=WIDE, reward_funcs=half, sink=sink)
    [(_, _, facts)] = calibrations(sink)
    assert facts["samples_per_prompt"] == facts["completions"] / 5 / 2
    equal = new_sink()
    trainer = train(
        settings=WIDE, reward_funcs=lambda completions, **_: [1.0] * len(completions), sink=equal
    )
    assert "rewards of every prompt are equal" in calibrations(equal)[0][1]
    assert (trainer.args.alpha, trainer.args.beta) == (0.1, 0.3)


def test_a_run_that_is_stopped_while_it_calibrates_begins_again_in_the_same_way(
    train: Callable[..., DARTrainer], sink: RecordingSink, tmp_path: Path
) -> None:
    control = ScriptedControl("drain", lambda: bool(sink.events))
    stopped = train(settings=WIDE, reward_funcs=share_of_even, sink=sink, control=control)
    assert stopped.stopped_by == "drain"
    assert stopped.state.global_step == 0
    assert not calibrations(sink)
    assert not sink.published
    again = train(settings=WIDE, reward_funcs=share_of_even)
    assert_same(again, train(settings=WIDE, reward_funcs=share_of_even))


@pytest.mark.usefixtures("soon")
def test_if_the_trained_policys_samples_do_not_suffice_either_alpha_stays_and_they_are_counted(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    def equal_later(completions: list[str], trainer_state: Any, **columns: Any) -> list[float]:
        is_calibration = len(completions) > LONG["dar_k"] * LONG["per_device_train_batch_size"]
        if is_calibration and trainer_state.global_step > 0:
            return [1.0] * len(completions)
        return share_of_even(completions)

    train(settings=LONG, reward_funcs=equal_later, sink=sink)
    first, second = calibrations(sink)
    assert second[0] == "warn"
    assert "alpha stays" in second[1]
    assert second[2]["alpha"] == first[2]["alpha"]
    assert second[2]["spent_completions"] > first[2]["spent_completions"]


@pytest.mark.usefixtures("soon")
def test_where_the_base_models_samples_do_not_suffice_the_trained_policys_are_used_once(
    train: Callable[..., DARTrainer], sink: RecordingSink, tmp_path: Path
) -> None:
    """Resumed from any step, before, after and within, the run ends with the same weights."""
    trainer = train(settings=LONG, reward_funcs=share_of_even, sink=sink)
    first, second = calibrations(sink)
    assert first[2]["phase"] == "base"
    assert first[2]["ending"] == "untrusted"
    assert first[0] == "warn"
    assert "once more after step 3" in first[1]
    assert second[2]["phase"] == "policy"
    assert second[2]["step"] == 3
    assert second[2]["start_reward"] == first[2]["start_reward"]
    assert second[2]["alpha"] == trainer.args.alpha != first[2]["alpha"]
    assert second[2]["spent_completions"] == first[2]["completions"] + second[2]["completions"]
    assert second[2]["spent_tokens"] == first[2]["tokens"] + second[2]["tokens"]
    assert ("calibrating", 3, None) in sink.phases
    for step in (2, 3, 4):  # killed within the second calibration, it resumes from step 3
        folder = tmp_path / "out" / "checkpoints" / f"step-{step}"
        resumed = train(folder, settings=LONG, reward_funcs=share_of_even)
        assert_same(resumed, trainer)


def test_a_run_too_short_for_a_second_choice_says_so(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    settings = LONG | {"max_steps": 3, "dar_k": 8, "save_strategy": "no"}
    train(settings=settings, reward_funcs=share_of_even, sink=sink)
    [(level, message, _)] = calibrations(sink)
    assert level == "warn"
    assert "too short to choose again" in message


def test_a_job_with_a_budget_is_trained_and_reports_a_forecast_that_the_service_can_read(
    job_inputs: Callable[..., JobInputs], sink: RecordingSink
) -> None:
    rewards = {
        "name": "even",
        "kind": "builtin",
        "fn": "regex_match",
        "params": {"pattern": "w4"},
    }
    hyper = {"kl_budget": 0.5, "batch_size": 5, "max_steps": 2, "learning_rate": 1e-3}
    sampling = {"max_new_tokens": 8}
    dar = {"hyperparameters": hyper, "rewards": {"components": [rewards]}, "sampling": sampling}
    assert train_job(job_inputs(dar, steps=2), sink, NullControl()) == "finished"
    [(_, _, facts)] = calibrations(sink)
    forecast = Forecast.model_validate({k: v for k, v in facts.items() if k != "kind"})
    assert forecast.beta == 3 * forecast.alpha
    assert json.loads(json.dumps(facts)) == facts


# --- offline -----------------------------------------------------------------------------------


@pytest.fixture
def stored(
    config: Callable[..., DARConfig],
    make_model: Callable[..., Any],
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """64 completions of each prompt by the model that is trained, with their log-probabilities."""
    args = config(dar_k=64, max_new_tokens=4)
    trainer = DARTrainer(make_model(), args, prompts, share_of_even, processing_class=tokenizer)
    step = trainer.preview(len(prompts))
    return [
        {
            "prompt_ids": step.pairs[rows[0]].prompt_ids,
            "completion_ids": [list(step.pairs[row].completion_ids) for row in rows],
            "rewards": [step.rewards[row].reward for row in rows],
            "behavior_logps": step.behavior_logps_B[rows].tolist(),
        }
        for rows in (step.rows_of([p]) for p in range(len(prompts)))
    ]


@pytest.mark.parametrize(
    ("count", "with_logps", "method"),
    [(64, True, "frontier"), (64, False, "deviation"), (7, True, "deviation")],
)
def test_offline_a_forecast_needs_behavior_logps_and_enough_completions_of_a_prompt(
    train: Callable[..., DARTrainer],
    sink: RecordingSink,
    stored: list[dict[str, Any]],
    count: int,
    with_logps: bool,
    method: str,
) -> None:
    settings = {"kl_budget": 0.25, "per_device_train_batch_size": 2, "max_steps": 1}
    left_out = set() if with_logps else {"behavior_logps"}
    rows = [
        {
            name: values if name == "prompt_ids" else values[:count]
            for name, values in row.items()
            if name not in left_out
        }
        for row in stored
    ]
    trainer = train(train_dataset=rows, reward_funcs=None, settings=settings, sink=sink)
    [(_, _, facts)] = calibrations(sink)
    assert facts["method"] == method
    assert facts["spent_completions"] == 0  # nothing was sampled
    assert facts["completions"] > 0
    assert trainer.args.alpha == pytest.approx(facts["reward_std"] / math.sqrt(0.5), rel=0.5)


# --- what it cannot be combined with -----------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        {"alpha": 0.1},
        {"beta": 0.3},
        {"adv_norm": "per_prompt"},
        {"weight_norm": "batch"},
        {"log_ratio": "mean"},
        {"drop_ties": True},
        {"behavior": "policy"},
        {"preset": "paper"},
    ],
)
def test_an_option_that_leads_elsewhere_is_refused_beside_a_budget(
    config: Callable[..., DARConfig], other: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequestError, match="kl_budget") as refused:
        config(kl_budget=1.0, **other)
    name = next(iter(other))
    assert name == "preset" or name in str(refused.value)
    assert name == "preset" or refused.value.param == name


def test_a_temperature_without_a_fixed_point_and_moving_units_are_refused_beside_a_budget(
    train: Callable[..., DARTrainer],
) -> None:
    with pytest.raises(InvalidRequestError, match=r"temperature 0\.75 .* kl_budget"):
        train(settings={"kl_budget": 1.0, "temperature": 0.75})
    component = {"name": "taste", "url": "http://127.0.0.1:9/score", "normalize": "running"}
    rewards = Rewards.model_validate({"components": [component]})
    with pytest.raises(InvalidRequestError, match=r"taste .* kl_budget"):
        train(settings={"kl_budget": 1.0}, reward_funcs=rewards)


def test_without_a_budget_nothing_is_sampled_and_no_fingerprint_changes(
    train: Callable[..., DARTrainer], sink: RecordingSink, config: Callable[..., DARConfig]
) -> None:
    train(sink=sink)
    assert not calibrations(sink)
    assert "kl_budget" not in config().decisive_values()
    assert config().decisive_values()["alpha"] == 0.1
    assert {"alpha", "beta"}.isdisjoint(config(kl_budget=1.0).decisive_values())


# --- the default -------------------------------------------------------------------------------


@pytest.fixture
def plain(config: Callable[..., DARConfig]) -> Callable[..., DARConfig]:
    """Arguments that say nothing about alpha, beta and kl_budget."""

    def make(**given: Any) -> DARConfig:
        usual = vars(config())
        names = ("output_dir", "max_steps", "dar_k", "max_new_tokens", "learning_rate", "use_cpu")
        return DARConfig(**{name: usual[name] for name in names} | given)

    return make


def test_the_default_is_a_budget_that_gives_way_to_whatever_conflicts_with_it(
    train: Callable[..., DARTrainer],
    plain: Callable[..., DARConfig],
    stored: list[dict[str, Any]],
    make_model: Callable[..., Any],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    assert plain().kl_budget == 1.0
    assert dataclasses.replace(plain(), seed=1).kl_budget == 1.0
    for other in (
        {"alpha": 0.1},
        {"beta": 0.3},
        {"kl_budget": None},
        {"adv_norm": "batch"},
        {"temperature": 0.7},
        {"preset": "paper"},
        {"preset": "reference"},
    ):
        args = plain(**other)
        assert args.kl_budget is None, other
        assert "kl_budget" not in args.decisive_values()
    make = functools.partial(DARTrainer, processing_class=tokenizer)
    rows = [{"prompt": "w10"}]
    assert make(make_model(), plain(), rows, share_of_even).args.kl_budget == 1.0
    component = {"name": "taste", "url": "http://127.0.0.1:9/score", "normalize": "running"}
    running = Rewards.model_validate({"components": [component]})
    for trainer in (
        make(make_model(), plain(), stored),
        make(make_model(), plain(), rows, running),
    ):
        args = trainer.args
        assert (args.kl_budget, args.alpha, args.beta) == (None, 0.1, 0.3)


def test_a_run_of_an_earlier_version_goes_on_without_the_default_budget(
    train: Callable[..., DARTrainer],
    plain: Callable[..., DARConfig],
    sink: RecordingSink,
    tmp_path: Path,
) -> None:
    saved = {"save_strategy": "steps", "save_steps": 1}
    whole = train(args=plain(alpha=0.1, **saved))
    folder = tmp_path / "out" / "checkpoints" / "step-2"
    resumed = train(folder, args=plain(**saved), sink=sink)
    assert_same(resumed, whole)
    [data] = [data for _, _, data in sink.events if data and data["kind"] == "kept_kl_budget"]
    assert (data["kl_budget"], data["default"]) == (None, 1.0)
    with pytest.raises(CheckpointError, match="kl_budget"):
        train(folder, args=plain(kl_budget=1.0, **saved))
