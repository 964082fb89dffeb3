"""Steps from whose rewards nothing can be learned, as a user of the trainer meets them."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from dar.errors import InvalidRequestError, TrainingError
from dar.training import DARTrainer
from fakes.recording_sink import RecordingSink

Score = Callable[..., Sequence[float | None]]
FEW_STEPS = 3


def constant(completions: list[str], **_: Any) -> list[float]:
    return [0.5] * len(completions)


def of_the_prompt(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    return [float(len(prompt)) for prompt in prompts]


def skip(completions: list[str], **_: Any) -> list[None]:
    return [None] * len(completions)


def lengths(completions: list[str], **_: Any) -> list[float]:
    return [float(i) for i in range(len(completions))]


def warnings_of(sink: RecordingSink, kind: str) -> list[tuple[str, dict[str, Any]]]:
    return [
        (message, dict(data))
        for level, message, data in sink.events
        if level == "warn" and data is not None and data["kind"] == kind
    ]


@pytest.mark.parametrize("steps", [1, 2, FEW_STEPS, 6])
@pytest.mark.parametrize("score", [constant, of_the_prompt])
def test_a_reward_that_is_the_same_for_all_completions_of_a_prompt_is_reported_once(
    train: Callable[..., DARTrainer], sink: RecordingSink, score: Score, steps: int
) -> None:
    train(sink=sink, reward_funcs=score, settings={"max_steps": steps})
    ((message, data),) = warnings_of(sink, "constant_steps")
    assert data["step"] == min(steps, FEW_STEPS)
    assert data["components"] == [score.__name__]
    assert score.__name__ in message
    assert len(data["prompts"]) == 2
    assert all(repr(prompt) in message for prompt in data["prompts"])
    assert (data["fitting_alpha_plus_beta"], data["learning_rate"] > 0) == (None, True)
    assert (data["reward_std"] > 0) == (score is of_the_prompt)
    said = (f"std(reward) is {data['reward_std']:.3g}", "no alpha + beta would fit")
    assert all(part in message for part in (*said, "the learning rate is "))


def test_only_the_component_that_is_constant_is_named(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    train(sink=sink, reward_funcs=[constant, lengths], settings={"max_steps": 4})
    assert warnings_of(sink, "constant_steps") == []  # the sum differs, so there is a signal
    train(
        sink=sink,
        reward_funcs=[constant, lengths],
        reward_weights=[1, 0],
        settings={"max_steps": 4},
    )
    ((_, data),) = warnings_of(sink, "constant_steps")
    assert data["components"] == ["constant"]


def test_a_constant_reward_is_reported_once_although_the_run_is_interrupted(
    train: Callable[..., DARTrainer], new_sink: type[RecordingSink]
) -> None:
    first, second = new_sink(), new_sink()
    settings = {"max_steps": 5, "save_steps": 1, "save_strategy": "steps"}
    trainer = train(sink=first, reward_funcs=constant, settings=settings)
    for step, count in ((1, 1), (4, 0)):
        second.events.clear()
        resume = trainer.checkpoints / f"step-{step}"
        train(resume=resume, sink=second, reward_funcs=constant, settings=settings)
        assert len(warnings_of(second, "constant_steps")) == count


def test_a_tolerance_that_hides_all_differences_is_named_with_what_would_fit(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    settings = {"max_steps": 4, "tie_tolerance": 9.0}
    train(sink=sink, reward_funcs=lengths, settings=settings)
    ((message, data),) = warnings_of(sink, "constant_steps")
    assert "lower tie_tolerance, which is 9; without it, alpha + beta = 1.1 would fit" in message
    assert data["fitting_alpha_plus_beta"] == pytest.approx(1.118, rel=1e-3)


def test_completions_that_are_all_the_same_text_are_named_as_the_cause(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    settings = {"max_steps": 4, "temperature": 1e-3, "top_k": 1}
    train(sink=sink, settings=settings)
    ((message, _),) = warnings_of(sink, "constant_steps")
    assert "the completions of a prompt are all the same text" in message


def test_completions_that_are_all_cut_off_are_reported_once(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    train(sink=sink, reward_funcs=lengths, settings={"max_steps": 5, "max_new_tokens": 1})
    ((message, data),) = warnings_of(sink, "truncated_steps")
    assert data["step"] == FEW_STEPS
    assert "max_new_tokens" in message


def test_a_component_that_skips_everything_is_named_although_others_give_rewards(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    train(sink=sink, reward_funcs=[lengths, skip], settings={"max_steps": 5})
    ((message, data),) = warnings_of(sink, "skipped_steps")
    assert (data["step"], data["components"]) == (FEW_STEPS, ["skip"])
    assert "skip skipped every completion" in message


def test_a_reward_with_differences_is_not_reported(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    train(sink=sink, reward_funcs=lengths, settings={"max_steps": 5})
    assert {data["kind"] for _, _, data in sink.events if data} <= {"truncated_steps"}


# --- a run in which nothing was trained ----------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_run_without_a_usable_reward_fails_however_short_it_is(
    train: Callable[..., DARTrainer], sink: RecordingSink, steps: int
) -> None:
    with pytest.raises(TrainingError, match="look at what the reward source returns") as raised:
        train(sink=sink, reward_funcs=skip, settings={"max_steps": steps})
    assert raised.value.error_code == "no_rewards"
    assert steps not in [step for step, *_ in sink.published]


def test_a_run_of_ties_that_are_all_dropped_fails_too(train: Callable[..., DARTrainer]) -> None:
    with pytest.raises(TrainingError, match="drop_ties leaves such prompts out"):
        train(reward_funcs=constant, settings={"max_steps": 4, "drop_ties": True})


def test_one_step_with_rewards_is_enough_to_succeed(train: Callable[..., DARTrainer]) -> None:
    calls: list[int] = []

    def once(completions: list[str], **_: Any) -> list[float | None]:
        calls.append(1)
        return lengths(completions) if len(calls) == 1 else [None] * len(completions)

    assert train(reward_funcs=once, settings={"max_steps": 3}).state.global_step == 3


def test_a_resumed_run_remembers_that_it_has_trained(train: Callable[..., DARTrainer]) -> None:
    settings = {"max_steps": 3, "save_steps": 1, "save_strategy": "steps"}
    answers: list[Score] = [lengths]

    def score(completions: list[str], **_: Any) -> Sequence[float | None]:
        return answers[0](completions)

    folder = train(reward_funcs=score, settings=settings).checkpoints / "step-2"
    answers[0] = skip
    assert train(resume=folder, reward_funcs=score, settings=settings).state.global_step == 3


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ([[None, None], [None, None]], "every reward is null"),
        ([None, None], "every reward is null"),
        ([[float("nan"), None], [None, None]], "every reward is null"),
        ([[1.0, None], [None, 0.5]], "no completion has another one to be compared with"),
    ],
)
def test_offline_rewards_that_cannot_be_compared_are_refused_before_the_first_step(
    train: Callable[..., DARTrainer], sink: RecordingSink, rewards: list[Any], said: str
) -> None:
    rows = [{"prompt": "w10", "completions": ["w4", "w5"], "rewards": one} for one in rewards]
    with pytest.raises(InvalidRequestError, match=said) as raised:
        train(train_dataset=rows, reward_funcs=None, sink=sink, settings={"max_steps": 2})
    assert raised.value.error_code == "no_rewards"
    assert "service" not in raised.value.message
    assert sink.phases == []
