"""The plain brackets task: what DAR promises is reached, and a trainer with a mistake does not pass
for a good one.

The other variants have a file of their own, so that two processes share the work.
"""

import math
from pathlib import Path

import pytest
import torch

from dar.errors import InvalidRequestError
from dar.training import DARConfig
from dar.training.demo.base import save_base
from dar.training.demo.brackets import Brackets, ExactMetrics, divergence
from dar.training.demo.languages import PROMPTS, is_balanced
from dar.training.demo.trial import SETTINGS, train
from dar.training.model.loading import eos_ids, load_model, load_tokenizer


def has_converged(metrics: ExactMetrics) -> bool:
    """What a right trainer reaches after 300 steps, whatever the seed; `make bench` tries five."""
    return metrics.share > 0.97 and metrics.kl_target < 0.10


@pytest.fixture
def task() -> Brackets:
    return Brackets()


@pytest.mark.parametrize("can_stop", [False, True])
def test_the_law_lists_every_completion_once(can_stop: bool) -> None:
    task = Brackets(can_stop=can_stop)
    model = task.model(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    law = task.distribution(model)
    assert law.shape == (3, 63 if can_stop else 32)
    torch.testing.assert_close(law.exp().sum(dim=1), torch.ones(3, dtype=torch.float64))
    # Tempering the enumerated distribution token by token is what dividing the logits does.
    cold = task.distribution(model, temperature=0.7)
    torch.testing.assert_close(task.tempered(law, 0.7), cold, atol=1e-9, rtol=0)
    assert divergence(law, cold) > 0.003


def test_the_reward_counts_as_many_completions_as_there_are_ways() -> None:
    assert Brackets().rewards.sum(dim=1).tolist() == [4, 5, 5]
    assert Brackets(can_stop=True).rewards.sum(dim=1).tolist() == [1, 3, 3]
    assert is_balanced("(())()")
    assert not is_balanced("())(")
    assert not is_balanced("(()")


def test_the_fixed_point_at_temperature_1_maximises_the_objective_whatever_beta(
    task: Brackets,
) -> None:
    ref = task.distribution(task.model(0))
    configs = [
        DARConfig(output_dir="none", use_cpu=True, alpha=0.2, beta=beta) for beta in (0.05, 0.8)
    ]
    targets = [task.target(ref, config) for config in configs]
    torch.testing.assert_close(targets[0], targets[1], atol=1e-8, rtol=0)
    closed = (ref + task.rewards / 0.2).log_softmax(dim=1)
    torch.testing.assert_close(targets[0], closed, atol=1e-8, rtol=0)
    best = (closed.exp() * task.rewards).sum(1).mean() - 0.2 * divergence(closed, ref)
    for scale in (4.5, 5.5):  # on both sides of 1 / alpha
        other = (ref + task.rewards * scale).log_softmax(dim=1)
        value = (other.exp() * task.rewards).sum(1).mean() - 0.2 * divergence(other, ref)
        assert value < best


def test_a_policy_sampled_too_cold_does_not_converge(task: Brackets) -> None:
    ref = task.distribution(task.model(0))
    config = DARConfig(output_dir="none", use_cpu=True, alpha=0.1, beta=0.3, temperature=0.74)
    with pytest.raises(InvalidRequestError, match="does not converge"):
        task.target(ref, config)


@pytest.mark.slow  # 300 steps are what the optimum needs
@pytest.mark.parametrize("seed", [0, 1])
def test_training_reaches_the_optimum(task: Brackets, seed: int) -> None:
    run = train(task, seed=seed)
    assert has_converged(run.final)
    assert run.final.reward == pytest.approx(run.final.best_reward, abs=0.04)
    assert run.curve[0].reward == pytest.approx(0.146, abs=0.03)


@pytest.mark.slow  # long enough that a right trainer would be near its optimum
def test_without_the_reference_the_reward_looks_perfect_and_the_optimum_is_missed(
    task: Brackets,
) -> None:
    run = train(task, seed=0, mistake="reference_dropped", max_steps=150)
    assert not has_converged(run.final)
    assert run.final.reward > run.final.best_reward
    assert run.final.kl_ref > 1.5 * run.final.best_kl_ref  # and it is on its way up


@pytest.mark.slow  # a whole training run
def test_with_its_sign_flipped_the_reward_falls(task: Brackets) -> None:
    run = train(task, seed=3, mistake="sign_flipped", max_steps=60)
    assert not has_converged(run.final)
    assert run.final.reward < run.curve[0].reward


def test_a_model_of_two_symbols_and_no_special_token_goes_through_its_files(
    task: Brackets, tmp_path: Path
) -> None:
    model = task.model(0)
    save_base(tmp_path, model, task.tokenizer(), PROMPTS)
    tokenizer = load_tokenizer(tmp_path / "model")
    assert tokenizer("(()")["input_ids"] == [1, 0, 0, 1]
    assert tokenizer.decode([0, 1, 1], skip_special_tokens=True) == "())"
    loaded = load_model(tmp_path / "model", is_offline=True)
    torch.testing.assert_close(task.distribution(loaded), task.distribution(model), atol=0, rtol=0)
    assert eos_ids(loaded, tokenizer) == frozenset()


def test_settings_are_those_of_the_task() -> None:
    config = DARConfig(output_dir="none", use_cpu=True, **SETTINGS)
    assert math.isclose(config.alpha, config.beta)
    assert (config.adv_norm, config.prompts_per_step, config.dar_k) == ("none", 12, 8)
