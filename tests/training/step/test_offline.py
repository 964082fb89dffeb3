from collections.abc import Callable
from typing import Any

import pytest

from dar.errors import InvalidRequestError
from dar.training import DARTrainer
from fakes.recording_sink import RecordingSink


def test_stored_behavior_log_probabilities_are_used(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    row = {
        "prompt": "w10",
        "completion_ids": [[4], [5]],
        "rewards": [1.0, None],
        "behavior_logps": [-7.0, -9.0],
    }
    rows = [row, row | {"rewards": [1.0, 0.0]}]
    settings = {"dar_k": 2, "max_steps": 1, "per_device_train_batch_size": 2}
    train(train_dataset=rows, reward_funcs=None, sink=sink, settings=settings)
    assert sink.reports[1]["dar/logps_behavior"] == -8
    assert sink.reports[1]["rewards/missing_fraction"] == 0.25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": [2, 64]}, "token ids from 0 to 63"),
        ({"prompt_ids": [-1]}, "token ids from 0 up"),
        ({"completion_ids": [[4], [99]]}, "token ids from 0 to 63"),
        ({"completion_ids": [[4], ["w5"]]}, "token ids from 0 up"),
        ({"completion_ids": [[4], []]}, "0 tokens"),
        ({"completion_ids": [[4], [5] * 128]}, "128 tokens, but must have at least 1 and fewer"),
        ({"rewards": ["1.0", "0.0"]}, "rewards must be numbers or null"),
        ({"rewards": 1.0}, "needs 2 rewards"),
        ({"behavior_logps": [-1.0, None]}, "behavior_logps must be finite numbers"),
    ],
)
def test_rows_that_cannot_be_replayed_are_refused_by_number(
    train: Callable[..., DARTrainer], sink: RecordingSink, change: dict[str, Any], message: str
) -> None:
    row = {"prompt": "w10", "completion_ids": [[4], [5]], "rewards": [1.0, 0.0]}
    with pytest.raises(InvalidRequestError, match=f"row 2: .*{message}"):
        train(
            train_dataset=[row, row | change], reward_funcs=None, sink=sink, settings={"dar_k": 2}
        )
    assert sink.phases == []


def test_stored_completions_count_against_the_context_and_max_new_tokens_does_not(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    row = {"prompt": "w10 w20", "completion_ids": [[4] * 126, [5]], "rewards": [1.0, 0.0]}
    settings = {"dar_k": 2, "max_steps": 1, "max_new_tokens": 500, "max_length": 4096}
    train(train_dataset=[row], reward_funcs=None, sink=sink, settings=settings)
    (cut,) = [data for _, _, data in sink.events if data["kind"] == "prompt_cut"]
    assert cut["cut_tokens"] == 1
