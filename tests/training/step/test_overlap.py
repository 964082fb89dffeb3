"""What is overlapped with what changes when rewards are waited for, and nothing else."""

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from dar.errors import InvalidRequestError
from dar.protocol.spec import JobSpec
from dar.rewards.base import RewardContext
from dar.rewards.scoring.in_flight import Ticket
from dar.training import DARTrainer
from dar.training.parallel.ranks import Ranks
from dar.training.report.capacity import Capacity, needed_concurrency, service_seconds
from dar.training.step.records import Weigher, is_streamable
from dar.training.step.reward_feed import StepInProgress, StepPart
from fakes import reward_chaos as chaos
from fakes.recording_sink import RecordingSink

LORA = LoraConfig(
    r=2, lora_alpha=8, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM"
)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"peft_config": LORA, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8},
        {"adv_norm": "per_prompt", "drop_ties": True, "weight_norm": "per_prompt"},
        {"adv_norm": "batch"},
        {"min_ess": 0.9, "weight_norm": "batch"},
        {"dar_k": 1, "per_device_train_batch_size": 20},
    ],
    ids=["default", "adapter, shares", "per prompt", "batch", "over the step", "K = 1"],
)
def test_streaming_in_fixed_order_changes_no_bit(
    run: Callable[..., Any], settings: dict[str, Any]
) -> None:
    barrier, stream = run(overlap="none", **settings), run(overlap="stream", **settings)
    chaos.assert_same(barrier, stream)
    missing = [values["rewards/missing_fraction"] for values in stream[1].reports.values()]
    assert max(missing) > 0
    waited = [
        sum(values["time/idle_reward_seconds"] for values in sink.reports.values())
        for _, sink in (barrier, stream)
    ]
    assert min(waited) > 0


def test_only_statistics_of_a_prompt_are_streamed(config: Callable[..., Any]) -> None:
    assert is_streamable(config())
    assert is_streamable(config(preset="reference"))
    assert not is_streamable(config(preset="paper"))
    assert not is_streamable(config(dar_k=1))
    assert not is_streamable(config(min_ess=0.1))
    assert not is_streamable(config(weight_norm="batch"))


def test_training_begins_before_the_last_reward_has_come(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    may_answer = asyncio.Event()

    async def last_when_allowed(prompts: list[str], completions: list[str]) -> list[float]:
        asked.append(prompts[0])
        loops.append(asyncio.get_running_loop())
        if prompts[0] == asked[0]:
            await may_answer.wait()
        return [chaos.reward_of(text) for text in completions]

    loops: list[asyncio.AbstractEventLoop] = []
    seen: list[list[int]] = []
    weigh = Weigher.weigh

    def watched(self: Any, step: Any, prompts: list[int]) -> None:
        seen.append(list(prompts))
        if len(seen) == 2:
            loops[0].call_soon_threadsafe(may_answer.set)
        weigh(self, step, prompts)

    monkeypatch.setattr(Weigher, "weigh", watched)
    _, sink = run(reward_funcs=last_when_allowed, order="completion", max_steps=1)
    assert sorted(prompt for part in seen for prompt in part) == list(range(12))
    assert [len(part) for part in seen] == [4, 4, 4]
    assert seen != [list(range(i, i + 4)) for i in (0, 4, 8)]
    assert sink.reports[1]["dar/loss"] != 0


def test_the_order_of_completion_changes_no_more_than_rounding(run: Callable[..., Any]) -> None:
    fixed, completion = run(max_steps=1), run(max_steps=1, order="completion")
    (weights, reports), (others, other_reports) = (
        chaos.result_of(*fixed),
        chaos.result_of(*completion),
    )
    for name, values in reports[1].items():
        assert other_reports[1][name] == pytest.approx(values, rel=1e-4, abs=1e-6), name
    # AdamW's first step is the sign of the gradient, so weights may differ where that is rounding
    moved = [(weights[name] - others[name]).abs().max().item() for name in weights]
    assert max(moved) <= 2 * 1e-2
    assert sorted(moved)[len(moved) // 2] < 1e-4


# --- one step ahead -------------------------------------------------------------------------------


def test_one_step_ahead_is_one_update_stale_from_the_second_step_on(
    run: Callable[..., Any],
) -> None:
    trainer, sink = run(overlap="one_step", max_steps=4)
    assert [sink.reports[n]["dar/staleness"] for n in (1, 2, 3, 4)] == [0, 1, 1, 1]
    _, fresh = run(max_steps=4)
    # step 2 is sampled by the policy that step 1 was sampled by, not by the one after it
    behavior = [s.reports[2]["dar/logps_behavior"] for s in (sink, fresh)]
    assert behavior[0] != behavior[1]
    assert abs(sink.reports[2]["dar/logps_policy"] - behavior[0]) > 1e-3
    assert trainer.state.global_step == 4


def state_of(folder: Path) -> dict[str, Any]:
    tensors = {
        f"{path.name}/{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    return {name: tensor for name, tensor in tensors.items() if "random/" not in name}


@pytest.mark.parametrize("overlap", ["stream", "one_step"])
@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "adapter"])
def test_a_run_resumed_at_any_step_goes_on_to_the_same_bits(
    run: Callable[..., Any], tmp_path: Path, overlap: str, peft: Any
) -> None:
    settings = {"overlap": overlap, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    settings |= {"peft_config": peft} if peft else {}
    _, whole = run(output_dir=str(tmp_path / "whole"), **settings)
    for step in (1, 2, 3):
        _, folder, *_ = whole.published[step - 1]
        torch.manual_seed(step)
        _, resumed = run(folder, output_dir=str(tmp_path / f"from-{step}"), **settings)
        expected = {n: r for n, r in whole.deterministic_reports().items() if n > step}
        assert resumed.deterministic_reports() == expected
        ends = [state_of(sink.published[-1][1]) for sink in (whole, resumed)]
        assert [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])] == []


def test_a_run_drained_while_it_waits_goes_on_with_what_it_had_sampled(
    run: Callable[..., Any], new_sink: type[RecordingSink], tmp_path: Path
) -> None:
    settings = {"overlap": "one_step", "max_steps": 4, "save_strategy": "steps", "save_steps": 4}
    whole = run(output_dir=str(tmp_path / "whole"), **settings)
    sink = new_sink()

    async def slow_from_3(completions: list[str], **columns: Any) -> list[float | None]:
        if 2 in sink.reports:
            await asyncio.sleep(60)
        return await chaos.late(completions, **columns)

    class Draining:
        def requested(self) -> str | None:
            waiting = ("waiting_for_reward", 2, None)  # two steps are done
            return "drain" if waiting in sink.phases else None

    folder = str(tmp_path / "drained")
    slow_from_3.__name__ = "late"
    trainer, _ = run(
        sink=sink, output_dir=folder, reward_funcs=slow_from_3, control=Draining(), **settings
    )
    assert trainer.stopped_by == "drain"
    assert [step for step, *_ in sink.published] == [2]
    resumed = run(sink.published[0][1], output_dir=folder, **settings)
    reports = whole[1].deterministic_reports()
    assert resumed[1].deterministic_reports() == {n: reports[n] for n in (3, 4)}
    weights, others = chaos.result_of(*whole)[0], chaos.result_of(*resumed)[0]
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_sampling_ahead_of_stored_completions_is_refused(
    train: Callable[..., DARTrainer],
) -> None:
    rows = [{"prompt_ids": [10], "completion_ids": [[4, 3], [5, 3]], "rewards": [1.0, 0.0]}]
    with pytest.raises(InvalidRequestError, match="one step ahead"):
        train(train_dataset=rows, reward_funcs=None, settings={"overlap": "one_step"})
    method = {"type": "dar", "dar": {"rewards": None, "overlap": "one_step"}}
    with pytest.raises(ValueError, match="one step ahead"):
        JobSpec.model_validate({"model": "m", "training_file": "file-1", "method": method})


# --- leaving --------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", ["none", "stream", "one_step"])
def test_a_cancellation_drops_everything_in_flight_at_once(
    run: Callable[..., Any], overlap: str
) -> None:
    begun: list[str] = []
    ended: list[str] = []
    asked_at: list[float] = []

    async def never(prompts: list[str], completions: list[str]) -> list[float]:
        begun.append(prompts[0])
        try:
            await asyncio.sleep(600)
        finally:
            ended.append(prompts[0])
        return [0.0] * len(completions)

    class Cancelling:
        def requested(self) -> str | None:
            if len(begun) < 12:
                return None
            asked_at.append(time.monotonic())
            return "cancel"

    trainer, sink = run(reward_funcs=never, control=Cancelling(), overlap=overlap)
    left_after = time.monotonic() - asked_at[0]
    assert trainer.stopped_by == "cancel"
    assert len(begun) == len(ended) >= 12
    assert left_after < 10  # a second, where nothing else is running
    assert sink.reports == {}
    assert "reward-scorer" not in {thread.name for thread in threading.enumerate()}


def test_an_error_of_one_group_ends_the_step_without_waiting_for_the_others(
    run: Callable[..., Any],
) -> None:
    async def one_breaks(prompts: list[str], completions: list[str]) -> list[float]:
        if prompts[0] == "w55":
            raise KeyError("the judge's own mistake")
        await asyncio.sleep(600)
        return [0.0] * len(completions)

    with pytest.raises(KeyError, match="own mistake"):
        run(reward_funcs=one_breaks)


def test_needed_concurrency_follows_littles_law() -> None:
    # 32 groups, one a request, 5 s each, 16 at once: one every 5/16 s, and 10 s in all
    pace = [5 + 5 / 16 * i for i in range(32)]
    assert service_seconds(pace) == pytest.approx(10)
    assert service_seconds([*pace[:-3], 100, 200, 300]) == pytest.approx(10)
    assert service_seconds([1.0]) == 0
    assert needed_concurrency(16, 10, 4) == 60  # 1.5 * 5 * 32 / 4


def test_a_service_whose_time_is_hidden_is_not_complained_about(sink: RecordingSink) -> None:
    def told(answered: float, waited: float) -> int:
        tickets = []
        for i in range(8):
            ticket: Any = Ticket((), RewardContext(1))
            ticket.answered_at["judge"] = i * answered
            tickets.append(ticket)
        capacity = Capacity({"judge": 2}, sink)
        capacity.end_rewards(tickets)
        times = {"sampling": 3.0, "training": 1.0, "idle_reward": waited, "step": 4 + waited}
        capacity.end_step(1, {f"time/{name}_seconds": value for name, value in times.items()})
        return len(sink.events)

    assert (
        told(answered=0.4, waited=1.0) == 0
    )  # 3.2 s fit into 4 s: stragglers, no lack of capacity
    assert told(answered=2.0, waited=0.0) == 0
    assert told(answered=2.0, waited=1.0) == 1


class Step:
    prompts = [None] * 24
    counts = [4] * 24


class TwoRanks(Ranks):
    def __init__(self) -> None:
        super().__init__()
        self.count = 2


class Known:
    """A feed whose rewards are all there."""

    def __init__(self, again: list[list[int]] | None = None) -> None:
        self._again = again

    def take(self, part: list[list[int]]) -> list[list[int]]:
        return part

    def refill(self) -> list[list[int]] | None:
        return self._again

    def finish(self) -> None: ...


def shares_of(feed: Known) -> list[list[StepPart]]:
    step: Any = Step()
    shares = StepInProgress(step, feed).shares(TwoRanks(), 2, is_streamable=True)
    return [list(share) for share in shares]


def test_parts_are_cut_alike_for_every_process_and_cover_the_step() -> None:
    parts = shares_of(Known())
    assert [part.is_last for share in parts for part in share].count(True) == 1
    assert parts[-1][-1].is_last
    for index in (0, 1):
        own = [p for share in parts for part in share for p in part.prompts[index]]
        assert own == list(TwoRanks().slice_of(index, 24))


def test_what_is_sampled_again_is_trained_on_in_a_part_of_its_own_and_nowhere_else() -> None:
    again = [[10, 11], [12, 23]]  # 12 was given before, when it did not count; the others not yet
    parts = [part for share in shares_of(Known(again)) for part in share]
    assert parts[-1] == StepPart(again, is_last=True)
    assert not any(part.is_last for part in parts[:-1])
    given = [p for part in parts[:-1] for one in part.prompts for p in one]
    assert sorted(given) == [p for p in range(24) if p not in {10, 11, 23}]
