"""Which rows the steps of a run take, and what is reported of a batch that they do not fill."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from dar.errors import InvalidRequestError
from dar.protocol.spec import Hyperparameters, StepPlan, total_steps
from dar.training import DARTrainer
from dar.training.sampling.prompts import PromptOrder
from fakes.recording_sink import RecordingSink

ROWS = [{"prompt": f"w{4 + i}"} for i in range(12)]
LENGTHS = [(1, 8), (2, 8), (1, 500), (2.5, 500), (0.5, 8), (0.01, 3), (7, 5), (3, 12), (2, 11)]


def lengths(completions: list[str], **_: Any) -> list[float]:
    return [float(i) for i in range(len(completions))]


@pytest.mark.parametrize(("epochs", "batch"), LENGTHS)
def test_a_length_in_passes_is_never_exceeded_and_no_step_takes_a_row_twice(
    epochs: float, batch: int
) -> None:
    for rows, seed in itertools.product((1, 2, 12), range(5)):
        plan = StepPlan.of(rows, batch, epochs)
        order = PromptOrder(rows, seed, plan.per_step)
        steps = [[order.row(p) for p in plan.positions(n + 1)] for n in range(plan.steps)]
        assert all(len(set(step)) == len(step) for step in steps)
        taken = [row for step in steps for row in step]
        assert len(taken) == max(1, int(epochs * rows))
        for epoch in range(int(epochs)):  # every pass takes every row
            assert sorted(taken[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
        hyper = Hyperparameters(n_epochs=epochs, batch_size=batch)
        assert total_steps(hyper, rows) == plan.steps
        again = PromptOrder(rows, seed, plan.per_step)  # as after a resume in the last step
        assert [again.row(p) for p in plan.positions(plan.steps)] == steps[-1]


@pytest.mark.parametrize(("epochs", "batch"), LENGTHS)
def test_processes_share_every_step_evenly_and_leave_out_what_they_cannot_share(
    epochs: float, batch: int
) -> None:
    plan = StepPlan.of(12, batch // 4 * 4 or 4, epochs, chunk=4)
    counts = [len(plan.positions(n + 1)) for n in range(plan.steps)]
    assert all(count > 0 and count % 4 == 0 for count in counts)
    assert sum(counts) == max(4, int(epochs * 12) // 4 * 4)


def events_of(sink: RecordingSink) -> dict[str, tuple[str, str]]:
    return {data["kind"]: (level, message) for level, message, data in sink.events if data}


def test_a_batch_beyond_the_rows_takes_each_of_them_once_and_is_reported(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    seen: list[list[str]] = []

    def score(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        seen.append(prompts)
        return lengths(completions)

    settings = {"max_steps": -1, "per_device_train_batch_size": 500}
    trainer = train(train_dataset=ROWS, reward_funcs=score, sink=sink, settings=settings)
    assert (trainer.state.global_step, trainer.state.epoch) == (1, 1)
    assert sorted(itertools.chain(*seen)) == sorted([row["prompt"] for row in ROWS] * 4)
    level, message = events_of(sink)["batch_exceeds_rows"]
    assert level == "warn"
    assert "the batch size is 500, but the data set has 12 rows" in message


def test_the_last_step_takes_the_prompts_that_are_left(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    settings = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 10}
    trainer = train(train_dataset=ROWS, reward_funcs=lengths, sink=sink, settings=settings)
    assert (trainer.state.global_step, trainer.state.epoch) == (3, 2)
    level, message = events_of(sink)["last_step"]
    assert (level, message) == (
        "info",
        "24 prompts in steps of 10: the last step takes the 4 that are left",
    )


def test_a_length_in_steps_is_kept_and_its_passes_are_reported(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    settings = {"max_steps": 2, "per_device_train_batch_size": 30}
    trainer = train(train_dataset=ROWS, reward_funcs=lengths, sink=sink, settings=settings)
    assert (trainer.state.global_step, trainer.state.epoch) == (2, 5)
    assert "makes 5 passes" in events_of(sink)["batch_exceeds_rows"][1]


def test_offline_rows_are_never_compared_with_their_own_copies(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    row = {"prompt": "w10", "completion": "w4", "reward": 1.0}
    settings = {"max_steps": 3, "per_device_train_batch_size": 8}
    with pytest.raises(InvalidRequestError, match="no completion has another one"):
        train(train_dataset=[row], reward_funcs=None, sink=sink, settings=settings)
    rows = [row, {"prompt": "w11", "completion": "w5", "reward": 0.0}]
    trainer = train(train_dataset=rows, reward_funcs=None, sink=sink, settings=settings)
    assert trainer.state.epoch == 3
    only = {"dar_k": 1, "max_steps": -1, "per_device_train_batch_size": 8}
    with pytest.raises(InvalidRequestError, match="dar_k"):
        train(train_dataset=ROWS[:1], reward_funcs=lengths, settings=only)
