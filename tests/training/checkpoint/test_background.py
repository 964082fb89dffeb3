"""Checkpoints of jobs are finished in the background, one at a time, and never lost silently."""

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dar.training import DARConfig, DARTrainer
from dar.training.checkpoint import checkpoint
from dar.training.checkpoint.checkpoint import verify
from fakes.recording_sink import RecordingSink, ScriptedControl

SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1}


@pytest.fixture
def args(config: Callable[..., DARConfig]) -> DARConfig:
    made = config(**SAVING)
    made.saves_in_background = True
    return made


def test_training_goes_on_while_one_checkpoint_is_finished(
    train: Callable[..., DARTrainer],
    args: DARConfig,
    sink: RecordingSink,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    next_step_is_done, running, most = threading.Event(), [0], [0]
    complete, metrics = checkpoint.complete, sink.metrics

    def slow(staged: Path, step: int, manifest: Any) -> checkpoint.Published:
        running[0] += 1
        most[0] = max(most[0], running[0])
        if step == 1:
            assert next_step_is_done.wait(30), "training waits for the checkpoint"
        running[0] -= 1
        return complete(staged, step, manifest)

    def note(step: int, values: Any) -> None:
        metrics(step, values)
        if step == 2:
            next_step_is_done.set()

    monkeypatch.setattr(checkpoint, "complete", slow)
    monkeypatch.setattr(sink, "metrics", note)
    train(args=args, sink=sink)
    assert most == [1]
    assert [step for step, *_ in sink.published] == [1, 2, 3, 4]
    for step, folder, manifest, _ in sink.published:
        assert verify(folder) == manifest
        assert (manifest.step, manifest.metrics) == (step, sink.reports[step])


@pytest.mark.parametrize("failing", [1, 4])
def test_a_checkpoint_that_cannot_be_written_ends_the_attempt(
    train: Callable[..., DARTrainer],
    args: DARConfig,
    sink: RecordingSink,
    monkeypatch: pytest.MonkeyPatch,
    failing: int,
) -> None:
    complete = checkpoint.complete

    def full(staged: Path, step: int, manifest: Any) -> checkpoint.Published:
        if step == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return complete(staged, step, manifest)

    monkeypatch.setattr(checkpoint, "complete", full)
    with pytest.raises(OSError, match="No space left"):
        train(args=args, sink=sink)
    assert [step for step, *_ in sink.published] == list(range(1, failing))
    assert len(sink.reports) <= failing + 1


@pytest.mark.parametrize("request_", ["drain", "cancel"])
def test_a_drain_waits_for_the_checkpoint_and_a_cancellation_does_not(
    train: Callable[..., DARTrainer],
    args: DARConfig,
    sink: RecordingSink,
    monkeypatch: pytest.MonkeyPatch,
    request_: Any,
) -> None:
    may_end = threading.Event()
    complete = checkpoint.complete

    def slow(staged: Path, step: int, manifest: Any) -> checkpoint.Published:
        assert may_end.wait(30)
        return complete(staged, step, manifest)

    monkeypatch.setattr(checkpoint, "complete", slow)
    if request_ == "drain":
        threading.Timer(0.5, may_end.set).start()
    control = ScriptedControl(request_, after=lambda: len(sink.reports) >= 1)
    trainer = train(args=args, sink=sink, control=control)
    assert trainer.stopped_by == request_
    published = [step for step, *_ in sink.published]
    assert published == ([] if request_ == "cancel" else list(range(1, len(sink.reports) + 1)))
    may_end.set()
