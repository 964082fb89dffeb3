"""The frontier of reward against KL, against cases where both are known exactly."""

import math

import numpy as np
import pytest
import torch

from dar.training.calibration.frontier import Frontier, Values, pooled_deviation
from dar.training.demo.brackets import Brackets, divergence


def _normal(prompts: int, samples: int, seed: int = 0) -> Values:
    return np.random.default_rng(seed).normal(size=(prompts, samples))


@pytest.fixture(scope="module")
def task() -> Brackets:
    return Brackets()


@pytest.fixture(scope="module")
def reference(task: Brackets) -> torch.Tensor:
    """The reference of the brackets task, listed in full."""
    return task.distribution(task.model(0))


def _drawn(logps_PY: torch.Tensor, samples: int, copies: int = 6, seed: int = 0) -> torch.Tensor:
    """Numbers of completions, ``[P, N]``, where each prompt occurs several times."""
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(
        logps_PY.exp().repeat(copies, 1), samples, replacement=True, generator=generator
    )


@pytest.mark.parametrize("budget", [0.5, 1.0, 1.5])
def test_on_brackets_a_budget_gives_the_alpha_whose_exact_optimum_has_that_kl(
    task: Brackets, reference: torch.Tensor, budget: float
) -> None:
    rewards_PN = task.rewards.repeat(6, 1).gather(1, _drawn(reference, 64))
    choice = Frontier(rewards_PN.numpy()).choose(budget)
    assert choice is not None
    assert choice.ending == "reached"
    target_PY = (reference + task.rewards / choice.point.alpha).log_softmax(dim=1)
    assert divergence(target_PY, reference) == pytest.approx(budget, abs=0.1)
    reward = (target_PY.exp() * task.rewards).sum(dim=1).mean().item()
    assert choice.point.reward == pytest.approx(reward, abs=0.03)


def test_samples_of_another_distribution_are_corrected_by_their_log_ratios(
    task: Brackets, reference: torch.Tensor
) -> None:
    """As after some training: a policy near the optimum needs few samples for its KL."""
    alpha = 0.2
    target_PY = (reference + task.rewards / alpha).log_softmax(dim=1)
    policy_PY = (0.8 * target_PY + 0.2 * reference).log_softmax(dim=1)
    drawn_PN = _drawn(policy_PY, 32)
    ratios_PN = (reference - policy_PY).repeat(6, 1).gather(1, drawn_PN)
    rewards_PN = task.rewards.repeat(6, 1).gather(1, drawn_PN)
    point = Frontier(rewards_PN.numpy(), ratios_PN.numpy()).at(alpha)
    assert point.is_trusted
    assert point.kl == pytest.approx(divergence(target_PY, reference), abs=0.05)
    reward = (target_PY.exp() * task.rewards).sum(dim=1).mean().item()
    assert point.reward == pytest.approx(reward, abs=0.02)


def test_normal_rewards_give_the_alpha_of_the_closed_form() -> None:
    """KL = sigma^2 / (2 alpha^2), and the gain in reward is sigma^2 / alpha."""
    choice = Frontier(3 + 2 * _normal(16, 256)).choose(0.5)
    assert choice is not None
    assert choice.ending == "reached"
    alpha = choice.point.alpha
    assert 4 / (2 * alpha**2) == pytest.approx(0.5, rel=0.1)
    assert choice.point.reward == pytest.approx(3 + 4 / alpha, rel=0.05)


def test_halving_removes_the_bias_of_few_samples() -> None:
    """With 32 samples the plain estimate is too low: averaged over many prompts, it stays so."""
    point = Frontier(_normal(2000, 32)).at(1.0)
    assert point.kl == pytest.approx(0.5, rel=0.04)


def test_log_ratios_that_are_not_those_of_the_samples_give_no_alpha() -> None:
    """exp(log ref - log mu) has mean 1 over samples of mu, whatever the rewards are."""
    assert Frontier(_normal(16, 64), np.full((16, 64), -4.0)).choose(1.0) is None


@pytest.mark.parametrize("samples", [8, 16, 32])
def test_too_few_samples_for_a_budget_are_not_trusted(samples: int) -> None:
    """With n samples no estimate exceeds log n, so 1.5 nats of normal rewards need more."""
    choice = Frontier(_normal(16, samples)).choose(1.5)
    assert choice is not None
    assert choice.ending == "untrusted"
    # the alpha that the deviation gives is the larger one, and about right: KL = s^2 / (2 alpha^2)
    assert 1 / (2 * choice.point.alpha**2) == pytest.approx(1.5, rel=0.3)


def test_where_samples_are_not_trusted_the_estimate_is_taken_if_it_is_the_more_careful_one() -> (
    None
):
    """Of rare rewards the deviation alone gives three times the KL of the budget."""
    random = np.random.default_rng(0)
    choice = Frontier((random.random((16, 16)) < 0.03).astype(float)).choose(1.0)
    assert choice is not None
    assert choice.ending == "untrusted"
    share = 0.03 / (0.03 + 0.97 * math.exp(-1 / choice.point.alpha))
    exact = share * math.log(share / 0.03) + (1 - share) * math.log((1 - share) / 0.97)
    assert 0.5 < exact < 2.0


def test_rewards_of_two_values_have_no_kl_beyond_that_of_the_better_one() -> None:
    """Of rewards 0 and 1 the optimum of alpha = 0 is all ones, at -log of their share."""
    rewards = np.zeros((16, 64))
    rewards[:, ::2] = 1.0
    rewards = np.random.default_rng(0).permuted(rewards, axis=1)
    choice = Frontier(rewards).choose(1.5)
    assert choice is not None
    assert choice.ending == "saturated"
    assert choice.point.kl == pytest.approx(math.log(2), rel=0.06)
    assert choice.point.reward > 0.97


@pytest.mark.parametrize("power", [-200, -7, 7, 200])
def test_rewards_times_a_power_of_two_give_exactly_that_times_alpha(power: int) -> None:
    rewards = _normal(16, 128).round(6)
    plain = Frontier(rewards).choose(1.0)
    scaled = Frontier(rewards * 2.0**power).choose(1.0)
    assert plain is not None
    assert scaled is not None
    assert scaled.point.alpha == plain.point.alpha * 2.0**power
    assert scaled.point.kl == plain.point.kl
    assert pooled_deviation(rewards * 2.0**power) == pooled_deviation(rewards) * 2.0**power


def test_a_constant_added_to_a_prompts_rewards_changes_nothing_but_the_mean() -> None:
    rewards = _normal(16, 64)
    plain, moved = Frontier(rewards).at(1.0), Frontier(rewards + 64).at(1.0)
    assert moved.kl == pytest.approx(plain.kl)
    assert moved.reward == pytest.approx(plain.reward + 64)


def test_samples_without_a_reward_are_left_out() -> None:
    rewards = _normal(4, 64)
    holes = np.concatenate([rewards, np.full((4, 64), np.nan)], axis=1)
    more = np.concatenate([holes, np.full((1, 128), np.nan)])
    assert Frontier(more).prompt_count == 4
    assert Frontier(more).sample_count == 64
    assert Frontier(more).at(1.0).kl == pytest.approx(Frontier(rewards).at(1.0).kl, rel=0.05)


def test_too_few_rewards_are_refused_and_equal_ones_have_no_alpha() -> None:
    with pytest.raises(ValueError, match="no prompt has 8 usable rewards"):
        Frontier(_normal(16, 7))
    equal = Frontier(np.tile(np.arange(3.0)[:, None], (1, 16)))
    assert equal.unit == 0
    assert equal.choose(1.0) is None
    with pytest.raises(ValueError, match="rewards that differ"):
        equal.at(1.0)


def test_the_points_of_a_frontier_rise_and_end_where_trust_ends() -> None:
    points = Frontier(_normal(16, 64)).points([0.25, 0.5, 1.0, 3.0, 5.0])
    assert 2 <= len(points) < 5
    assert all(point.is_trusted for point in points)
    assert points == sorted(points, key=lambda point: point.reward)
