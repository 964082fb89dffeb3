"""What would have no effect, or cannot work, is said before anything is trained."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from dar.errors import InvalidRequestError
from dar.training import DARTrainer

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


def test_a_reference_that_has_no_part_is_refused(
    train: Callable[..., DARTrainer], make_model: Callable[..., LlamaForCausalLM]
) -> None:
    with pytest.raises(InvalidRequestError, match="no effect with alpha=0") as refused:
        train(ref_model=make_model(), settings={"alpha": 0.0})
    assert refused.value.param == "ref_model"


def test_an_empty_prompt_is_named_before_the_first_step(
    train: Callable[..., DARTrainer],
    sink: Any,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = None
    rows = [{"prompt": "w10"}] * 7 + [{"prompt": ""}]
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
    train: Callable[..., DARTrainer], sink: Any, behavior: str, temperature: float, is_told: bool
) -> None:
    settings = {"alpha": 0.1, "beta": 0.3, "behavior": behavior, "temperature": temperature}
    train(sink=sink, settings={**settings, "max_steps": 1})
    kinds = [data["kind"] for _, _, data in sink.events if data]
    assert ("no_point_of_rest" in kinds) == is_told
