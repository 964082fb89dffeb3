"""Direct Advantage Regression as three pure functions (He et al., arXiv 2504.14177 and 2602.11523).

The policy of the next step is regressed onto the optimum of a reward that is pulled towards two anchors, the frozen reference
pi_ref (strength alpha) and the policy pi_t that sampled (strength beta):

    max_pi  E_pi[A] - alpha KL(pi || pi_ref) - beta KL(pi || pi_t)                                          (1)
    pi*  ~  pi_ref^(alpha / (alpha + beta))  pi_t^(beta / (alpha + beta))  exp(A / (alpha + beta))          (2)

Sampling from pi_t, that regression is maximum likelihood on the policy's own samples, each with the weight pi* / pi_t:

    A     = r - baseline, normalised                                              `normalized_advantages`   (3)
    log w = alpha / (alpha + beta) (log pi_ref - log pi_t) + A / (alpha + beta)   `importance_weights`      (4)
    L     = - mean( min(w, clip) log pi )                                         `dar_loss`                (5)

Shapes: P prompts, K completions of each. Log-probabilities are sums over the tokens of a completion, its end-of-sequence
token included, in nats, at temperature 1. Everything is computed in float32.

Departures from the papers, each off by default here:

1. ``baseline="leave_one_out"``: the baseline of a completion is the mean of its siblings. With the mean over all K, which
   includes the completion itself, every advantage is smaller by the factor 1 - 1/K, as if alpha and beta were larger.
2. ``valid``: a completion without a reward is left out of every mean, deviation and loss. It never counts as 0.
"""

from typing import Literal

import torch
from torch import Tensor

Normalization = Literal["none", "per_prompt", "batch"]
Baseline = Literal["mean", "leave_one_out"]
LogRatio = Literal["sum", "mean"]
WeightNormalization = Literal["none", "batch", "per_prompt"]
Behavior = Literal["sampled", "policy"]

MAX_LOG_WEIGHT = 88.0
"""Exponents are held at this, so that no weight overflows before it is clipped: float32 ends at e^88.72."""


def normalized_advantages(
    rewards: Tensor,
    *,
    mode: Normalization,
    baseline: Baseline = "mean",
    valid: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """How much better each completion is than its siblings: equation (3).

    Deviations are biased (divided by n). With K = 1 there are no siblings, and all advantages are 0.

    Args:
        rewards: ``[P, K]``; what stands at places that are not valid does not matter, NaN included.
        mode: ``"none"`` leaves r - baseline; ``"per_prompt"`` divides by the deviation of the prompt's rewards;
            ``"batch"`` subtracts the mean of all advantages and divides by their deviation.
        baseline: Mean over the prompt's valid completions, with or without the completion itself.
        valid: ``[P, K]`` boolean, the scored completions; absent: all.
        eps: Least deviation that is divided by.

    Returns:
        ``[P, K]`` float32; 0 where not valid.

    Raises:
        ValueError: ``mode`` or ``baseline`` is unknown.
    """
    if mode not in ("none", "per_prompt", "batch") or baseline not in ("mean", "leave_one_out"):
        raise ValueError(f"unknown mode {mode!r} or baseline {baseline!r}")
    rewards_PK = rewards.float()
    valid_PK = torch.ones_like(rewards_PK, dtype=torch.bool) if valid is None else valid
    rewards_PK = rewards_PK.masked_fill(~valid_PK, 0.0)
    count_P1 = valid_PK.sum(dim=1, keepdim=True)
    mean_P1 = rewards_PK.sum(dim=1, keepdim=True) / count_P1.clamp(min=1)
    centred_PK = (rewards_PK - mean_P1).masked_fill(~valid_PK, 0.0)
    advantages_PK = centred_PK
    if baseline == "leave_one_out":
        advantages_PK = centred_PK * (count_P1 / (count_P1 - 1).clamp(min=1))
    if mode == "per_prompt":
        std_P1 = (centred_PK.square().sum(dim=1, keepdim=True) / count_P1.clamp(min=1)).sqrt()
        advantages_PK = advantages_PK / std_P1.clamp(min=eps)
    elif mode == "batch":
        count = count_P1.sum().clamp(min=1)
        mean = advantages_PK.sum() / count
        deviations_PK = (advantages_PK - mean).masked_fill(~valid_PK, 0.0)
        std = (deviations_PK.square().sum() / count).sqrt()
        advantages_PK = deviations_PK / std.clamp(min=eps)
    return advantages_PK


def importance_weights(
    advantages: Tensor,
    ref_logps: Tensor,
    behavior_logps: Tensor,
    *,
    alpha: float,
    beta: float,
    clip: float,
) -> Tensor:
    """Weight of each completion in the regression: equation (4), then ``min(w, clip)``.

    Args:
        advantages: Any shape.
        ref_logps: Log-probabilities under the frozen reference, same shape, nats.
        behavior_logps: Log-probabilities under what really sampled, same shape, nats.
        alpha: Pull towards the reference; at least 0.
        beta: Pull towards the sampling policy; above 0.
        clip: Largest weight; above 0.

    Returns:
        Weights in ``[0, clip]``, float32, same shape; constants to autograd.

    Raises:
        ValueError: alpha, beta or clip is out of range.
    """
    if alpha < 0 or beta <= 0 or clip <= 0:
        raise ValueError("alpha must be at least 0, beta and clip above 0")
    temperature = alpha + beta
    log_ratios = ref_logps.detach().float() - behavior_logps.detach().float()
    log_weights = alpha / temperature * log_ratios + advantages.detach().float() / temperature
    return log_weights.clamp(max=MAX_LOG_WEIGHT).exp().clamp(max=clip)


def dar_loss(weights: Tensor, policy_logps: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Advantage-weighted negative log-likelihood: equation (5).

    Args:
        weights: Any shape; no gradient flows through them.
        policy_logps: Log-probabilities under the trained policy, same shape, nats.
        valid: Boolean, the completions that count; absent: all.

    Returns:
        Scalar: the mean over the completions that count; 0 when none does.
    """
    losses = -weights.detach() * policy_logps
    if valid is None:
        return losses.mean()
    return losses.masked_fill(~valid, 0.0).sum() / valid.sum().clamp(min=1)
