"""Two real processes that train together, against one that trains alone."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from dar.training.parallel.ranks import Ranks
from fakes import ranked

# The processes of the fixture share the machine with all other tests.
pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def brief(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for one run of one process, and one of two, which then talk."""
    folder = tmp_path_factory.mktemp("brief")
    ranked.train(folder, "whole", ranked.WHOLE)
    ranked.train(folder, "whole small", ranked.WHOLE | ranked.SMALL, reward=ranked.small)
    ranked.start(folder, "brief")
    return folder


@pytest.fixture(scope="module")
def passes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for one run of one process, and one of two, over all data."""
    folder = tmp_path_factory.mktemp("passes")
    ranked.train(folder, "whole passes", ranked.WHOLE | ranked.PASSES)
    ranked.start(folder, "passes")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each run: those of one process, then those of two."""
    folder = tmp_path_factory.mktemp("runs")
    ranked.train(folder, "whole", ranked.WHOLE)
    ranked.train(folder, "in shares", ranked.IN_SHARES)
    ranked.stream(folder, "streamed", ranked.WHOLE | {"overlap": "none"})
    ranked.stream(folder, "ahead", ranked.WHOLE | {"overlap": "one_step"})
    ranked.refill(folder, "refilled", ranked.WHOLE)
    ranked.train(folder, "whole offline", ranked.WHOLE, is_offline=True)
    ranked.train(folder, "calibrated", ranked.WHOLE | ranked.CALIBRATED)
    ranked.train(folder, "whole lora", ranked.WHOLE, is_lora=True)
    settings = ranked.WHOLE | ranked.EVALUATED
    ranked.train(folder, "whole judged", settings, is_judged=True)
    ranked.start(folder, "main")
    return folder


def assert_same(runs: Path, one: str, other: str, *, last: int = 3) -> None:
    """Weights and optimizer to 1e-10 of their norm, the same completions, and metrics to 1e-10."""
    for pattern in ("*model.safetensors", "resume/optimizer.safetensors"):
        ours, theirs = (
            load_file(next((runs / name / "checkpoints" / f"step-{last}").glob(pattern)))
            for name in (one, other)
        )
        for key in ours:
            if not key.startswith("random/"):
                distance = (ours[key] - theirs[key]).norm()
                assert distance <= 1e-10 * max(1e-12, ours[key].norm()), key
    told = [json.loads((runs / name / "told.json").read_text()) for name in (one, other)]
    for step, completions in told[1]["completions"].items():
        assert completions == told[0]["completions"][step]
    for step, values in told[1]["metrics"].items():
        assert values == pytest.approx(told[0]["metrics"][step], rel=1e-10, abs=1e-12)
    assert str(last) in told[1]["metrics"]


@pytest.mark.slow  # two processes import torch
@pytest.mark.parametrize("name", ["ddp", "fsdp", "fsdp resumed"])
def test_two_processes_train_as_one_does(brief: Path, name: str) -> None:
    assert_same(brief, "whole", name)


@pytest.mark.slow  # two processes train
def test_a_hint_of_two_processes_is_that_of_one_from_the_rewards_of_both(brief: Path) -> None:
    found = [
        [
            event
            for event in json.loads((brief / name / "told.json").read_text())["events"]
            if "alpha" in event
        ]
        for name in ("whole small", "ddp small")
    ]
    assert found[0] == found[1]
    assert len(found[1]) == 1
    assert "the rewards had hardly any effect" in found[1][0]


@pytest.mark.parametrize("name", ["ddp passes", "fsdp passes"])
def test_a_last_step_with_fewer_prompts_is_shared_too(passes: Path, name: str) -> None:
    assert_same(passes, "whole passes", name, last=2)


@pytest.mark.slow  # two processes import torch and train nineteen times
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("whole", "in shares"),
        ("whole", "ddp in shares"),
        ("whole offline", "ddp offline"),
        ("whole lora", "ddp lora"),
        ("streamed", "ddp streamed"),
        ("refilled", "ddp refilled"),
        ("refilled", "fsdp refilled"),
        ("ahead", "ddp ahead"),
        ("ahead", "fsdp ahead"),
        ("whole", "fsdp"),
        ("whole lora", "fsdp lora"),
    ],
)
def test_how_a_step_is_shared_changes_nothing(runs: Path, one: str, other: str) -> None:
    assert_same(runs, one, other)


@pytest.mark.slow  # two processes import torch and train nineteen times
@pytest.mark.parametrize("name", ["ddp calibrated", "fsdp calibrated"])
def test_two_processes_choose_the_same_alpha_as_one(runs: Path, name: str) -> None:
    assert_same(runs, "calibrated", name, last=2)
    chosen = [
        [
            text
            for text in json.loads((runs / one / "told.json").read_text())["events"]
            if "alpha is" in text
        ]
        for one in ("calibrated", name)
    ]
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == 1


@pytest.mark.slow  # two processes import torch and train nineteen times
def test_the_streamed_runs_lack_rewards_refill_them_and_are_one_update_stale(runs: Path) -> None:
    told = [
        json.loads((runs / name / "told.json").read_text())["metrics"]
        for name in ("ddp streamed", "ddp ahead")
    ]
    assert any(values["rewards/missing_fraction"] > 0 for values in told[0].values())
    refilled = json.loads((runs / "fsdp refilled" / "told.json").read_text())["metrics"]
    assert all(values["rewards/refilled_groups"] > 0 for values in refilled.values())
    assert [values["dar/staleness"] for values in told[1].values()] == [0, 1, 1]


@pytest.mark.slow  # two processes import torch and train nineteen times
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_go_on_from_the_checkpoint_of_one(runs: Path, strategy: str) -> None:
    assert_same(runs, "whole", f"{strategy} resumed")
    told = json.loads((runs / f"{strategy} resumed" / "told.json").read_text())
    assert list(told["metrics"]) == ["3"]
    assert any("processes was 1 and is 2" in message for message in told["events"])


@pytest.mark.slow  # two processes import torch and train nineteen times
def test_two_processes_evaluate_as_one_with_a_reward_model_that_only_the_main_one_holds(
    runs: Path,
) -> None:
    assert_same(runs, "whole judged", "ddp judged")
    metrics = json.loads((runs / "ddp judged" / "told.json").read_text())["metrics"]
    for step in ("0", "2", "3"):
        names = [name for name in metrics[step] if name.startswith("eval")]
        assert {"few", "one"} <= {part for name in names for part in re.split("[/_]", name)}
    held = json.loads((runs / "heard-1.json").read_text())["judge bytes"]
    assert held[0] > held[1] == 0


@pytest.mark.slow  # two processes import torch and train nineteen times
def test_weights_without_a_gradient_are_looked_for_only_where_there_are_any(runs: Path) -> None:
    for index in range(2):
        heard = json.loads((runs / f"heard-{index}.json").read_text())
        assert heard["looks for unused"] == {"whole": False, "lora": False, "idle": True}
    assert "2" in json.loads((runs / "idle" / "told.json").read_text())["metrics"]


@pytest.mark.slow  # two processes import torch and train nineteen times
def test_a_reward_may_take_longer_than_a_collective_of_torch(runs: Path) -> None:
    assert "1" in json.loads((runs / "slow" / "told.json").read_text())["metrics"]


@pytest.mark.slow  # two processes import torch and train nineteen times
def test_a_drain_and_an_error_reach_all_processes(runs: Path) -> None:
    for index in range(2):
        heard = json.loads((runs / f"heard-{index}.json").read_text())
        assert heard["drained"] == ["drain", 1, 1]
        assert heard["broken"] == ["RewardMisconfiguredError", "the judge is gone"]
    assert [path.name for path in (runs / "drained" / "checkpoints").iterdir()] == ["step-1"]


@pytest.mark.slow  # two processes import torch
def test_processes_tell_each_other_values_errors_and_stops(brief: Path) -> None:
    heard: list[dict[str, Any]] = [
        json.loads((brief / f"heard-{index}.json").read_text()) for index in range(2)
    ]
    odd = "process 1 of this training run has failed with KeyError: 'odd'"
    assert [values.pop("KeyError") for values in heard] == [
        ["ProcessFailedError", odd],
        ["KeyError", "'odd'"],
    ]
    assert heard[0] == heard[1]
    assert heard[0]["gathered"] == [{"index": i, "number": float("inf")} for i in range(2)]
    assert heard[0]["tensors"] == [[0.0, 0.0], [1.0, 1.0]]
    assert heard[0]["from_main"] == ["only", 0]
    assert heard[0]["large"] == [9_000_000, 9_000_000]
    assert heard[0]["slices"] == [[0, 1], [2, 3, 4]]
    assert heard[0]["misconfigured"] == ["a wrong path", "rewards"]
    assert heard[0]["TrainingError"] == ["TrainingError", "of one"]
    assert heard[0]["StopRequestedError"] == ["StopRequestedError", "now"]
    assert heard[0]["afterwards"] == [0, 1]


def test_one_process_is_the_identity() -> None:
    ranks, thing = Ranks(), object()
    assert ranks.gather(thing) == [thing]
    assert ranks.from_main(lambda: thing) is thing
    assert list(ranks.slice(3)) == [0, 1, 2]
    assert ranks.is_main
    ranks.look()
