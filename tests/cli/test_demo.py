import dataclasses
from pathlib import Path

import pytest

from dar.demo.brackets import BracketsResult, plot
from dar.demo.run import base_folder
from dar.demo.tasks import BRACKETS, TASKS, DemoTask
from dar.protocol.spec import DARSpec
from dar.training.demo.trial import SETTINGS

STANDING = {
    "reward": 0.97, "best_reward": 0.956, "kl_ref": 1.89, "best_kl_ref": 1.79, "kl_target": 0.04, "objective": 0.59,
    "best_objective": 0.6,
}  # fmt: skip


def test_the_curve_stands_under_the_optimum_and_every_row_has_one_width() -> None:
    lines = plot([step / 300 for step in range(300)], 0.95)
    curve = [line.partition("│")[2][:60] for line in lines[:13]]
    assert all(len(row) == 60 for row in curve)
    assert "optimum 0.950" in lines[1]
    assert curve[1].count("╌") > 50
    # A rising curve: every column has one point, further right never lower.
    heights = [next(r for r in range(13) if curve[r][c] == "●") for c in range(60)]
    assert heights == sorted(heights, reverse=True)
    assert heights[0] == 12
    assert heights[-1] <= 1
    assert lines[-1].split() == ["step", "1", "300"]


def test_a_short_curve_has_a_column_for_every_step() -> None:
    lines = plot([0.0, 1.0, 0.5], 0.5)
    assert [row.count("●") for row in lines].count(1) == 3


def test_the_brackets_demo_fails_where_only_the_reward_is_high() -> None:
    good = BracketsResult(STANDING, STANDING)
    assert good.is_near
    dropped_reference = {**STANDING, "reward": 0.999, "kl_target": 1.7}
    assert not dataclasses.replace(good, after=dropped_reference).is_near
    too_low = {**STANDING, "reward": 0.85}
    assert not dataclasses.replace(good, after=too_low).is_near


def test_every_demo_is_a_spec_and_the_brackets_are_those_of_the_tests() -> None:
    rewards = {"components": [{"name": "one", "url": "http://127.0.0.1:1/score"}]}
    for task in TASKS.values():
        DARSpec.model_validate({**task.spec, "rewards": rewards})
    spec = DARSpec.model_validate({**BRACKETS.spec, "rewards": rewards})
    hyper = spec.hyperparameters
    for name in ("alpha", "beta", "dar_k", "dar_wclip", "adv_norm", "baseline", "learning_rate"):
        assert getattr(hyper, name) == SETTINGS[name]
    assert (hyper.max_steps, hyper.batch_size) == (SETTINGS["max_steps"], 12)
    assert spec.sampling.max_new_tokens == SETTINGS["max_new_tokens"]


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_the_files_that_make_a_base_model_exist(task: DemoTask, tmp_path: Path) -> None:
    assert base_folder(tmp_path, task).parent == tmp_path / "dar" / "demo"
