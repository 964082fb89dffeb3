"""Gradient checkpointing, half precision and adapters: what saves memory changes no result, or no
more than it must.
"""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, TrainerCallback

from dar.errors import InvalidRequestError, TrainingError
from dar.training import DARConfig, DARTrainer
from dar.training.checkpoint.checkpoint import ResumeState
from dar.training.model.loading import add_adapter
from fakes.recording_sink import RecordingSink


def lora(**more: Any) -> LoraConfig:
    values = {"r": 2, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**values | more)


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == 0:
            named = more["model"].named_parameters()
            self.found = {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("is_reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("is_adapter", [False, True], ids=["full", "lora"])
def test_gradient_checkpointing_changes_neither_samples_nor_gradients(
    train: Callable[..., DARTrainer],
    new_sink: type[RecordingSink],
    is_adapter: bool,
    is_reentrant: bool,
) -> None:
    peft = {"peft_config": lora()} if is_adapter else {}
    plain, saving = new_sink(), new_sink()
    kept, recomputed = Gradients(), Gradients()
    first = train(sink=plain, callbacks=[kept], **peft)
    settings: dict[str, Any] = {"gradient_checkpointing": True}
    if is_reentrant:
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": True}
    second = train(sink=saving, callbacks=[recomputed], settings=settings, **peft)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in first.model.modules())
    assert any(getattr(m, "gradient_checkpointing", False) for m in second.model.modules())
    assert kept.found.keys() == recomputed.found.keys() != set()
    for name, gradient in kept.found.items():
        torch.testing.assert_close(recomputed.found[name], gradient, atol=1e-7, rtol=1e-5)
    assert [row.completion for row in saving.shown[1]] == [r.completion for r in plain.shown[1]]
    for name in ("dar/logps_behavior", "dar/logps_policy", "dar/logps_ref"):
        assert saving.reports[3][name] == pytest.approx(plain.reports[3][name], rel=1e-3)
    # without its cache, sampling reads one token at a time: -27 nats per token instead of -1
    assert saving.reports[1]["dar/logps_behavior"] == plain.reports[1]["dar/logps_behavior"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU, so float16 is allowed")
def test_float16_is_refused_where_there_is_no_gpu(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="fp16 needs a CUDA device") as caught:
        DARConfig(output_dir=str(tmp_path), fp16=True)
    assert caught.value.param == "fp16"


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrainerCallback]:
    """Loss scaling as `Accelerator` sets it up on a GPU, brought to the CPU before the first
    step.
    """

    class Scaling(TrainerCallback):
        def __init__(self, trainer: DARTrainer, scale: float) -> None:
            accelerator = trainer.accelerator
            trainer.args.fp16 = True
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
            accelerator.native_amp = True
            shared = AcceleratorState._shared_state
            monkeypatch.setitem(shared, "_mixed_precision", "fp16")
            self.scaler = accelerator.scaler
            self.scales: list[float] = []
            self.weights: list[torch.Tensor] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            self.scales.append(self.scaler.get_scale())
            self.weights.append(more["model"].lm_head.weight.detach().clone())

    return Scaling


@pytest.fixture
def half_trainer(
    config: Callable[..., DARConfig],
    make_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[dict[str, Any]],
    reward: Callable[..., list[float]],
    scaling: Callable[..., Any],
) -> Callable[..., tuple[DARTrainer, Any]]:
    def make(sink: RecordingSink, scale: float, reward_funcs: Any = None, **settings: Any) -> Any:
        trainer = DARTrainer(
            make_model(),
            config(**settings),
            prompts,
            reward_funcs or reward,
            processing_class=tokenizer,
            sink=sink,
        )
        watching = scaling(trainer, scale)
        trainer.add_callback(watching)
        return trainer, watching

    return make


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_scaled_gradient_that_overflows_is_stepped_over_and_is_no_divergence(
    half_trainer: Callable[..., Any], sink: RecordingSink, max_grad_norm: float
) -> None:
    settings = {"max_steps": 4, "max_grad_norm": max_grad_norm}
    trainer, watching = half_trainer(sink, 2.0**40, **settings)
    with pytest.raises(TrainingError, match="every gradient overflowed float16"):
        trainer.train()
    assert trainer.state.global_step == 4
    # overflows halve the scale; nothing has changed, the learning rate included
    assert watching.scales == [2.0**39, 2.0**38, 2.0**37, 2.0**36]
    assert all(torch.equal(weight, watching.weights[0]) for weight in watching.weights)
    assert "train/grad_norm" not in sink.reports[1]
    assert math.isfinite(sink.reports[1]["dar/loss"])
    trainer, watching = half_trainer(sink, 2.0**10, **settings)
    trainer.train()
    assert watching.scales == [2.0**10, 2.0**11, 2.0**11, 2.0**12]
    assert not torch.equal(watching.weights[0], watching.weights[3])
    assert math.isfinite(sink.reports[1]["train/grad_norm"])


def test_what_overflows_without_any_scale_has_diverged(
    half_trainer: Callable[..., Any], sink: RecordingSink
) -> None:
    trainer, _ = half_trainer(sink, 0.5)
    trainer.model.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainingError, match="gradient of step 1 is not a finite number"):
        trainer.train()


def test_a_scaled_step_without_rewards_changes_nothing(
    half_trainer: Callable[..., Any], sink: RecordingSink
) -> None:
    def score(completions: list[str], **columns: Any) -> list[float | None]:
        is_second = sink.phases[-1][1] == 1
        return [None if is_second else float(i) for i in range(len(completions))]

    trainer, watching = half_trainer(sink, 2.0**10, score, weight_decay=0.1)
    trainer.train()
    assert [data["step"] for _, _, data in sink.events] == [2]
    first, second, third = watching.weights
    assert torch.equal(first, second)
    assert not torch.equal(second, third)


def test_the_loss_scale_goes_on_from_a_checkpoint(
    half_trainer: Callable[..., Any], new_sink: type[RecordingSink], tmp_path: Path
) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    whole, rest = new_sink(), new_sink()
    trainer, undisturbed = half_trainer(whole, 2.0**10, **settings)
    trainer.train()
    folder = whole.published[2][1]
    assert ResumeState.load(folder).trainer["scaler"]["scale"] == 2.0**11
    trainer, resumed = half_trainer(rest, 2.0**3, **settings, output_dir=str(tmp_path / "rest"))
    trainer.train(resume_from_checkpoint=folder)
    assert resumed.scales == undisturbed.scales[3:] == [2.0**12]
    assert torch.equal(resumed.weights[-1], undisturbed.weights[-1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="float16 training needs a GPU")
@pytest.mark.parametrize("is_adapter", [False, True], ids=["full", "lora"])
def test_float16_trains_on_a_gpu(
    train: Callable[..., DARTrainer], sink: RecordingSink, is_adapter: bool
) -> None:
    peft = {"peft_config": lora()} if is_adapter else {}
    trainer = train(sink=sink, settings={"fp16": True, "use_cpu": False}, **peft)
    assert trainer.accelerator.scaler.get_scale() >= 1
    assert trainer.state.global_step == 3
    assert all(math.isfinite(values["dar/loss"]) for values in sink.reports.values())


def test_an_adapters_training_makes_no_second_copy_of_the_model(
    config: Callable[..., DARConfig],
    make_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[dict[str, Any]],
    reward: Callable[..., list[float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copied: list[type] = []
    plain = copy.deepcopy

    def watched(value: Any, *more: Any) -> Any:
        copied.append(type(value))
        return plain(value, *more)

    monkeypatch.setattr(copy, "deepcopy", watched)
    base = make_model()
    before = {p.data_ptr() for p in base.parameters()}
    trainer = DARTrainer(
        base, config(), prompts, reward, processing_class=tokenizer, peft_config=lora()
    )
    assert trainer._policy.reference is None
    assert not [cls for cls in copied if issubclass(cls, nn.Module)]
    trainer.train()
    assert before <= {p.data_ptr() for p in trainer.model.parameters()}


def test_a_users_own_adapter_is_trained_on_and_kept_out_of_the_reference(
    train: Callable[..., DARTrainer],
    make_model: Callable[..., LlamaForCausalLM],
    sink: RecordingSink,
) -> None:
    adapted = add_adapter(make_model(), lora())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    trainer = train(model=adapted, sink=sink, settings={"learning_rate": 0.01})
    assert trainer.model is adapted
    assert trainer._policy.reference is None
    # the adapter was far from the base before the first step, and the reference is the base
    assert abs(sink.reports[1]["dar/logps_policy"] - sink.reports[1]["dar/logps_ref"]) > 0.1
    frozen = [name for name, p in adapted.named_parameters() if not p.requires_grad]
    assert frozen == [name for name, _ in adapted.named_parameters() if "lora" not in name]


def test_modules_that_an_adapter_saves_whole_are_trained_saved_and_left_out_of_the_reference(
    train: Callable[..., DARTrainer],
    new_sink: type[RecordingSink],
    tmp_path: Path,
) -> None:
    peft = lora(target_modules=["q_proj"], modules_to_save=["lm_head"])
    settings = {"max_steps": 3, "learning_rate": 0.05, "save_strategy": "steps", "save_steps": 1}
    whole, rest = new_sink(), new_sink()
    trainer = train(sink=whole, peft_config=peft, settings=settings)
    head = trainer.model.get_base_model().lm_head
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
    assert whole.reports[1]["dar/logps_policy"] == pytest.approx(
        whole.reports[1]["dar/logps_ref"], abs=1e-4
    )
    assert abs(whole.reports[3]["dar/logps_policy"] - whole.reports[3]["dar/logps_ref"]) > 0.01
    other = {**settings, "output_dir": str(tmp_path / "rest")}
    again = train(whole.published[1][1], sink=rest, peft_config=peft, settings=other)
    assert torch.equal(
        again.model.get_base_model().lm_head.modules_to_save["default"].weight,
        head.modules_to_save["default"].weight,
    )
    assert rest.deterministic_reports()[3] == whole.deterministic_reports()[3]


@pytest.mark.parametrize("token", ["bos_token", "eos_token"])
def test_a_tokenizer_whose_own_tokens_the_model_has_not_is_refused_at_the_start(
    train: Callable[..., DARTrainer],
    tokenizer: PreTrainedTokenizerBase,
    sink: RecordingSink,
    token: str,
) -> None:
    enlarged = copy.deepcopy(tokenizer)
    enlarged.add_special_tokens({token: "<new>"})
    with pytest.raises(TrainingError, match=f"{token} '<new>' has id 64") as caught:
        train(processing_class=enlarged, sink=sink)
    assert caught.value.param == "model"
    assert sink.phases == []


def test_a_prompt_with_a_token_that_the_model_has_not_is_refused_at_the_start(
    train: Callable[..., DARTrainer],
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[dict[str, Any]],
    sink: RecordingSink,
) -> None:
    enlarged = copy.deepcopy(tokenizer)
    enlarged.add_tokens(["<new>"])
    rows = [*prompts, {"prompt": "w10 <new>"}]
    with pytest.raises(InvalidRequestError, match="row 6: a prompt has token 64"):
        train(processing_class=enlarged, train_dataset=rows, sink=sink)
    assert sink.phases == []
