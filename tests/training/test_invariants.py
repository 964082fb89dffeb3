"""What advantages and weights keep under changes that must not matter, and the bounds that they
keep.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from dar.training.loss import importance_weights, normalized_advantages, self_normalized

FEW = settings(max_examples=25, derandomize=True, deadline=None)
MODES = st.sampled_from(["none", "per_prompt", "batch"])
BASELINES = st.sampled_from(["mean", "leave_one_out"])
REWARDS = arrays("float64", (3, 4), elements=st.integers(-8, 8).map(lambda n: n / 4))
MASKS = arrays("bool", (3, 4))
LOGPS = arrays("float64", (3, 4), elements=st.floats(-60, -1))
STRENGTHS = {"alpha": 0.1, "beta": 0.3}


def of(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


@FEW
@given(
    rewards=REWARDS,
    mask=MASKS,
    mode=MODES,
    baseline=BASELINES,
    shifts=arrays("float64", (3, 1), elements=st.floats(-9, 9)),
)
def test_a_prompts_rewards_can_be_shifted_without_changing_anything(
    rewards: Any, mask: Any, mode: Any, baseline: Any, shifts: Any
) -> None:
    options = {
        "mode": mode,
        "baseline": baseline,
        "valid": torch.as_tensor(mask),
        "tie_tolerance": 1e-6,
    }
    plain_PK = normalized_advantages(of(rewards), **options)
    shifted_PK = normalized_advantages(of(rewards) + of(shifts), **options)
    torch.testing.assert_close(shifted_PK, plain_PK, rtol=1e-9, atol=1e-9)


@FEW
@given(
    rewards=REWARDS,
    mask=MASKS,
    logps=LOGPS,
    mode=MODES,
    baseline=BASELINES,
    prompts=st.permutations(range(3)),
    completions=st.permutations(range(4)),
    least=st.sampled_from([0.0, 0.7]),
)
def test_the_order_of_prompts_and_completions_changes_nothing(
    rewards: Any,
    mask: Any,
    logps: Any,
    mode: Any,
    baseline: Any,
    prompts: Any,
    completions: Any,
    least: float,
) -> None:
    def weights(order: Callable[[Any], Tensor]) -> Tensor:
        valid_PK = order(mask).bool()
        advantages_PK = normalized_advantages(
            order(rewards), mode=mode, baseline=baseline, valid=valid_PK
        )
        weights_PK = importance_weights(
            advantages_PK,
            order(logps),
            order(logps) * 0.9,
            **STRENGTHS,
            clip=20,
            min_ess=least,
            valid=valid_PK,
        )
        return self_normalized(weights_PK, mode="batch", valid=valid_PK)

    def permuted(values: Any) -> Tensor:
        return of(values)[list(prompts)][:, list(completions)]

    torch.testing.assert_close(weights(permuted), permuted(weights(of)), rtol=1e-6, atol=1e-9)


@FEW
@given(advantages=LOGPS, logps=LOGPS, clip=st.floats(0.1, 100))
def test_no_weight_exceeds_the_clip(advantages: Any, logps: Any, clip: float) -> None:
    for sign in (1, -1):
        weights_PK = importance_weights(
            sign * of(advantages), of(logps), of(logps.T.reshape(3, 4)), **STRENGTHS, clip=clip
        )
        assert weights_PK.min() >= 0
        assert weights_PK.max() <= clip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_float64_is_kept_and_less_than_float32_is_raised(dtype: torch.dtype) -> None:
    values = torch.tensor([[1, 2, 4]], dtype=dtype)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    advantages = normalized_advantages(values, mode="batch")
    weights = importance_weights(advantages, values, values, **STRENGTHS, clip=20)
    assert advantages.dtype == weights.dtype == kept
