"""What would have no effect, or cannot work, is said before anything is trained."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, SchedulerType
from transformers.training_args import OptimizerNames

from dar.errors import InvalidRequestError, TrainingError
from dar.protocol.reward_spec import Rewards
from dar.training import DARConfig, DARTrainer, NullSink
from dar.training.data.rows import PromptEncoder
from dar.training.sampling.prompts import PromptStream
from dar.training.script.flags import read_command_line
from dar.training.step.offline import RowEncoder
from fakes.recording_sink import RecordingSink

STORED = {"prompt": "w10", "completions": ["w20", "w21"], "rewards": [1.0, 0.0]}


@pytest.mark.parametrize(
    "rows",
    [Dataset.from_list([{"prompt": "w10"}]).to_iterable_dataset(), iter([{"prompt": "w10"}])],
)
def test_a_data_set_without_a_length_is_refused_in_words(
    train: Callable[..., DARTrainer], rows: Any
) -> None:
    with pytest.raises(InvalidRequestError, match="load it without streaming"):
        train(train_dataset=rows)


def test_weights_of_rewards_that_are_not_there_are_refused(
    train: Callable[..., DARTrainer],
) -> None:
    with pytest.raises(InvalidRequestError, match="there is no reward") as refused:
        train(train_dataset=[STORED], reward_funcs=None, reward_weights=[2.0])
    assert refused.value.param == "reward_weights"


def test_weights_beside_those_of_a_job_spec_are_refused(train: Callable[..., DARTrainer]) -> None:
    component = {"name": "r", "url": "http://127.0.0.1:9/score"}
    rewards = Rewards.model_validate({"components": [component]})
    with pytest.raises(InvalidRequestError, match="brings its own weights") as refused:
        train(reward_funcs=rewards, reward_weights=[2.0])
    assert refused.value.param == "reward_weights"


def test_every_optimizer_and_schedule_is_made_or_refused_by_name(
    make_model: Callable[..., LlamaForCausalLM],
    config: Callable[..., DARConfig],
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[dict[str, Any]],
    reward: Callable[..., list[float]],
) -> None:
    refused, named = {}, []
    for param, names in (("optim", OptimizerNames), ("lr_scheduler_type", SchedulerType)):
        for name in names:
            trainer = DARTrainer(
                make_model(), config(), prompts, reward, processing_class=tokenizer
            )
            setattr(trainer.args, param, name)
            try:
                trainer.create_optimizer()
                trainer.create_scheduler(3, trainer.optimizer)
            except TrainingError as error:
                refused[name.value] = error
                named.append(error.param == param and f"{param} {name.value}" in error.message)
    assert all(named)
    assert "bitsandbytes" in refused["adamw_8bit"].message
    assert refused.keys().isdisjoint({"adamw_torch", "sgd", "adafactor", "linear", "cosine"})


@pytest.mark.parametrize("weight", [float("nan"), -1e7, "1", None, 1j])
def test_a_weight_of_a_reward_is_a_number_of_ordinary_size(
    train: Callable[..., DARTrainer], weight: Any
) -> None:
    with pytest.raises(InvalidRequestError, match="but must be a list of numbers") as refused:
        train(reward_weights=[weight])
    assert refused.value.param == "reward_weights"


def test_data_for_evaluation_may_serve_its_start_alone() -> None:
    names = ("model_name_or_path", "dataset_name", "output_dir", "eval_dataset_name")
    line = read_command_line([*(f"--{name}=x" for name in names), "--eval_on_start"])
    assert line.script.eval_dataset_name == "x"


def test_a_reference_that_has_no_part_is_refused(
    train: Callable[..., DARTrainer], make_model: Callable[..., LlamaForCausalLM]
) -> None:
    with pytest.raises(InvalidRequestError, match="no effect with alpha=0") as refused:
        train(ref_model=make_model(), settings={"alpha": 0.0})
    assert refused.value.param == "ref_model"


# peft 0.19 asks transformers 5.23 for a property that is being renamed
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_a_model_whose_weights_are_all_frozen_is_refused(
    train: Callable[..., DARTrainer],
    make_model: Callable[..., LlamaForCausalLM],
    sink: RecordingSink,
    tmp_path: Path,
    kind: str,
) -> None:
    model: Any = make_model().requires_grad_(False)
    if kind == "adapter":
        lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        get_peft_model(make_model(), lora).save_pretrained(tmp_path / "adapter")
        model = PeftModel.from_pretrained(make_model(), str(tmp_path / "adapter"))
    with pytest.raises(InvalidRequestError, match=f"every weight of the {kind} is frozen"):
        train(model=model, sink=sink)
    assert sink.phases == []


def test_a_prompt_without_tokens_is_named_before_the_first_step(
    train: Callable[..., DARTrainer],
    sink: RecordingSink,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = None
    rows = [{"prompt": "w10"}] * 7 + [{"prompt": " "}]
    with pytest.raises(InvalidRequestError, match=r"row 8: .*no tokens"):
        train(train_dataset=rows, sink=sink, processing_class=tokenizer)
    assert sink.phases == []


@pytest.mark.parametrize(
    ("behavior", "temperature", "is_told"),
    [
        ("sampled", 0.75, True),
        ("sampled", 0.76, False),
        ("policy", 0.8, True),
        ("policy", 0.81, False),
    ],
)
def test_a_temperature_at_which_training_never_rests_is_told(
    train: Callable[..., DARTrainer],
    sink: RecordingSink,
    behavior: str,
    temperature: float,
    is_told: bool,
) -> None:
    settings = {"alpha": 0.1, "beta": 0.3, "behavior": behavior, "temperature": temperature}
    train(sink=sink, settings={**settings, "max_steps": 1})
    kinds = [data["kind"] for _, _, data in sink.events if data]
    assert ("no_point_of_rest" in kinds) == is_told


@pytest.mark.parametrize("is_offline", [False, True])
def test_conversations_are_tried_without_making_tokens_of_them(
    config: Callable[..., DARConfig], tokenizer: PreTrainedTokenizerBase, is_offline: bool
) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    asked = {"prompt": [{"role": "user", "content": "w10"}]}
    answered = asked | {"completion": [{"role": "assistant", "content": "w11"}], "reward": 1.0}
    tokenized: list[str] = []

    class Counting(RowEncoder if is_offline else PromptEncoder):  # type: ignore[misc]  # a mixin of either
        def bare(self, text: str) -> list[int]:
            tokenized.append(text)
            return super().bare(text)

    limits: dict[str, Any] = {"longest": 64, "vocabulary": 64, "eos_ids": {3}} if is_offline else {}
    row = answered if is_offline else asked
    encoder = Counting(tokenizer, 64, **limits)
    PromptStream([row] * 5, encoder, config(), NullSink()).try_rows()
    assert tokenized == []
    encoder(row)
    assert tokenized
    system = {"role": "system", "content": "w5"}
    tokenizer.chat_template = "{{ raise_exception('no system') if messages[0].role == 'system' }}w4"
    bad = row | {"prompt": [system, *asked["prompt"]]}
    stream = PromptStream([row, bad], encoder, config(), NullSink())
    with pytest.raises(InvalidRequestError, match=r"row 2: .*no system"):
        stream.try_rows()


def test_a_conversation_that_loses_turns_is_tried_as_it_is_cut(
    config: Callable[..., DARConfig], tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{{ raise_exception('too few') if messages | length < 3 }}"
        "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    )
    turns = ["w10 w11 w12 w13", "w14 w15 w16 w17", "w18 w19 w20 w21"]
    roles = ["user", "assistant", "user"]
    messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=True)]
    stream = PromptStream([{"prompt": messages}], PromptEncoder(tokenizer, 8), config(), NullSink())
    with pytest.raises(InvalidRequestError, match=r"row 1: .*too few"):
        stream.try_rows()
