import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, TrainerCallback

from dar.errors import InvalidRequestError
from dar.protocol import metrics as registry
from dar.rewards.base import RewardContext
from dar.rewards.scoring.scorer import RewardScorer
from dar.training import DARTrainer
from dar.training.checkpoint.checkpoint import verify
from dar.training.data.rows import DataCollatorForDAR, TokenPair
from dar.training.evaluation import Predictions, checked
from dar.training.model.logprobs import all_logps
from fakes.recording_sink import RecordingSink

EVAL = [{"prompt": "w11 w12", "answer": "x"}, {"prompt": "w13", "answer": "y"}]
STORED = [
    {"prompt_ids": [2, 11], "completion_ids": [[5, 3], [6, 7, 3], [8, 3]], "rewards": [1.0, 0.0, None]},
    {"prompt_ids": [2, 12, 13], "completion_ids": [[9, 9, 3], [10, 3]], "rewards": [0.5, 0.25]},
]  # fmt: skip
TRAINED = [
    {"prompt_ids": [2, i], "completion_ids": [[i, 3], [6, i, 3]], "rewards": [1.0, 0.0]}
    for i in range(10, 15)
]
EVERY_SECOND = {"eval_strategy": "steps", "eval_steps": 2}


def weights_of(trainer: DARTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def evaluations(sink: RecordingSink) -> dict[int, dict[str, float]]:
    """What was measured at which step, without wall times."""
    found = {
        step: {n: v for n, v in values.items() if n.startswith("eval_") and "time/" not in n}
        for step, values in sink.reports.items()
    }
    return {step: values for step, values in found.items() if values}


def without_evaluations(reports: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    return {
        step: {name: value for name, value in values.items() if not name.startswith("eval_")}
        for step, values in reports.items()
    }


@pytest.mark.parametrize("logging_steps", [1, 5])
def test_training_with_evaluation_is_bit_identical_to_training_without(
    train: Callable[..., DARTrainer], new_sink: type[RecordingSink], logging_steps: int
) -> None:
    def drawing(completions: list[str], **columns: Any) -> list[float]:
        return [
            random.random() + float(np.random.rand()) + torch.rand(()).item() for _ in completions
        ]

    settings = {"max_steps": 5, "logging_steps": logging_steps}
    peft = LoraConfig(r=2, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM")
    plain, tried = new_sink(), new_sink()
    random.seed(0)
    first = train(sink=plain, settings=settings, reward_funcs=drawing, peft_config=peft)
    random.seed(0)
    second = train(
        sink=tried,
        settings={**settings, **EVERY_SECOND, "eval_on_start": True},
        reward_funcs=drawing,
        peft_config=peft,
        eval_dataset=EVAL,
    )
    assert sorted(evaluations(tried)) == [0, 2, 4, 5]
    assert all(torch.equal(w, weights_of(second)[n]) for n, w in weights_of(first).items())
    ours = without_evaluations(tried.deterministic_reports())
    assert {
        step: values for step, values in ours.items() if values
    } == plain.deterministic_reports()
    assert tried.shown == plain.shown


def test_an_evaluation_reports_what_training_does_and_every_name_is_registered(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    trainer = train(sink=sink, settings=EVERY_SECOND, eval_dataset=EVAL)
    found = evaluations(sink)
    assert sorted(found) == [2, 3]
    expected = {
        "eval_dar/rewards_mean", "eval_dar/rewards_std", "eval_dar/advantages_mean", "eval_dar/advantages_std",
        "eval_dar/weights_mean", "eval_dar/weights_max", "eval_dar/logps_policy", "eval_dar/logps_ref",
        "eval_dar/logps_behavior", "eval_dar/loss", "eval_dar/kl_ref", "eval_dar/entropy",
        "eval_completions/mean_length", "eval_rewards/missing_fraction", "eval_rewards/share_of_w40/mean",
    }  # fmt: skip
    assert found[2].keys() >= expected
    assert all(registry.is_known(name) for name in sink.reports[2])
    logged = [entry for entry in trainer.state.log_history if "eval_dar/loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 3]
    assert logged[0]["eval_dar/loss"] == found[2]["eval_dar/loss"]
    phases = [phase for phase, done, _ in sink.phases if done == 2]
    first = phases.index("evaluating")
    assert phases[first : first + 3] == ["evaluating", "waiting_for_reward", "evaluating"]


def test_evaluations_draw_the_same_numbers_each_time_and_prompts_do_not_disturb_each_other(
    train: Callable[..., DARTrainer],
) -> None:
    seen: list[Predictions] = []

    def keep(found: Predictions) -> dict[str, float]:
        seen.append(found)
        return {}

    trainer = train(settings={"max_steps": 1}, compute_metrics=keep)
    once = trainer.evaluate(EVAL)
    again = trainer.evaluate(EVAL)
    trainer.evaluate([*EVAL, {"prompt": "w50"}])
    times = {name for name in once if "time/" in name}
    assert {n: v for n, v in once.items() if n not in times} == {
        n: v for n, v in again.items() if n not in times
    }
    assert seen[0] == seen[1]
    assert seen[2].completions[:8] == seen[0].completions
    assert seen[0].completions[:4] != seen[0].completions[4:]
    assert len(set(seen[0].completions)) > 4


def test_the_reward_is_asked_in_eval_mode_with_the_steps_done(
    train: Callable[..., DARTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts: list[RewardContext] = []
    plain = RewardScorer.submit

    def submit(self: RewardScorer, samples: Any, context: RewardContext, **more: Any) -> Any:
        contexts.append(context)
        return plain(self, samples, context, **more)

    monkeypatch.setattr(RewardScorer, "submit", submit)
    train(settings={"max_steps": 2, **EVERY_SECOND, "eval_on_start": True}, eval_dataset=EVAL)
    told = [(context.mode, context.step, context.steps_done) for context in contexts]
    assert list(dict.fromkeys(told)) == [
        ("eval", 0, 0),
        ("train", 1, 0),
        ("train", 2, 1),
        ("eval", 2, 2),
    ]


def test_compute_metrics_sees_all_completions_with_their_rewards_and_columns(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    def best_of(found: Predictions) -> dict[str, float]:
        assert found.prompts == ["w11 w12"] * 4 + ["w13"] * 4
        assert found.columns == {"answer": ["x"] * 4 + ["y"] * 4}
        assert found.counts == [4, 4]
        assert len(found.completions) == len(found.rewards) == 8
        best = [max(found.rewards[:4]), max(found.rewards[4:])]
        return {"best_of_4": sum(best) / 2, "eval_seen": np.float64(8), "nothing": float("nan")}

    trainer = train(settings=EVERY_SECOND, eval_dataset=EVAL, compute_metrics=best_of, sink=sink)
    values = trainer.evaluate()
    assert values["eval_seen"] == 8
    assert values["eval_best_of_4"] >= values["eval_dar/rewards_mean"]
    assert "eval_nothing" not in values
    assert "eval_best_of_4" in sink.reports[2]
    with pytest.raises(InvalidRequestError, match="dictionary of numbers") as caught:
        train(settings=EVERY_SECOND, eval_dataset=EVAL, compute_metrics=lambda _: [1.0])
    assert caught.value.param == "compute_metrics"


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ({"a": torch.tensor([1.0, 2.0])}, "must return a dictionary of numbers"),
        ({"a": 10**400}, "must return a dictionary of numbers"),
        ({"a": np.complex64(1j)}, "must return a dictionary of numbers"),
        ({"a": np.timedelta64(3, "ns")}, "must return a dictionary of numbers"),
        ({1: 1.0}, "must return a dictionary of numbers"),
        ({"dar/rewards_mean": 1.0}, "returned 'dar/rewards_mean', but there is a metric of this"),
        ({"eval_dar/rewards_mean": 1.0}, "but there is a metric of this name"),
        ({"eval_a": 1.0, "a": 2.0}, "returned 'a', but there is a metric of this name"),
    ],
)
def test_a_metric_that_is_no_number_or_has_a_taken_name_is_refused(
    returned: dict[Any, Any], said: str
) -> None:
    with pytest.raises(InvalidRequestError, match=said) as caught:
        checked(returned, {"dar/rewards_mean": 0.5})
    assert caught.value.param == "compute_metrics"


def test_several_data_sets_are_told_apart_by_name(train: Callable[..., DARTrainer]) -> None:
    trainer = train(settings=EVERY_SECOND, eval_dataset={"near": EVAL, "far": EVAL[:1]})
    values = trainer.evaluate()
    assert {"eval_near_dar/rewards_mean", "eval_far_dar/rewards_mean"} <= values.keys()
    assert trainer.evaluate(EVAL, metric_key_prefix="test").keys() >= {"test_dar/rewards_mean"}


def test_stored_completions_are_evaluated_as_they_stand(
    train: Callable[..., DARTrainer],
    make_model: Callable[..., LlamaForCausalLM],
    sink: RecordingSink,
) -> None:
    trainer = train(
        train_dataset=TRAINED,
        reward_funcs=None,
        eval_dataset=STORED,
        sink=sink,
        settings={"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True},
    )
    before, after = (evaluations(sink)[step] for step in (0, 2))
    assert before["eval_dar/rewards_mean"] == pytest.approx(1.75 / 4)
    assert before["eval_rewards/missing_fraction"] == pytest.approx(1 / 5)
    scored = [
        TokenPair(row["prompt_ids"], ids)
        for row in STORED
        for ids, reward in zip(row["completion_ids"], row["rewards"], strict=True)
        if reward is not None
    ]
    for model, values in ((make_model(), before), (trainer.model, after)):
        logps_B = all_logps(model, scored, collate=DataCollatorForDAR(), vocabulary=64)
        assert values["eval_dar/logps_policy"] == pytest.approx(logps_B.mean().item(), rel=1e-5)
    assert after["eval_dar/logps_ref"] == pytest.approx(before["eval_dar/logps_ref"], rel=1e-5)
    assert after["eval_dar/logps_policy"] != pytest.approx(
        before["eval_dar/logps_policy"], abs=1e-3
    )


def test_passes_over_the_data_are_followed_by_an_evaluation_and_so_is_the_last_step(
    train: Callable[..., DARTrainer], new_sink: type[RecordingSink]
) -> None:
    # 5 rows and 3 prompts per step: passes end within steps 2, 4 and 5
    by_pass, delayed = new_sink(), new_sink()
    settings = {"max_steps": 6, "eval_strategy": "epoch"}
    train(sink=by_pass, settings=settings, eval_dataset=EVAL)
    assert sorted(evaluations(by_pass)) == [2, 4, 5, 6]
    train(sink=delayed, settings={**settings, "eval_delay": 2}, eval_dataset=EVAL)
    assert sorted(evaluations(delayed)) == [4, 5, 6]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([*EVAL, {"prompt": 5}], "eval_dataset: row 3"),
        ([*EVAL, {"prompt": [{"content": "w4"}]}], "eval_dataset: row 3"),
        ({"near": EVAL, "far": [{"text": "w1"}]}, "eval_dataset 'far': row 1"),
        ([*EVAL, {"prompt": "w4", "completion": "w5", "reward": 1.0}], "eval_dataset: row 3"),
    ],
)
def test_data_that_cannot_be_evaluated_on_fail_before_the_first_step(
    train: Callable[..., DARTrainer], sink: RecordingSink, rows: Any, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        train(sink=sink, settings=EVERY_SECOND, eval_dataset=rows)
    assert caught.value.param == "validation_file"
    assert sink.phases == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [({}, "a dict without a data set"), ({1: EVAL}, "the name 1 for a data set")],
)
def test_a_dict_of_data_sets_has_at_least_one_and_names_that_are_texts(
    train: Callable[..., DARTrainer], sink: RecordingSink, rows: Any, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        train(sink=sink, settings=EVERY_SECOND, eval_dataset=rows)
    assert sink.phases == []


def test_a_conversation_that_the_template_refuses_fails_before_the_first_step(
    train: Callable[..., DARTrainer], tokenizer: PreTrainedTokenizerBase, sink: RecordingSink
) -> None:
    rows = [*EVAL, {"prompt": [{"role": "user", "content": "w4"}]}]
    template = tokenizer.chat_template
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    try:
        with pytest.raises(InvalidRequestError, match="eval_dataset: row 3"):
            train(sink=sink, settings=EVERY_SECOND, eval_dataset=rows)
    finally:
        tokenizer.chat_template = template
    assert sink.phases == []


def test_offline_evaluation_needs_rewards_and_an_evaluation_needs_data(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    offline = {"train_dataset": TRAINED, "reward_funcs": None, "sink": sink}
    for rows in (EVAL, [{"prompt": "w4", "completion": "w5"}]):
        with pytest.raises(InvalidRequestError, match="eval_dataset: row 1"):
            train(settings=EVERY_SECOND, eval_dataset=rows, **offline)
    for settings in (EVERY_SECOND, {"eval_on_start": True}):
        with pytest.raises(InvalidRequestError, match="give eval_dataset"):
            train(settings=settings, sink=sink)
    assert sink.phases == []
    with pytest.raises(InvalidRequestError, match="give eval_dataset"):
        train(settings={"max_steps": 1}).evaluate()


class Watching(TrainerCallback):
    """Records its calls."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, int]] = []
        self.logs: list[dict[str, float]] = []
        self.metrics: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.heard.append(("train_begin", state.global_step))

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.heard.append(("step_begin", state.global_step))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.heard.append(("pre_optimizer_step", state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.heard.append(("step_end", state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **more: Any) -> None:
        self.heard.append(("log", state.global_step))
        self.logs.append(dict(logs))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **more: Any) -> None:
        self.heard.append(("evaluate", state.global_step))
        self.metrics.append(dict(metrics))

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.heard.append(("save", state.global_step))

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.heard.append(("train_end", state.global_step))


class StoppingAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        control.should_training_stop = state.global_step >= self._step


def test_callbacks_of_transformers_hear_every_event_with_our_metrics(
    train: Callable[..., DARTrainer],
) -> None:
    watching = Watching()
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, **EVERY_SECOND}
    train(settings=settings, eval_dataset=EVAL, callbacks=[watching])
    step = ["step_begin", "pre_optimizer_step", "step_end", "log"]
    assert watching.heard == [
        ("train_begin", 0),
        *((name, 0 if name in step[:2] else 1) for name in step),
        *((name, 1 if name in step[:2] else 2) for name in step),
        ("log", 2), ("evaluate", 2), ("save", 2), ("log", 2), ("train_end", 2),
    ]  # fmt: skip
    assert {"dar/rewards_mean", "grad_norm", "loss", "epoch"} <= watching.logs[0].keys()
    assert watching.metrics[0].items() <= watching.logs[2].items()
    assert "eval_dar/rewards_mean" in watching.metrics[0]


def test_a_callback_can_end_training(train: Callable[..., DARTrainer], sink: RecordingSink) -> None:
    trainer = train(sink=sink, settings={"max_steps": 9}, callbacks=[StoppingAt(2)])
    assert trainer.state.global_step == 2
    assert sorted(sink.reports) == [1, 2]
    assert trainer.stopped_by is None


@pytest.mark.parametrize("step", [2, 4], ids=["between steps", "at the last step"])
def test_an_evaluation_broken_off_by_a_drain_is_made_up_for_after_the_resume(
    train: Callable[..., DARTrainer],
    new_sink: type[RecordingSink],
    new_control: Callable[..., Any],
    tmp_path: Path,
    step: int,
) -> None:
    settings = {"max_steps": 4, **EVERY_SECOND, "eval_on_start": True}
    whole, drained, resumed = new_sink(), new_sink(), new_sink()
    train(sink=whole, settings=settings, eval_dataset=EVAL)
    control = new_control("drain", lambda: ("evaluating", step, None) in drained.phases)
    trainer = train(sink=drained, control=control, settings=settings, eval_dataset=EVAL)
    assert trainer.stopped_by == "drain"
    assert step not in evaluations(drained)
    at, folder = drained.published[-1][:2]
    assert at == verify(folder).step == step
    other = {**settings, "output_dir": str(tmp_path / "other")}
    train(folder, sink=resumed, settings=other, eval_dataset=EVAL)
    expected = evaluations(whole)
    assert evaluations(drained) | evaluations(resumed) == expected
    assert not evaluations(drained).keys() & evaluations(resumed).keys()


def test_a_resume_neither_loses_nor_repeats_an_evaluation_at_a_step_edge(
    train: Callable[..., DARTrainer], new_sink: type[RecordingSink], tmp_path: Path
) -> None:
    settings = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_on_start": True,
        **EVERY_SECOND,
    }
    whole = new_sink()
    train(sink=whole, settings=settings, eval_dataset=EVAL)
    expected = evaluations(whole)
    assert sorted(expected) == [0, 2, 4]
    for at, folder, *_ in whole.published[:3]:
        resumed = new_sink()
        other = {**settings, "output_dir": str(tmp_path / f"other-{at}")}
        train(folder, sink=resumed, settings=other, eval_dataset=EVAL)
        assert evaluations(resumed) == {s: values for s, values in expected.items() if s > at}
