from collections.abc import Callable
from typing import Any

import pytest

from dar.training import DARTrainer


def test_a_script_without_a_sink_sees_warnings_in_its_log(
    train: Callable[..., DARTrainer], caplog: pytest.LogCaptureFixture
) -> None:
    def constant(completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    train(reward_funcs=constant, settings={"max_steps": 3, "max_new_tokens": 30})
    (record,) = [one for one in caplog.records if one.name == "dar.training.report.sink"]
    assert record.levelname == "WARNING"
    assert "reward component constant gave all completions of a prompt" in record.message
