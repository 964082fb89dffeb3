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

import math
from typing import Literal

import torch
from torch import Tensor

Normalization = Literal["none", "per_prompt", "batch"]
Baseline = Literal["mean", "leave_one_out"]

MAX_LOG_WEIGHT = math.log(torch.finfo(torch.float32).max)
"""Exponents are held below this (88.7), so that no weight overflows before it is clipped."""


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
    valid_PK = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid  # noqa: N806 - shape suffix
    rewards_PK = rewards.float().masked_fill(~valid_PK, 0.0)  # noqa: N806 - shape suffix
    count_P1 = valid_PK.sum(dim=1, keepdim=True)  # noqa: N806 - shape suffix
