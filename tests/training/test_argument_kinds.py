"""Arguments of `DARTrainer` of another kind than its annotations say."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from transformers import LlamaForCausalLM

from dar.errors import InvalidRequestError
from dar.training import DARTrainer
from dar.training.argument_kinds import SEVERAL, SINGLE


def test_a_model_may_be_a_path(train: Callable[..., DARTrainer], base: Path) -> None:
    trainer = train(model=base, processing_class=None, settings={"max_steps": 1})
    assert trainer.state.global_step == 1


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("model", {"a": 1}, "model has dict {'a': 1}, but must be a folder, a hub id"),
        ("args", {"max_steps": 1}, "args has dict {'max_steps': 1}, but must be a DARConfig"),
        ("peft_config", {}, "but must be a config of peft, such as LoraConfig"),
        ("processing_class", "gpt2", "but must be a tokenizer of transformers"),
        ("ref_model", "gpt2", "load it with AutoModelForCausalLM.from_pretrained"),
        ("compute_metrics", 5, "compute_metrics has int 5, but must be a function"),
        (
            "reward_funcs",
            {"components": []},
            "of which dar.protocol.reward_spec.Rewards.model_validate",
        ),
        ("reward_funcs", 5, "reward_funcs has int 5, but must be a function, a URL"),
        ("reward_funcs", [None], "reward_funcs has NoneType None"),
        ("reward_model", [5], "reward_model has int 5"),
        ("reward_processing_class", "gpt2", "reward_processing_class has str 'gpt2'"),
        ("reward_weights", 1.0, "reward_weights has 1.0"),
        ("train_dataset", "rows.jsonl", "the text or path 'rows.jsonl'; load it first"),
        ("train_dataset", Path("rows.jsonl"), "the text or path 'rows.jsonl'; load it first"),
        ("train_dataset", pd.DataFrame({"prompt": ["w4"]}), "Dataset.from_pandas"),
        ("train_dataset", {1, 2}, "data of the type set cannot be read by the number of a row"),
        ("train_dataset", ["w4"], "row 1: "),
    ],
)
def test_an_argument_of_another_kind_is_refused_by_name(
    train: Callable[..., DARTrainer], name: str, value: Any, said: str
) -> None:
    arguments = {} if name != "reward_model" else {"reward_funcs": None}
    with pytest.raises(InvalidRequestError) as refused:
        train(**arguments | {name: value})
    assert said in refused.value.message
    assert refused.value.param == ("training_file" if name == "train_dataset" else name)


def test_a_missing_model_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="model has NoneType None"):
        DARTrainer(None, train_dataset=[{"prompt": "w4"}])  # type: ignore[arg-type]  # that is the test


@pytest.mark.parametrize("stop", [[1], [b"a"], [None], ["a", ""], "a"], ids=str)
def test_stop_texts_are_texts(train: Callable[..., DARTrainer], stop: Any) -> None:
    with pytest.raises(InvalidRequestError, match="must be a list of strings"):
        train(settings={"stop": stop})


def test_a_model_in_memory_needs_its_tokenizer(
    train: Callable[..., DARTrainer], make_model: Callable[..., LlamaForCausalLM]
) -> None:
    with pytest.raises(InvalidRequestError, match="give its tokenizer as processing_class"):
        train(model=make_model(), processing_class=None)


def test_every_checked_argument_is_one_of_the_trainer() -> None:
    assert {*SINGLE, *SEVERAL} <= inspect.signature(DARTrainer).parameters.keys()
