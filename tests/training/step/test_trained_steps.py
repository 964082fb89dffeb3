"""A run that ends without an error has changed its model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, TrainerCallback

from dar.errors import InvalidRequestError, TrainingError
from dar.training import DARTrainer
from fakes.recording_sink import RecordingSink


class StoppedSchedule(TrainerCallback):
    """Keeps the learning rate at 0."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        schedule = more["lr_scheduler"]
        schedule = getattr(schedule, "scheduler", schedule)  # inside accelerate's
        for group in more["optimizer"].param_groups:
            group["lr"] = 0.0
        schedule.base_lrs = schedule._last_lr = [0.0] * len(schedule.base_lrs)


def without_effect(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model with one trained weight, which no log-probability depends on."""
    model.requires_grad_(requires_grad=False)
    weight = model.model.layers[0].mlp.down_proj.weight
    weight.requires_grad_(requires_grad=True)
    weight.register_hook(torch.zeros_like)
    return model


@pytest.mark.parametrize(
    ("change", "settings", "callbacks", "said"),
    [
        (lambda m: m, {}, [StoppedSchedule()], "none of the 3 steps.*the learning rate was 0"),
        (without_effect, {}, [], "none of the 3 steps.*the gradient was 0"),
        (
            lambda m: m.bfloat16(),
            {"learning_rate": 1e-30, "max_steps": 1},
            [],
            "the only step did not change.*smaller than the rounding of weights in bfloat16",
        ),
    ],
    ids=["rate", "gradient", "rounding"],
)
def test_a_run_that_changes_no_weight_fails_with_the_reason(
    train: Callable[..., DARTrainer],
    make_model: Callable[..., LlamaForCausalLM],
    change: Callable[[Any], nn.Module],
    settings: dict[str, Any],
    callbacks: list[TrainerCallback],
    said: str,
) -> None:
    model: Any = make_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(TrainingError, match=said) as failed:
        train(model=change(model), settings=settings, callbacks=callbacks)
    assert failed.value.error_code == "no_update"
    after = model.state_dict()
    assert all(torch.equal(after[name], old.to(after[name].dtype)) for name, old in before.items())


@pytest.mark.parametrize("warmup", [1, 15, 0.5])
def test_one_step_with_a_warm_up_is_refused_before_it_begins(
    train: Callable[..., DARTrainer], sink: RecordingSink, warmup: float
) -> None:
    with pytest.raises(InvalidRequestError, match="the run has one step") as refused:
        train(sink=sink, settings={"max_steps": 1, "warmup_steps": warmup})
    assert refused.value.param == "warmup_steps"
    assert sink.phases == []


def test_two_steps_with_a_warm_up_train(train: Callable[..., DARTrainer]) -> None:
    assert train(settings={"max_steps": 2, "warmup_steps": 15}).state.global_step == 2


def test_a_gradient_that_is_not_finite_is_blamed_on_training_only_after_a_step(
    train: Callable[..., DARTrainer], make_model: Callable[..., LlamaForCausalLM]
) -> None:
    for last_good, said in ((0, "no step has changed a weight yet"), (1, "training has diverged")):
        model = make_model()
        passes: list[torch.Tensor] = []

        def spoiled(gradient: torch.Tensor, passes: Any = passes, good: int = last_good) -> Any:
            passes.append(gradient)
            return gradient if len(passes) <= good else gradient * float("nan")

        model.model.norm.weight.register_hook(spoiled)
        with pytest.raises(TrainingError, match=f"is not a finite number.*{said}"):
            train(model=model)


def test_log_probabilities_that_no_text_has_are_refused_by_the_row(
    train: Callable[..., DARTrainer],
) -> None:
    row = {"prompt": "w10", "completions": ["w20", "w21"], "rewards": [1.0, 0.0]}
    rows = [row | {"behavior_logps": [-1e308, -1.0]}]
    with pytest.raises(InvalidRequestError, match=r"row 1.*behavior_logps must be at least -1,0"):
        train(train_dataset=rows, reward_funcs=None)
