import copy
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from dar.errors import InvalidRequestError, TrainingError
from dar.protocol import metrics as registry
from dar.training import DARConfig, DARTrainer
from dar.training.model.loading import add_adapter
from fakes.recording_sink import RecordingSink


def weights_of(trainer: DARTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_the_reward_rises(
    config: Callable[..., DARConfig],
    make_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[dict[str, Any]],
    reward: Callable[..., list[float]],
    sink: RecordingSink,
) -> None:
    settings = config(
        per_device_train_batch_size=8,
        max_steps=50,
        learning_rate=2e-2,
        alpha=0.01,
        beta=0.03,
        dar_k=8,
        max_grad_norm=10,
    )
    trainer = DARTrainer(
        make_model(), settings, prompts, reward, processing_class=tokenizer, sink=sink
    )
    trainer.train()
    assert sink.reports[1]["dar/rewards_mean"] < 0.1
    assert sink.reports[50]["dar/rewards_mean"] > 0.8
    assert sink.reports[50]["dar/kl_ref"] > 1
    assert trainer.stopped_by is None


def test_every_reported_metric_is_registered_and_reaches_the_callbacks(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    trainer = train(sink=sink)
    assert sorted(sink.reports) == [1, 2, 3]
    for values in sink.reports.values():
        assert all(registry.is_known(name) and math.isfinite(v) for name, v in values.items())
        left_out = (
            "rewards/missing",
            "rewards/dropped",
            "rewards/refilled",
            "dar/preference",
            "dar/kl_excess",  # with a kl_budget
            "reward_requests/n_error/",
            "time/idle_r",
            "time/idle_g",
        )
        assert values.keys() >= {n for n in registry.NAMES if not n.startswith(left_out)}
    logged = [entry for entry in trainer.state.log_history if "dar/loss" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 3]
    assert logged[0]["dar/loss"] == logged[0]["loss"] == sink.reports[1]["dar/loss"]
    assert sink.reports[3]["train/epoch"] == pytest.approx(9 / 5)


def test_a_window_of_several_steps_reports_their_mean_and_the_last_steps_too(
    train: Callable[..., DARTrainer], new_sink: type[RecordingSink]
) -> None:
    single, windowed = new_sink(), new_sink()
    train(sink=single)
    train(sink=windowed, settings={"logging_steps": 2})
    assert sorted(windowed.reports) == [2, 3]
    for name in ("dar/rewards_mean", "dar/loss"):
        mean = (single.reports[1][name] + single.reports[2][name]) / 2
        assert windowed.reports[2][name] == pytest.approx(mean)
    largest = max(single.reports[step]["dar/weights_max"] for step in (1, 2))
    assert windowed.reports[2]["dar/weights_max"] == largest
    assert windowed.reports[3]["train/tokens"] == single.reports[3]["train/tokens"]


def test_samples_tell_everything_that_decided_their_weight(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    train(sink=sink)
    rows = sink.shown[1]
    assert [(row.group, row.index) for row in rows] == [(g, i) for g in range(3) for i in range(4)]
    for row in rows:
        group = [other.reward for other in rows if other.group == row.group]
        assert row.reward is not None
        siblings = (sum(group) - row.reward) / 3
        assert row.advantage == pytest.approx(row.reward - siblings, abs=1e-6)
        log_weight = (0.1 / 0.4) * (row.logp_ref - row.logp_behavior) + row.advantage / 0.4
        assert row.weight == pytest.approx(min(math.exp(log_weight), 20), rel=1e-4)
        assert row.components == {"share_of_w40": row.reward}


def test_accumulation_equals_one_big_batch(
    train: Callable[..., DARTrainer],
    new_sink: type[RecordingSink],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    big, split, tiny = new_sink(), new_sink(), new_sink()
    settings = {"max_grad_norm": 0.05, "optim": "sgd"}
    whole = train(sink=big, settings={**settings, "per_device_train_batch_size": 4})
    shares = train(
        sink=split,
        settings={**settings, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    )
    monkeypatch.setattr("dar.training.model.logprobs.MAX_ROWS", 3)
    passes = train(sink=tiny, settings={**settings, "per_device_train_batch_size": 4})
    for other, said in ((shares, split), (passes, tiny)):
        for step, values in big.deterministic_reports().items():
            assert said.deterministic_reports()[step] == pytest.approx(values, rel=1e-4, abs=1e-5)
        for name, weight in weights_of(whole).items():
            torch.testing.assert_close(weights_of(other)[name], weight, atol=1e-6, rtol=1e-5)


def test_missing_rewards_are_left_out_and_never_counted_as_numbers(
    train: Callable[..., DARTrainer], new_sink: type[RecordingSink]
) -> None:
    def offset(shift: float) -> Callable[..., list[float]]:
        def score(completions: list[str], **columns: Any) -> list[float]:
            return [
                math.nan if i % 4 == 3 else shift + len(set(text.split())) / 8
                for i, text in enumerate(completions)
            ]

        return score

    near, far = new_sink(), new_sink()
    settings = {"optim": "sgd"}  # Adam would blow up differences in the last digits
    first = train(sink=near, reward_funcs=offset(0.0), settings=settings)
    second = train(sink=far, reward_funcs=offset(-64.0), settings=settings)
    # A missing reward taken for a 0 would be by far the worst of one run and the best of the other.
    for name, weight in weights_of(first).items():
        torch.testing.assert_close(weights_of(second)[name], weight, atol=1e-4, rtol=1e-3)
    assert near.reports[1]["rewards/missing_fraction"] == 0.25
    missing = [row for row in near.shown[1] if row.index == 3]
    assert {(row.reward, row.weight, row.reward_status) for row in missing} == {
        (None, None, "error")
    }
    assert near.reports[1]["train/tokens"] == sum(
        row.completion_tokens for row in near.shown[1] if row.index != 3
    )


def test_a_group_with_one_reward_has_nothing_to_compare_and_is_dropped(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    def score(completions: list[str], **columns: Any) -> list[float | None]:
        return [float(i) if i == 0 or i > 3 else None for i in range(len(completions))]

    train(sink=sink, reward_funcs=score, settings={"max_steps": 1})
    assert {row.weight for row in sink.shown[1] if row.group == 0} == {None}
    assert all(row.weight is not None for row in sink.shown[1] if row.group > 0)


def test_an_empty_step_changes_nothing_says_so_and_three_in_a_row_end_training(
    train: Callable[..., DARTrainer],
    make_model: Callable[..., LlamaForCausalLM],
    sink: RecordingSink,
) -> None:
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    calls = []

    def skip(completions: list[str], **columns: Any) -> list[None]:
        calls.append(len(completions))
        return [None] * len(completions)

    settings = {"max_steps": 9, "weight_decay": 0.1}
    with pytest.raises(TrainingError, match="no usable rewards"):
        train(model=model, sink=sink, reward_funcs=skip, settings=settings)
    assert len(calls) == 3
    empty = [data["step"] for _, _, data in sink.events if data["kind"] == "empty_step"]
    assert empty == [1, 2, 3]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert sink.reports[1]["rewards/missing_fraction"] == 1
    assert "dar/loss" not in sink.reports[1]


def test_one_completion_per_prompt_is_compared_with_the_whole_step(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    def score(completions: list[str], **columns: Any) -> list[float]:
        return [float(i) for i in range(len(completions))]

    train(sink=sink, reward_funcs=score, settings={"dar_k": 1, "max_steps": 1})
    assert [row.advantage for row in sink.shown[1]] == [-1.5, 0, 1.5]
    assert sink.reports[1]["dar/weights_max"] > 1


def test_columns_are_repeated_for_every_completion(train: Callable[..., DARTrainer]) -> None:
    seen: list[tuple[list[str], list[str]]] = []

    def score(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
        seen.append((prompts, answer))
        return [float(len(text)) for text in completions]

    train(reward_funcs=score, settings={"max_steps": 1})
    texts, answers = seen[0]
    assert len(texts) == len(answers) == 12
    assert answers[:4] == [answers[0]] * 4


def test_a_reward_functions_exception_comes_out_unchanged(train: Callable[..., DARTrainer]) -> None:
    calls = []

    def score(completions: list[str], **columns: Any) -> list[float]:
        calls.append(completions)
        raise TypeError("my own mistake")

    with pytest.raises(TypeError, match="my own mistake"):
        train(reward_funcs=score)
    assert len(calls) == 1  # it is not taken for a wrong signature and tried in another way


def test_a_loss_that_is_no_number_ends_training_before_the_weights_change(
    train: Callable[..., DARTrainer], make_model: Callable[..., LlamaForCausalLM]
) -> None:
    model = make_model()
    norm = model.model.norm.weight
    norm.register_hook(lambda gradient: gradient * float("nan"))
    before = norm.detach().clone()
    with pytest.raises(TrainingError, match="gradient of step 1 is not a finite number"):
        train(model=model)
    assert torch.equal(norm, before)


def test_without_alpha_no_reference_is_kept_or_asked(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    train(sink=sink, settings={"alpha": 0.0})
    assert "dar/logps_ref" not in sink.reports[1]
    assert sink.shown[1][0].logp_ref is None


def test_an_adapters_reference_is_the_model_without_it(
    train: Callable[..., DARTrainer],
    make_model: Callable[..., LlamaForCausalLM],
    sink: RecordingSink,
) -> None:
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    peft = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = train(model=model, peft_config=peft, sink=sink, settings={"learning_rate": 0.05})
    # Of each completion: in the mean of a step they cancel.
    first, last = (max(abs(s.logp_policy - s.logp_ref) for s in sink.shown[i]) for i in (1, 3))
    assert first < 1e-4
    assert last > 0.1
    after = dict(trainer.model.get_base_model().named_parameters())
    for name, weight in before.items():
        same = name if name in after else name.replace(".weight", ".base_layer.weight")
        assert torch.equal(after[same], weight)


def test_dropout_of_the_model_is_off_in_every_pass(
    train: Callable[..., DARTrainer],
    make_model: Callable[..., LlamaForCausalLM],
    sink: RecordingSink,
) -> None:
    train(model=make_model(attention_dropout=0.9), sink=sink, settings={"max_steps": 1})
    row = sink.shown[1][0]
    # Padding is impossible in sampling and merely unlikely to the policy: 1/64 of the mass here.
    pad = row.completion_tokens * math.log(63 / 64)
    assert row.logp_policy == pytest.approx(row.logp_behavior + pad, abs=0.05)
    assert row.logp_policy == pytest.approx(row.logp_ref, abs=1e-4)


def test_length_is_counted_in_epochs_when_no_steps_are_given(
    train: Callable[..., DARTrainer],
) -> None:
    trainer = train(settings={"max_steps": -1, "num_train_epochs": 2})
    assert trainer.state.global_step == math.ceil(2 * 5 / 3)
    assert trainer.state.epoch == 2


def test_completions_that_cannot_fit_the_model_are_refused(
    train: Callable[..., DARTrainer],
) -> None:
    with pytest.raises(InvalidRequestError, match="do not fit into 128 tokens"):
        train(settings={"max_new_tokens": 128})


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, dar.training; assert 'torch' not in sys.modules; dir(dar.training)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_prompt_that_is_too_long_is_cut_and_said_once(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    train(sink=sink, settings={"max_prompt_length": 4})
    cuts = [data for _, _, data in sink.events]
    assert len(cuts) == 1
    assert cuts[0]["kind"] == "prompt_cut"
    assert cuts[0]["cut_tokens"] == {3: 2, 5: 1}[cuts[0]["row"]]


def test_models_that_cannot_be_told_positions_are_refused(
    config: Callable[..., DARConfig],
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[dict[str, Any]],
    reward: Callable[..., list[float]],
) -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(TrainingError, match="BloomForCausalLM takes no position_ids"):
        DARTrainer(model, config(), prompts, reward, processing_class=tokenizer)


def test_models_whose_cache_cannot_be_repeated_are_refused_before_the_first_step(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    hybrid = Qwen3NextConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        intermediate_size=16,
    )
    with pytest.raises(TrainingError, match="cannot sample from Qwen3NextForCausalLM") as caught:
        train(model=Qwen3NextForCausalLM(hybrid), sink=sink)
    assert caught.value.param == "model"
    assert sink.phases == []


@pytest.mark.parametrize("modules", ["(", "no_such_module"])
def test_adapters_for_modules_that_are_none_are_refused(
    make_model: Callable[..., LlamaForCausalLM], modules: str
) -> None:
    with pytest.raises(TrainingError, match="does not fit the model") as caught:
        add_adapter(make_model(), LoraConfig(target_modules=modules, task_type="CAUSAL_LM"))
    assert caught.value.param == "method.dar.peft.target_modules"


def test_a_padding_token_beyond_the_vocabulary_changes_nothing(
    train: Callable[..., DARTrainer], tokenizer: PreTrainedTokenizerBase, sink: RecordingSink
) -> None:
    enlarged = copy.deepcopy(tokenizer)
    enlarged.add_special_tokens({"pad_token": "<new>"})
    assert enlarged.pad_token_id == 64
    train(processing_class=enlarged, sink=sink, settings={"max_steps": 1})
    assert 1 in sink.reports


def test_a_conversation_that_the_template_refuses_is_named_before_the_first_step(
    train: Callable[..., DARTrainer], tokenizer: PreTrainedTokenizerBase, sink: RecordingSink
) -> None:
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('no such role') }}{% endif %}w10"
    )
    rows = [{"prompt": [{"role": role, "content": "w4"}]} for role in ("user",) * 19 + ("tool",)]
    with pytest.raises(InvalidRequestError, match=r"row 20: .*no such role"):
        train(train_dataset=rows, processing_class=strict, sink=sink)
    assert sink.phases == []


def test_predicting_is_refused(train: Callable[..., DARTrainer]) -> None:
    trainer = train(settings={"max_steps": 1})
    with pytest.raises(InvalidRequestError, match="labelled data"):
        trainer.predict([])


def test_an_adapter_keeps_its_own_dropout_and_gets_no_second_adapter(
    config: Callable[..., DARConfig],
    make_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[dict[str, Any]],
    reward: Callable[..., list[float]],
) -> None:
    peft = LoraConfig(lora_dropout=0.4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = add_adapter(make_model(attention_dropout=0.2), peft)
    DARTrainer(adapted, config(), prompts, reward, processing_class=tokenizer)
    dropouts = {m.p for path, m in adapted.named_modules() if path.endswith("lora_dropout.default")}
    assert dropouts == {0.4}
    assert {m.attention_dropout for m in adapted.modules() if hasattr(m, "attention_dropout")} == {
        0.0
    }
    with pytest.raises(InvalidRequestError, match="has an adapter already"):
        DARTrainer(adapted, config(), prompts, reward, processing_class=tokenizer, peft_config=peft)


def test_conversations_are_trained_on_and_reach_the_reward_as_messages(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    seen: list[Any] = []

    def score(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        seen.append((prompts[0], completions[0]))
        return [float(len(completion[0]["content"])) for completion in completions]

    rows = [{"prompt": [{"role": "user", "content": f"w{i}"}]} for i in (10, 20, 30)]
    train(train_dataset=rows, reward_funcs=score, sink=sink)
    prompt, completion = seen[0]
    assert prompt in [row["prompt"] for row in rows]
    assert completion[0]["role"] == "assistant"
    assert sink.shown[1][0].prompt.startswith("<bos> w10 ")
