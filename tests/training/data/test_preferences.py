"""Pairs that say nothing are refused by the rules of rows, which uploads and the trainer share."""

from collections.abc import Callable
from typing import Any

import pytest

from dar.errors import InvalidRequestError
from dar.training import DARTrainer

PAIR = {"prompt": "w10", "chosen": "w4", "rejected": "w5"}
ASK = {"role": "user", "content": "w10"}


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


USELESS = [
    ({"prompt": "w10", "chosen": "w4", "rejected": "w4"}, "the same"),
    ({"chosen": "w10 w4", "rejected": "w10 w4"}, "the same"),
    ({"prompt": [ASK], "chosen": [said("w4")], "rejected": [said("w4")]}, "the same"),
    ({"prompt": [ASK], "chosen": [said("w4", name=None)], "rejected": [said("w4")]}, "the same"),
    ({"chosen": [ASK, said("w4")], "rejected": [ASK, said("w4")]}, "the same"),
    ({"prompt": "w10", "chosen": "", "rejected": "w4"}, "chosen is empty"),
    ({"prompt": "w10", "chosen": "w4", "rejected": ""}, "rejected is empty"),
    ({"prompt": [ASK], "chosen": "w4", "rejected": ""}, "rejected is empty"),
    ({"prompt": [ASK], "chosen": [said("")], "rejected": [said("w4")]}, "a text that is not empty"),
]


@pytest.mark.parametrize(("row", "message"), USELESS)
def test_equal_and_empty_pairs_are_refused_before_the_first_step(
    train: Callable[..., DARTrainer], row: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=f"row 2: .*{message}"):
        train(train_dataset=[PAIR, row], reward_funcs=None)
