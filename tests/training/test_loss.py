import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dar.rewards.base import SampleReward
from dar.training.data.rows import Prompt, TokenPair
from dar.training.loss import (
    MAX_LOG_WEIGHT,
    dar_loss,
    importance_weights,
    normalized_advantages,
)
from dar.training.step.metrics import step_metrics
from dar.training.step.records import ScoredStep


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def case_names(cases: list[dict[str, Any]]) -> list[str]:
    return [case["name"] for case in cases]


def test_all_golden_cases_are_here(weight_cases: list[dict[str, Any]]) -> None:
    assert len(set(case_names(weight_cases))) == 15


@pytest.mark.parametrize("index", range(15))
def test_weights_and_loss_agree_with_the_golden_figures(
    weight_cases: list[dict[str, Any]], index: int
) -> None:
    case = weight_cases[index]
    inputs, expected = case["inputs"], case["expected"]
    policy_PK = tensor(inputs["policy_logps"]).requires_grad_()
    ref_PK = tensor(inputs["ref_logps"]) * (not inputs["reference_free"])
    behavior = inputs["behavior_logps"]
    behavior_PK = policy_PK.detach() if behavior is None else tensor(behavior)

    advantages_PK = normalized_advantages(tensor(inputs["rewards"]), mode=inputs["adv_norm"])
    weights_PK = importance_weights(
        advantages_PK,
        ref_PK,
        behavior_PK,
        alpha=inputs["alpha"],
        beta=inputs["beta"],
        clip=inputs["dar_wclip"],
    )
    loss = dar_loss(weights_PK, policy_PK)
    loss.backward()

    close = {"rtol": 1e-5, "atol": 1e-6}
    for row in range(inputs["B"]):
        at_clamp = case["name"] == "reward_scale_extremes" and row == 1
        tolerance = {"rtol": 1e-3, "atol": 1e-6} if at_clamp else close
        torch.testing.assert_close(
            advantages_PK[row], tensor(expected["advantages"][row]), **tolerance
        )
        torch.testing.assert_close(weights_PK[row], tensor(expected["weights"][row]), **tolerance)
        assert policy_PK.grad is not None
        torch.testing.assert_close(
            policy_PK.grad[row], tensor(expected["dloss_dpolicy_logps"][row]), **tolerance
        )
        torch.testing.assert_close(
            -weights_PK[row] * policy_PK[row].detach(),
            tensor(expected["per_sequence_losses"][row]),
            **tolerance,
        )
    tolerance = {"rtol": 1e-3} if case["name"] == "reward_scale_extremes" else {"rtol": 1e-5}
    torch.testing.assert_close(loss.detach(), tensor(expected["loss"]), atol=1e-6, **tolerance)


METRICS = {
    f"dar/{name}": f"dar/{name}"
    for name in (
        "rewards_mean", "rewards_std", "advantages_mean", "advantages_std", "weights_mean", "weights_max",
        "weights_clip_fraction", "logps_policy", "logps_ref", "logps_behavior", "loss",
    )
}  # fmt: skip
ON_POLICY_METRICS = METRICS | {"dar/kl_from_ref": "dar/kl_ref"}
"""The golden figure is that of the policy, and ours that of what sampled."""


@pytest.mark.parametrize("index", range(15))
def test_metrics_agree_with_the_golden_figures(
    weight_cases: list[dict[str, Any]], index: int
) -> None:
    case = weight_cases[index]
    inputs, expected = case["inputs"], case["expected"]
    count = inputs["B"] * inputs["K"]
    behavior = inputs["behavior_logps"] or inputs["policy_logps"]
    step = ScoredStep(
        number=1,
        epoch=1.0,
        prompts=[Prompt([2], "", None, {}, 0)] * inputs["B"],
        pairs=[TokenPair([2], [4])] * count,
        texts=[""] * count,
        finish_reasons=["stop"] * count,
        rewards=[SampleReward(r, "reward", None, {}) for row in inputs["rewards"] for r in row],
        behavior_logps_B=tensor(behavior).flatten(),
        ref_logps_B=tensor(inputs["ref_logps"]).flatten() * (not inputs["reference_free"]),
    )
    step.valid_B[:] = True
    step.advantages_B = tensor(expected["advantages"]).flatten()
    step.weights_B = tensor(expected["weights"]).flatten()
    step.clipped_B = step.weights_B >= inputs["dar_wclip"]
    step.policy_logps_B = tensor(inputs["policy_logps"]).flatten()

    values = step_metrics(step)

    names = ON_POLICY_METRICS if inputs["behavior_logps"] is None else METRICS
    for golden, name in names.items():
        assert values[name] == pytest.approx(expected["metrics"][golden], rel=1e-5, abs=1e-5), name
    weights = step.weights_B.double()
    share = weights.sum() ** 2 / (weights**2).sum() / count
    assert values["dar/effective_sample_size"] == pytest.approx(share.item(), rel=1e-4)


@pytest.mark.parametrize("index", range(15))
def test_both_terms_of_the_log_weight_agree_with_the_golden_figures(
    weight_cases: list[dict[str, Any]], index: int
) -> None:
    inputs, expected = weight_cases[index]["inputs"], weight_cases[index]["expected"]
    ref_PK = tensor(inputs["ref_logps"]) * (not inputs["reference_free"])
    behavior_PK = tensor(inputs["behavior_logps"] or inputs["policy_logps"])
    strengths = {"alpha": inputs["alpha"], "beta": inputs["beta"], "clip": math.inf}
    none_PK = torch.zeros_like(ref_PK)
    for name, weights_PK in (
        ("log_reg_weight", importance_weights(none_PK, ref_PK, behavior_PK, **strengths)),
        (
            "log_adv_weight",
            importance_weights(tensor(expected["advantages"]), none_PK, none_PK, **strengths),
        ),
    ):
        expected_PK = tensor(expected[name]).clamp(max=MAX_LOG_WEIGHT).exp()
        torch.testing.assert_close(weights_PK, expected_PK, rtol=1e-4, atol=1e-6)


def test_leave_one_out_scales_advantages_by_k_over_k_minus_one() -> None:
    rewards_PK = torch.randn(3, 4)
    mean = normalized_advantages(rewards_PK, mode="none")
    left_out = normalized_advantages(rewards_PK, mode="none", baseline="leave_one_out")
    torch.testing.assert_close(left_out, mean * 4 / 3)


@pytest.mark.parametrize("mode", ["none", "per_prompt", "batch"])
@pytest.mark.parametrize("missing", [0.0, float("nan"), 1e6])
def test_what_stands_at_a_missing_reward_changes_nothing(mode: Any, missing: float) -> None:
    rewards_PK = tensor([[1.0, 2.0, 4.0, missing], [0.5, missing, missing, 0.1]])
    valid_PK = torch.tensor([[True, True, True, False], [True, False, False, True]])

    advantages_PK = normalized_advantages(rewards_PK, mode=mode, valid=valid_PK)

    assert torch.equal(advantages_PK[~valid_PK], torch.zeros(3))
    if mode == "none":
        torch.testing.assert_close(advantages_PK[0, :3], tensor([1.0, 2.0, 4.0]) - tensor(7.0 / 3))
    if mode == "per_prompt":
        alone = normalized_advantages(rewards_PK[:1, :3], mode=mode)
        torch.testing.assert_close(advantages_PK[:1, :3], alone)


def test_the_loss_counts_valid_completions_only() -> None:
    weights, policy = tensor([1.0, 2.0, 100.0]), tensor([-1.0, -3.0, float("-inf")])
    loss = dar_loss(weights, policy, valid=torch.tensor([True, True, False]))
    assert loss.item() == pytest.approx(3.5)
    assert dar_loss(weights, policy, valid=torch.zeros(3, dtype=torch.bool)).item() == 0


def test_huge_log_weights_are_clipped_and_never_overflow() -> None:
    weights = importance_weights(
        tensor([1e30, -1e30]), torch.zeros(2), torch.zeros(2), alpha=0, beta=1e-3, clip=20
    )
    assert weights.tolist() == [20, 0]
    unclipped = importance_weights(
        tensor([1e30]), torch.zeros(1), torch.zeros(1), alpha=0, beta=1e-3, clip=math.inf
    )
    assert unclipped.isfinite().all()
    assert unclipped.item() > 1e38


def test_no_gradient_flows_through_the_weights() -> None:
    logps = torch.zeros(2, requires_grad=True)
    weights = importance_weights(torch.zeros(2), logps, logps, alpha=1, beta=1, clip=1)
    assert not weights.requires_grad


def test_unknown_modes_and_values_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown mode"):
        normalized_advantages(torch.zeros(1, 2), mode="zscore")  # type: ignore[arg-type]  # the point of the test
    with pytest.raises(ValueError, match="above 0"):
        importance_weights(
            torch.zeros(1), torch.zeros(1), torch.zeros(1), alpha=0.1, beta=0, clip=1
        )
