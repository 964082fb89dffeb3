"""Tokens beyond the embeddings of a model, its reference or a reward model, from wherever they
come.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from dar.errors import InvalidRequestError, RewardMisconfiguredError
from dar.training import DARTrainer
from fakes import tiny_models
from fakes.recording_sink import RecordingSink

ROW = {"prompt": "w10", "completions": ["w4", "w5"], "rewards": [1, 0]}


def preference(chosen: str) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": "w4"}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": "w5"}],
    }


@pytest.fixture
def enlarged(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """With a token that no model of these tests has."""
    made = copy.deepcopy(tokenizer)
    made.add_tokens(["<new>"])
    return made


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([ROW, ROW | {"prompt": "w10 <new>"}], "a prompt"),
        ([ROW, ROW | {"completions": ["w4 <new>", "w5"]}], "a completion"),
        ([preference("w6"), preference("w6 <new>")], "a completion"),
    ],
    ids=["prompt", "completion", "conversation"],
)
def test_a_stored_token_that_the_model_lacks_is_refused_at_the_start(
    rows: list[dict[str, Any]],
    what: str,
    train: Callable[..., DARTrainer],
    enlarged: PreTrainedTokenizerBase,
    sink: RecordingSink,
) -> None:
    with pytest.raises(InvalidRequestError, match=f"row 2: {what} has token 64") as caught:
        train(train_dataset=rows, reward_funcs=None, processing_class=enlarged, sink=sink)
    assert caught.value.param == "training_file"
    assert sink.phases == []


def test_an_end_that_the_model_lacks_is_refused_at_the_start(
    train: Callable[..., DARTrainer],
    tokenizer: PreTrainedTokenizerBase,
    make_model: Callable[..., LlamaForCausalLM],
) -> None:
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    model = make_model()
    model.config.eos_token_id = model.generation_config.eos_token_id = 70
    with pytest.raises(InvalidRequestError, match="row 1: a completion has token 70"):
        train(model=model, train_dataset=[ROW], reward_funcs=None, processing_class=endless)


def test_rows_without_the_further_token_are_trained_on(
    train: Callable[..., DARTrainer], enlarged: PreTrainedTokenizerBase
) -> None:
    settings = {"max_steps": 1}
    train(train_dataset=[ROW], reward_funcs=None, processing_class=enlarged, settings=settings)


def test_a_reward_model_with_the_tokenizer_of_another_is_refused(
    train: Callable[..., DARTrainer], tokenizer: PreTrainedTokenizerBase
) -> None:
    judge = tiny_models.judge(vocab_size=50)
    with pytest.raises(InvalidRequestError, match="tokens 0 to 49 only, but its tokenizer has"):
        train(reward_funcs=None, reward_model=judge, reward_processing_class=tokenizer)


def test_a_reward_model_without_its_padding_token_is_refused(
    train: Callable[..., DARTrainer], tokenizer: PreTrainedTokenizerBase
) -> None:
    judge = tiny_models.judge()
    judge.config.pad_token_id = 64
    with pytest.raises(InvalidRequestError, match="pad_token_id of its config is 64"):
        train(reward_funcs=None, reward_model=judge, reward_processing_class=tokenizer)


def test_a_text_with_a_token_that_the_reward_model_lacks_ends_the_run(
    train: Callable[..., DARTrainer],
    enlarged: PreTrainedTokenizerBase,
    make_model: Callable[..., LlamaForCausalLM],
) -> None:
    with pytest.raises(RewardMisconfiguredError, match="has put token 64 into a text"):
        train(
            model=make_model(vocab_size=65),
            processing_class=enlarged,
            train_dataset=[{"prompt": "w10 <new>"}, {"prompt": "w11"}],
            reward_funcs=None,
            reward_model=tiny_models.judge(),
            reward_processing_class=enlarged,
        )


def test_a_reference_reads_every_token_that_the_policy_may_write(
    train: Callable[..., DARTrainer],
    make_model: Callable[..., LlamaForCausalLM],
) -> None:
    with pytest.raises(InvalidRequestError, match="ref_model has tokens 0 to 49 only") as caught:
        train(ref_model=make_model(vocab_size=50, eos_token_id=3))
    assert caught.value.param == "ref_model"
    # padding that no tokenizer uses may differ
    train(model=make_model(vocab_size=70), ref_model=make_model(), settings={"max_steps": 1})
    row = {"prompt": "w10", "completion_ids": [[4], [66]], "rewards": [1, 0]}
    with pytest.raises(InvalidRequestError, match=r"row 1: .*token ids from 0 to 63"):
        train(
            model=make_model(vocab_size=70),
            ref_model=make_model(),
            train_dataset=[row],
            reward_funcs=None,
        )


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_reference_shares_no_weight_that_is_trained(
    train: Callable[..., DARTrainer], make_model: Callable[..., LlamaForCausalLM]
) -> None:
    model = make_model()
    with pytest.raises(InvalidRequestError, match="shares weights with the model"):
        train(model=model, ref_model=model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(InvalidRequestError, match="shares weights with the model"):
        train(model=adapted, ref_model=model)
