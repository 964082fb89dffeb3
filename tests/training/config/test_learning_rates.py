"""A run that gives no learning rate gets one that moves its model."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from dar.errors import CheckpointError, InvalidRequestError
from dar.training import DARConfig, DARTrainer, JobInputs, NullControl, train_job
from dar.training.config.learning_rates import RATE_RULES, BudgetedRun, ChosenRate, Trained
from fakes.recording_sink import RecordingSink

BRACKETS, REVIEWS, SMOLLM2 = 46_800, 659_328, 134_515_008
"""Weights of the models that the rules were measured on; docs/decisions/0015-learning-rate.md."""
EXTRAPOLATED = 7_000_000_000


@pytest.mark.parametrize(
    ("trained", "weights", "least", "most"),
    [
        ("full", BRACKETS, 5e-4, 2e-3),
        ("full", REVIEWS, 2e-4, 1e-3),
        ("full", SMOLLM2, 1e-5, 4e-5),
        ("full", EXTRAPOLATED, 1e-6, 5e-6),
        ("adapter", REVIEWS, 2e-3, 5e-3),
        ("adapter", SMOLLM2, 3e-4, 7e-4),
        ("adapter", EXTRAPOLATED, 2e-5, 2e-4),
    ],
)
def test_the_rules_give_the_rates_that_were_measured(
    trained: Trained, weights: int, least: float, most: float
) -> None:
    assert least <= RATE_RULES[trained].rate(weights) <= most


@pytest.mark.parametrize("trained", RATE_RULES)
def test_a_larger_model_never_gets_a_larger_rate_nor_one_outside_the_bounds(
    trained: Trained,
) -> None:
    rule = RATE_RULES[trained]
    rates = [rule.rate(10**power) for power in range(15)]
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], rates[-1]) == (rule.most, rule.least)
    assert rule.rate(0) == rule.most
    assert all(float(f"{rate:.1e}") == rate for rate in rates)


def test_an_adapter_gets_a_larger_rate_than_full_weights() -> None:
    for power in range(3, 12):
        assert RATE_RULES["adapter"].rate(10**power) > RATE_RULES["full"].rate(10**power)


def chosen_by(sink: RecordingSink) -> list[tuple[str, dict[str, Any]]]:
    return [
        (message, dict(data))
        for level, message, data in sink.events
        if data and data["kind"] == "learning_rate" and level == "info"
    ]


def test_a_trainer_chooses_by_model_size_and_says_so(
    train: Callable[..., DARTrainer], sink: RecordingSink, tmp_path: Path
) -> None:
    trainer = train(sink=sink, settings={"learning_rate": None, "max_steps": 2})
    weights = sum(one.numel() for one in trainer.model.parameters())
    rate = RATE_RULES["full"].rate(weights)
    assert trainer.args.learning_rate == rate
    assert sink.reports[1]["train/learning_rate"] == rate
    assert trainer.optimizer.param_groups[0]["initial_lr"] == rate
    [(message, facts)] = chosen_by(sink)
    assert message.startswith(f"the peak learning rate is {rate:g}, chosen for the full weights of")
    assert facts == {
        "kind": "learning_rate", "learning_rate": rate, "trained": "full", "weights": weights,
        "trained_weights": weights, "multiplier": 1.0,
    }  # fmt: skip
    trainer.save_model(str(tmp_path / "saved"))
    assert f"| `learning_rate` | `{rate}` |" in (tmp_path / "saved" / "README.md").read_text()


def test_an_adapter_is_chosen_for_by_the_size_of_its_base(
    train: Callable[..., DARTrainer],
    make_model: Callable[..., LlamaForCausalLM],
    sink: RecordingSink,
) -> None:
    weights = sum(one.numel() for one in make_model().parameters())
    adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    settings = {"learning_rate": None, "max_steps": 1}
    trainer = train(sink=sink, peft_config=adapter, settings=settings)
    assert trainer.args.learning_rate == RATE_RULES["adapter"].rate(weights)
    [(message, facts)] = chosen_by(sink)
    assert "chosen for an adapter of" in message
    trained = sum(one.numel() for one in trainer.model.parameters() if one.requires_grad)
    assert (facts["weights"], facts["trained_weights"]) == (weights, trained)


def test_some_weights_of_a_model_are_named_as_such(
    train: Callable[..., DARTrainer],
    make_model: Callable[..., LlamaForCausalLM],
    sink: RecordingSink,
) -> None:
    model = make_model()
    model.get_input_embeddings().requires_grad_(requires_grad=False)
    trainer = train(model=model, sink=sink, settings={"learning_rate": None, "max_steps": 1})
    total = sum(one.numel() for one in trainer.model.parameters())
    assert trainer.args.learning_rate == RATE_RULES["full"].rate(total)
    assert "weights of a model; give learning_rate" in chosen_by(sink)[0][0]


@pytest.mark.parametrize(
    ("steps", "completions", "rate"),
    [
        (10, 32, 5.1e-4),
        (60, 32, 2.7e-4),
        (300, 32, 1.2e-4),
        (300, 64, 1.7e-4),
        (30_000, 32, 1.2e-5),
    ],
)
def test_under_a_budget_a_long_run_of_small_steps_gets_a_smaller_rate(
    steps: int, completions: int, rate: float
) -> None:
    run = BudgetedRun(steps, completions)
    assert ChosenRate("full", REVIEWS, REVIEWS, 1.0, run).value == rate
    assert ChosenRate("full", REVIEWS, REVIEWS, 3.0, run).value == 3 * rate
    # brackets, 300 steps of 96: the rate that was measured is also the largest
    assert ChosenRate("full", BRACKETS, BRACKETS, 1.0, BudgetedRun(300, 96)).value == 1e-3


WIDE = {"intermediate_size": 8192}
"""A model of 0.8 million weights, so that its rate is not the largest."""


def test_a_trainer_with_a_budget_counts_the_completions_that_a_step_really_has(
    make_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerBase,
    config: Callable[..., DARConfig],
    reward: Callable[..., list[float]],
) -> None:
    def chosen(**other: Any) -> tuple[float | None, str]:
        epochs = {"max_steps": -1, "num_train_epochs": 72, "per_device_train_batch_size": 99}
        args = config(**{"learning_rate": None, **epochs, **other})
        rows = [{"prompt": "w10"}] * 2  # so that there are 72 steps of 2 x 4 completions
        made = DARTrainer(make_model(**WIDE), args, rows, reward, processing_class=tokenizer).args
        return made.learning_rate, made.chosen_rate.message if made.chosen_rate else ""

    [usual, _] = chosen()
    assert usual == chosen(alpha=0.1)[0] == chosen(preset="paper")[0]
    [rate, message] = chosen(kl_budget=1.0)
    assert usual is not None
    assert rate == pytest.approx(usual * math.sqrt(8 / (2 * 72)), rel=0.03)
    assert "weights of a model" in message
    assert ", for kl_budget in 72 steps of 8 completions; give learning_rate" in message
    assert chosen(kl_budget=0.5) == (rate, message)
    assert chosen(kl_budget=1.0, learning_rate=2e-3) == (2e-3, "")


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor"])
def test_a_rate_that_is_given_stays_and_a_multiplier_multiplies_any(
    train: Callable[..., DARTrainer], new_sink: type[RecordingSink], optim: str
) -> None:
    given, doubled, half = new_sink(), new_sink(), new_sink()
    settings = {"max_steps": 1, "optim": optim}
    assert train(sink=given, settings=settings).args.learning_rate == 3e-3
    trainer = train(sink=doubled, settings={**settings, "learning_rate_multiplier": 2})
    assert trainer.args.learning_rate == 6e-3
    assert given.reports[1]["train/learning_rate"] == 3e-3
    assert doubled.reports[1]["train/learning_rate"] == 6e-3
    assert chosen_by(given) == chosen_by(doubled) == []
    chosen = {**settings, "learning_rate": None, "learning_rate_multiplier": 0.5}
    trainer = train(sink=half, settings=chosen)
    weights = sum(one.numel() for one in trainer.model.parameters())
    assert trainer.args.learning_rate == RATE_RULES["full"].rate(weights) / 2
    assert "times the multiplier 0.5" in chosen_by(half)[0][0]


def test_the_arguments_of_a_trainer_can_be_given_to_another(
    train: Callable[..., DARTrainer],
) -> None:
    first = train(settings={"max_steps": 1, "learning_rate_multiplier": 2})
    assert train(args=first.args).args.learning_rate == 6e-3


def test_the_users_own_arguments_are_not_changed(
    train: Callable[..., DARTrainer], config: Callable[..., DARConfig]
) -> None:
    own = config(learning_rate=None, learning_rate_multiplier=2.0, max_steps=1)
    train(args=own)
    assert (own.learning_rate, own.learning_rate_multiplier, own.chosen_rate) == (None, 2.0, None)


@pytest.mark.parametrize("preset", ["paper", "reference"])
def test_a_preset_keeps_its_rate_unless_null_is_given(
    train: Callable[..., DARTrainer], tmp_path: Path, preset: str
) -> None:
    usual: dict[str, Any] = {
        "output_dir": str(tmp_path), "max_new_tokens": 4, "max_steps": 2, "use_cpu": True, "save_strategy": "no",
        "disable_tqdm": True, "log_level": "error", "per_device_train_batch_size": 2, "warmup_steps": 0,
        "max_length": None, "max_prompt_length": None,
    }  # fmt: skip
    fixed = DARConfig(**usual, preset=preset)  # type: ignore[arg-type]  # one of the names
    assert train(args=fixed).args.learning_rate == 1e-6
    chosen = DARConfig(**usual, preset=preset, learning_rate=None)  # type: ignore[arg-type]  # one of the names
    assert train(args=chosen).args.learning_rate == RATE_RULES["full"].most


def test_an_optimizer_whose_steps_follow_the_gradient_needs_a_rate(
    train: Callable[..., DARTrainer],
) -> None:
    with pytest.raises(
        InvalidRequestError, match="for AdamW and Adafactor only, and optim is 'sgd'"
    ):
        train(settings={"optim": "sgd", "learning_rate": None})


@pytest.mark.parametrize("multiplier", [0, -1.0, math.inf, None])
def test_a_multiplier_must_be_above_0(tmp_path: Path, multiplier: Any) -> None:
    with pytest.raises(
        InvalidRequestError, match=r"^learning_rate_multiplier is .*above 0"
    ) as caught:
        DARConfig(output_dir=str(tmp_path), learning_rate_multiplier=multiplier)
    assert caught.value.param == "learning_rate_multiplier"


@pytest.mark.parametrize(("number", "product"), [(1e300, "inf"), (1e-300, "0")])
def test_a_product_that_is_no_rate_is_refused(
    number: float, product: str, train: Callable[..., DARTrainer]
) -> None:
    with pytest.raises(InvalidRequestError, match=rf"learning_rate_multiplier .* is {product}; "):
        train(settings={"learning_rate": number, "learning_rate_multiplier": number})


def test_a_job_without_a_rate_trains_with_the_chosen_one_and_resumes_with_it(
    job_inputs: Callable[..., JobInputs], new_sink: type[RecordingSink]
) -> None:
    dar = {
        "rewards": {"components": [{"name": "short", "kind": "builtin", "fn": "length_penalty", "params": {"target": 2}}]},
        "hyperparameters": {"batch_size": 3, "max_steps": 4, "learning_rate_multiplier": "auto"},
        "checkpointing": {"every_steps": 2},
    }  # fmt: skip
    whole, resumed = new_sink(), new_sink()
    assert train_job(job_inputs(dar), whole, NullControl()) == "finished"
    [(_, facts)] = chosen_by(whole)
    assert whole.reports[1]["train/learning_rate"] == facts["learning_rate"] >= 1e-4
    after = job_inputs(dar, resume_from=whole.published[0][1])
    assert train_job(after, resumed, NullControl()) == "finished"
    assert chosen_by(resumed) == []  # the job has said it
    assert resumed.reports[4]["train/learning_rate"] == whole.reports[4]["train/learning_rate"]


def test_a_resumed_run_keeps_the_rate_that_it_began_with(
    train: Callable[..., DARTrainer], new_sink: type[RecordingSink], tmp_path: Path
) -> None:
    """It may be the default of an earlier version."""
    saving = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    whole = train(settings={**saving, "learning_rate": 1e-6})
    half = tmp_path / "out" / "checkpoints" / "step-2"
    sink = new_sink()
    resumed = train(half, sink=sink, settings={**saving, "learning_rate": None})
    assert sink.reports[3]["train/learning_rate"] == pytest.approx(1e-6 / 3)
    assert resumed.args.learning_rate == 1e-6
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert one.equal(other)
    [message] = [message for _, message, data in sink.events if data]
    assert "goes on with the peak learning rate that it began with, 1e-06; a new run" in message
    # the checkpoints that it writes are those of the run that it goes on with
    last = tmp_path / "out" / "checkpoints" / "step-3"
    train(last, settings={**saving, "max_steps": 4, "learning_rate": 1e-6})
    for other in ({"learning_rate": 1e-3}, {"learning_rate": None, "learning_rate_multiplier": 2}):
        with pytest.raises(CheckpointError, match=r"learning_rate was 1e-06 and is 0\.\d+; resume"):
            train(half, settings=saving | other)


@pytest.mark.parametrize("is_earlier_version", [False, True])
def test_a_run_with_a_budget_that_is_made_longer_keeps_its_rate(
    train: Callable[..., DARTrainer],
    make_model: Callable[..., LlamaForCausalLM],
    sink: RecordingSink,
    tmp_path: Path,
    is_earlier_version: bool,
) -> None:
    """The length counts in the choice; earlier versions chose as if there were no budget."""
    usual: dict[str, Any] = {
        "kl_budget": 1.0, "per_device_train_batch_size": 2, "dar_k": 2, "max_steps": 4, "learning_rate": None,
        "learning_rate_multiplier": 0.5, "save_strategy": "steps", "save_steps": 3,
    }  # fmt: skip

    def run(resume: Path | None = None, **other: Any) -> float:
        model, settings = make_model(**WIDE), usual | other
        rate = train(resume, model=model, sink=sink, settings=settings).args.learning_rate
        assert rate is not None
        return rate

    weights = sum(one.numel() for one in make_model(**WIDE).parameters())
    unbudgeted = RATE_RULES["full"].rate(weights) * 0.5
    given = {"learning_rate": unbudgeted, "learning_rate_multiplier": 1}
    before = run(**(given if is_earlier_version else {}))
    share = 1 if is_earlier_version else math.sqrt(1 / 2)
    assert before == pytest.approx(unbudgeted * share, rel=0.03)
    half = tmp_path / "out" / "checkpoints" / "step-3"
    assert run(half) == before
    sink.events.clear()
    assert run(half, max_steps=8) == before
    assert sink.reports[5]["train/learning_rate"] == before / 2
    [data] = [data for _, _, data in sink.events if data and data["kind"] == "kept_learning_rate"]
    assert data["learning_rate"] == before
    assert data["chosen"] == pytest.approx(unbudgeted / 2, rel=0.03)
    last = tmp_path / "out" / "checkpoints" / "step-6"
    assert run(last, max_steps=8) == run(last, max_steps=9) == before  # as after a crash
    with pytest.raises(CheckpointError, match="learning_rate was"):
        run(half, learning_rate_multiplier=3)
