import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from dar.protocol.metrics import NAMES, is_known
from dar.training import DARTrainer
from dar.training.data.rows import Prompt, TokenPair
from dar.training.step.metrics import MetricsWindow, step_metrics
from dar.training.step.records import ScoredStep
from fakes.recording_sink import RecordingSink

ROWS: list[dict[str, Any]] = [
    {"prompt_ids": [10, 20], "completion_ids": [[4, 5, 3], [6, 7, 8, 3], [9, 3]], "rewards": [1.0, 0.25, None],
     "behavior_logps": [-11.0, -17.5, -8.0]},
    {"prompt_ids": [11], "completion_ids": [[12, 13, 14, 15, 16, 3], [6, 3]], "rewards": [0.5, 0.5],
     "behavior_logps": [-25.0, -9.5]},
]  # fmt: skip


@pytest.fixture
def offline(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> Callable[..., dict[str, float]]:
    def run(**options: Any) -> dict[str, float]:
        settings = {"max_steps": 1, "per_device_train_batch_size": 2} | options
        train(train_dataset=ROWS, reward_funcs=None, sink=sink, settings=settings)
        return dict(sink.reports[1])

    return run


def test_the_divergence_from_the_reference_is_estimated_in_two_ways(
    offline: Callable[..., dict[str, float]], sink: RecordingSink
) -> None:
    values = offline()
    rows = [row for row in sink.shown[1] if row.weight is not None]
    assert len(rows) == 4
    log_ratios = [row.logp_ref - row.logp_behavior for row in rows]
    assert values["dar/kl_ref"] == pytest.approx(-sum(log_ratios) / 4, rel=1e-5)
    k3 = sum(math.exp(d) - 1 - d for d in log_ratios) / 4
    assert values["dar/kl_ref_k3"] == pytest.approx(k3, rel=1e-5)


def test_lengths_missing_rewards_and_groups_that_tell_nothing_are_counted(
    offline: Callable[..., dict[str, float]],
) -> None:
    values = offline()
    assert values["completions/mean_length"] == pytest.approx(17 / 5)
    assert (values["completions/min_length"], values["completions/max_length"]) == (2, 6)
    assert values["rewards/missing_fraction"] == pytest.approx(1 / 5)
    assert values["rewards/zero_variance_fraction"] == 0.5
    assert "dar/staleness" not in values  # nobody knows when stored completions were sampled


def test_preference_data_report_the_margin_of_chosen_over_rejected_and_its_sign(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    rows = [{"prompt": f"w{n}", "chosen": "w40 w41", "rejected": "w50"} for n in (10, 11, 12)]
    train(train_dataset=rows, reward_funcs=None, sink=sink, settings={"max_steps": 12})
    first, last = sink.reports[1], sink.reports[12]
    assert first["dar/preference_margin"] == pytest.approx(0, abs=1e-4)  # it is the reference
    assert (last["dar/preference_accuracy"], last["dar/preference_margin"] > 0.05) == (1.0, True)
    samples = {(row.group, row.index): row for row in sink.shown[12]}
    gains = {place: row.logp_policy - row.logp_ref for place, row in samples.items()}
    margins = [gains[group, 0] - gains[group, 1] for group in range(3)]
    assert last["dar/preference_margin"] == pytest.approx(sum(margins) / 3, rel=1e-4)


def test_without_a_reference_the_margin_is_that_of_the_policy(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    rows = [{"prompt": "w10", "chosen": "w40", "rejected": "w50"}]
    settings = {"max_steps": 1, "alpha": 0.0}
    train(train_dataset=rows, reward_funcs=None, sink=sink, settings=settings)
    chosen, rejected = (row.logp_policy for row in sink.shown[1])
    margin = sink.reports[1]["dar/preference_margin"]
    assert margin == pytest.approx(chosen - rejected, rel=1e-4)
    assert sink.reports[1]["dar/preference_accuracy"] == float(margin > 0)


def test_other_offline_data_have_no_margin(offline: Callable[..., dict[str, float]]) -> None:
    assert not [name for name in offline() if "preference" in name]


def test_clipping_is_counted_before_weights_are_normalised(
    offline: Callable[..., dict[str, float]],
) -> None:
    values = offline(dar_wclip=0.9, weight_norm="batch")
    assert values["dar/weights_clip_fraction"] > 0
    assert values["dar/weights_mean"] == pytest.approx(1)
    assert values["dar/weights_max"] > 0.9


@pytest.mark.parametrize("scale", [1e-6, 0.5])
def test_entropy_is_that_of_the_policys_whole_distribution(
    train: Callable[..., DARTrainer],
    make_model: Callable[..., LlamaForCausalLM],
    sink: RecordingSink,
    scale: float,
) -> None:
    model = make_model(scale=scale)
    total, count = 0.0, 0
    for row in ROWS:
        for ids, reward in zip(row["completion_ids"], row["rewards"], strict=True):
            if reward is not None:
                prompt = row["prompt_ids"]
                with torch.no_grad():
                    logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
                total += torch.distributions.Categorical(logits=logits).entropy().sum().item()
                count += len(ids)
    train(
        model=model,
        train_dataset=ROWS,
        reward_funcs=None,
        sink=sink,
        settings={"max_steps": 1, "per_device_train_batch_size": 2},
    )
    assert sink.reports[1]["dar/entropy"] == pytest.approx(total / count, rel=1e-5)
    assert (total / count == pytest.approx(math.log(64))) == (scale < 0.1)


class SlowSink:
    """Takes its time with every report."""

    def __init__(self, sink: RecordingSink) -> None:
        self._sink = sink

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sink, name)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self._sink.metrics(step, values)
        time.sleep(0.3)


def test_times_of_the_phases_make_up_the_step_and_idle_time_is_what_nobody_worked_in(
    train: Callable[..., DARTrainer], sink: RecordingSink
) -> None:
    def slow(completions: list[str], **columns: Any) -> list[float]:
        time.sleep(0.2)
        return [float(i) for i in range(len(completions))]

    settings = {"max_steps": 2, "overlap": "none"}
    train(reward_funcs=slow, sink=SlowSink(sink), settings=settings)
    for number, values in sink.reports.items():
        phases = ("sampling", "reward", "reference", "training")
        parts = [values[f"time/{phase}_seconds"] for phase in phases]
        assert min(parts) > 0
        assert sum(parts) == pytest.approx(values["time/step_seconds"])
        assert values["time/reward_seconds"] > 0.2
        between = values["time/idle_seconds"] - values["time/reward_seconds"]
        assert between == 0 if number == 1 else between > 0.3
        assert values["time/idle_reward_seconds"] == values["time/reward_seconds"]
        assert values["time/idle_generation_seconds"] == 0
        tokens = sum(row.completion_tokens for row in sink.shown[number])
        assert values["time/tokens_per_second"] * values["time/step_seconds"] == pytest.approx(
            tokens
        )
        assert values["dar/staleness"] == 0


def test_a_window_keeps_extremes_and_the_last_of_counters() -> None:
    window = MetricsWindow()
    for least, most, tokens in ((3, 9, 100), (2, 5, 150), (4, 7, 180)):
        window.add(
            {
                "completions/min_length": least,
                "completions/max_length": most,
                "completions/mean_length": (least + most) / 2,
                "train/tokens": tokens,
            }
        )
    assert window.take() == {
        "completions/min_length": 2,
        "completions/max_length": 9,
        "completions/mean_length": 5.0,
        "train/tokens": 180,
    }
    assert window.take() == {}


def test_truncation_and_staleness_are_those_of_the_step() -> None:
    step = ScoredStep(
        number=7,
        epoch=1.0,
        prompts=[Prompt([2], "", None, {}, 0)],
        pairs=[TokenPair([2], [4, 5])] * 4,
        texts=[""] * 4,
        finish_reasons=["length", "stop", "stop", "stop"],
        rewards=[],
        behavior_logps_B=torch.zeros(4),
        staleness=3,
    )
    values = step_metrics(step)
    assert values["completions/truncated_fraction"] == 0.25
    assert values["dar/staleness"] == 3
    assert step.counts == [4]


def test_metrics_of_an_evaluation_are_known_by_the_names_of_training() -> None:
    assert all(is_known(name) and is_known(f"eval_{name}") for name in NAMES)
    assert is_known("rewards/helpful/mean")
    assert is_known("rewards/helpful/missing_fraction")
    assert is_known("eval_rewards/helpful/mean")
    assert not is_known("eval_dar/nothing")
    assert not is_known("eval_eval_dar/loss")
    assert not is_known("rewards/helpful")


@pytest.mark.slow  # trains 40 steps twice
def test_rewards_that_jump_are_told_once_also_over_a_resume(
    train: Callable[..., Any], new_sink: type[RecordingSink]
) -> None:
    calls = {"count": 0}

    def judge(completions: list[str], **_: Any) -> list[float]:
        calls["count"] += 1
        return [50.0 * (calls["count"] > 22) + len(set(text.split())) for text in completions]

    settings = {"max_steps": 30, "save_strategy": "steps", "save_steps": 21, "learning_rate": 1e-5}
    sink = new_sink()
    train(reward_funcs=judge, settings=settings, sink=sink)
    told = [
        data for level, _, data in sink.events if data["kind"] == "reward_drift" and level == "warn"
    ]
    assert [(data["component"], data["step"] in range(23, 27)) for data in told] == [
        ("judge", True)
    ]
    assert sink.published[0][0] == 21
    calls["count"] = 21
    again = new_sink()
    train(sink.published[0][1], reward_funcs=judge, settings=settings, sink=again)
    assert [data for _, _, data in again.events if data["kind"] == "reward_drift"] == told
