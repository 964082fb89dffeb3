"""Direct Advantage Regression as pure functions (He et al., arXiv 2504.14177 and 2602.11523).

The policy of the next step is regressed onto the optimum of a reward with a pull towards two
anchors: the frozen reference pi_ref (strength alpha) and the sampling policy pi_t (strength beta):

    max_pi  E_pi[A] - alpha KL(pi || pi_ref) - beta KL(pi || pi_t)                               (1)
    pi*  ~  pi_ref^(alpha / (alpha + beta)) pi_t^(beta / (alpha + beta)) exp(A / (alpha + beta)) (2)

With samples from pi_t, that regression is maximum likelihood with the weights pi* / pi_t:

    A     = r - baseline, normalised                                             (3)
    log w = alpha / (alpha + beta) (log pi_ref - log pi_t) + A / (alpha + beta)  (4)
    L     = - mean( min(w, clip) log pi )                                        (5)

They are computed by (3) `normalized_advantages`, (4) `importance_weights` and (5) `dar_loss`.

Shapes: P prompts, K completions of each; where their number differs, K is the largest, and the rest
is not valid. Log-probabilities are sums over the tokens of a completion, its end-of-sequence token
included, in nats, at temperature 1. float64 stays float64; everything else is computed in float32.

Departures from the papers, each off by default here and in the presets ``paper`` and ``reference``:

1. ``baseline="leave_one_out"``: the baseline of a completion is the mean of its siblings. With the
   mean over all K, which includes the completion itself, every advantage is smaller by the factor
   1 - 1/K, as if alpha and beta were larger.
2. ``valid``: a completion without a reward is left out of every mean, deviation and loss. It never
   counts as 0: a service that fails on a good completion must not teach the policy to avoid it.
3. ``lengths``: log pi_ref - log pi_t is divided by the completion's tokens. As a sum it drifts by
   tens of nats over a few hundred tokens, and then the weight depends more on a completion's length
   than on its reward.
4. ``tie_tolerance``: in a group whose rewards lie within it, all advantages are 0. Normalising by a
   deviation would turn the noise in the last digits of a reward into +1 and -1. A group without
   information can also be dropped (`tied`).
5. `self_normalized`: clipped weights are divided by their mean, so that the size of a step depends
   neither on the scale of the rewards nor on how far the policy has moved.
6. ``min_ess``: if few completions would dominate the step, log w is multiplied by the largest
   number in [0, 1] that keeps the effective sample size at ``min_ess``, as if alpha and beta were
   both divided by it, in this step alone.
7. Behavior log-probabilities are those of the sampled distribution, including temperature, filters
   and penalties; the papers use the policy's own. `dar.training.sampling.sampler` records the one
   or the other, and nothing here depends on which.
8. `control_variates`: each weight is reduced by the probability of the completion under the trained
   policy divided by that under the distribution that sampled it, which is 1 where they are the
   same. The expected gradient stays, because E_pi[grad log pi] = 0; its noise falls, because a
   completion of average weight is no longer trained on.
"""

import math

import torch
from torch import Tensor

from dar.protocol.spec import Baseline, Normalization, WeightNormalization

MAX_LOG_WEIGHT = 88.0
"""Largest exponent: no weight overflows before it is clipped. float32 ends at e^88.72."""
LEAST_DEVIATION = 1e-6
"""Least deviation by which advantages are divided, in units of the reward."""
HALVINGS = 40
"""Halvings of [0, 1] in the search for the power of departure 6: finer than float32."""


def normalized_advantages(
    rewards: Tensor,
    *,
    mode: Normalization,
    baseline: Baseline = "mean",
    valid: Tensor | None = None,
    eps: float = LEAST_DEVIATION,
    tie_tolerance: float = 0.0,
) -> Tensor:
    """How much better each completion is than its siblings: equation (3), departures 1, 2, 4.

    Deviations are biased (divided by n). With K = 1 there are no siblings, and all advantages
    are 0.

    Args:
        rewards: ``[P, K]``; values that are not valid do not matter and may be NaN.
        mode: ``"none"`` leaves r - baseline; ``"per_prompt"`` divides by the deviation of the
            prompt's rewards; ``"batch"`` subtracts the mean of all advantages and divides by their
            deviation.
        baseline: Mean over the prompt's valid completions, with or without the completion itself.
        valid: ``[P, K]`` boolean, the scored completions; absent: all.
        eps: Lower bound of the deviation.
        tie_tolerance: Prompts whose rewards lie within this range get advantages of 0; in units of
            reward.

    Returns:
        ``[P, K]``; 0 where not valid.

    Raises:
        ValueError: ``mode`` or ``baseline`` is unknown.
    """
    if mode not in ("none", "per_prompt", "batch") or baseline not in ("mean", "leave_one_out"):
        raise ValueError(f"unknown mode {mode!r} or baseline {baseline!r}")
    valid_PK = _all_of(rewards) if valid is None else valid
    rewards_PK = precise(rewards).masked_fill(~valid_PK, 0.0)
    counts_P1 = valid_PK.sum(dim=1, keepdim=True, dtype=rewards_PK.dtype)
    mean_P1 = rewards_PK.sum(dim=1, keepdim=True) / counts_P1.clamp(min=1)
    telling_PK = valid_PK & ~tied(rewards, tolerance=tie_tolerance, valid=valid).unsqueeze(1)
    centred_PK = (rewards_PK - mean_P1).masked_fill(~telling_PK, 0.0)
    advantages_PK = centred_PK
    if baseline == "leave_one_out":
        # r - mean of the n - 1 others = (r - mean of all n) n / (n - 1)
        advantages_PK = centred_PK * (counts_P1 / (counts_P1 - 1).clamp(min=1))
    if mode == "per_prompt":
        std_P1 = (centred_PK.square().sum(dim=1, keepdim=True) / counts_P1.clamp(min=1)).sqrt()
        advantages_PK = advantages_PK / std_P1.clamp(min=eps)
    elif mode == "batch":
        count = counts_P1.sum().clamp(min=1)
        deviations_PK = advantages_PK - advantages_PK.sum() / count
        std = (deviations_PK.masked_fill(~valid_PK, 0.0).square().sum() / count).sqrt()
        advantages_PK = deviations_PK.masked_fill(~telling_PK, 0.0) / std.clamp(min=eps)
    return advantages_PK


def tied(rewards: Tensor, *, tolerance: float = 0.0, valid: Tensor | None = None) -> Tensor:
    """Which prompts have rewards that are all equal, within a tolerance: departure 4.

    Args:
        rewards: ``[P, K]``.
        tolerance: Largest difference of two equal rewards.
        valid: ``[P, K]`` boolean, the scored completions; absent: all.

    Returns:
        ``[P]`` boolean; true also where a prompt has fewer than two scored completions.
    """
    valid_PK = _all_of(rewards) if valid is None else valid
    rewards_PK = precise(rewards)
    largest_P = rewards_PK.masked_fill(~valid_PK, -math.inf).amax(dim=1)
    least_P = rewards_PK.masked_fill(~valid_PK, math.inf).amin(dim=1)
    return largest_P - least_P <= tolerance


def importance_weights(
    advantages: Tensor,
    ref_logps: Tensor,
    behavior_logps: Tensor,
    *,
    alpha: float,
    beta: float,
    clip: float,
    lengths: Tensor | None = None,
    min_ess: float = 0.0,
    valid: Tensor | None = None,
) -> Tensor:
    """Weight of each completion: equation (4), then ``min(w, clip)``; departures 2, 3 and 6.

    Args:
        advantages: Any shape.
        ref_logps: Log-probabilities under the frozen reference, same shape, nats.
        behavior_logps: Log-probabilities under the sampled distribution, same shape, nats.
        alpha: Pull towards the reference; at least 0.
        beta: Pull towards the sampling policy; above 0.
        clip: Largest weight; above 0.
        lengths: Tokens of each completion, same shape, for a log-ratio per token; absent: per
            completion.
        min_ess: Least effective sample size of the weights before they are clipped; 0: off.
        valid: Boolean, same shape, the completions that count; absent: all.

    Returns:
        Weights in ``[0, clip]``, same shape, 0 where not valid; constants to autograd.

    Raises:
        ValueError: alpha, beta, clip or min_ess is out of range.
    """
    if alpha < 0 or beta <= 0 or clip <= 0 or not 0 <= min_ess < 1:
        raise ValueError(
            "alpha must be at least 0, beta and clip above 0, min_ess at least 0 and below 1"
        )
    log_ratios = precise(ref_logps.detach()) - precise(behavior_logps.detach())
    if lengths is not None:
        log_ratios = log_ratios / lengths.clamp(min=1)
    temperature = alpha + beta
    log_weights = alpha / temperature * log_ratios + precise(advantages.detach()) / temperature
    log_weights = flattening_power(log_weights, min_ess=min_ess, valid=valid) * log_weights
    weights = log_weights.clamp(max=MAX_LOG_WEIGHT).exp().clamp(max=clip)
    return weights if valid is None else weights.masked_fill(~valid, 0.0)


def flattening_power(log_weights: Tensor, *, min_ess: float, valid: Tensor | None = None) -> Tensor:
    """The largest power in [0, 1] under which weights keep an effective sample size: departure 6.

    The effective sample size falls as the power rises (its logarithm is 2 L(t) - L(2t) with the
    convex function L(t) = log sum w^t), so halving an interval finds it. Clipping afterwards can
    only raise it.

    Args:
        log_weights: Any shape.
        min_ess: Least effective sample size, in [0, 1).
        valid: Boolean, same shape, the weights that count; absent: all.

    Returns:
        Scalar; 1 where the weights need no flattening, or none is valid.
    """
    kept = (log_weights if valid is None else log_weights[valid]).flatten()
    enough, too_much = 0.0, 1.0
    if not kept.numel() or _ess_of_power(kept, too_much) >= min_ess:
        return log_weights.new_tensor(1.0)
    for _ in range(HALVINGS):
        middle = (enough + too_much) / 2
        if _ess_of_power(kept, middle) >= min_ess:
            enough = middle
        else:
            too_much = middle
    return log_weights.new_tensor(enough)


def _ess_of_power(log_weights: Tensor, power: float) -> float:
    powered = power * log_weights
    return float(effective_sample_size((powered - powered.max()).exp()))


def effective_sample_size(weights: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Effective share of the completions: ``(sum w)^2 / (n sum w^2)``.

    Args:
        weights: Any shape, none negative.
        valid: Boolean, same shape, the weights that count; absent: all.

    Returns:
        Scalar: from 1/n, if only one weight is above 0, to 1, if all are equal; 0 if none is above
        0.
    """
    kept = precise(weights if valid is None else weights[valid])
    shares = kept / kept.max().clamp(min=torch.finfo(kept.dtype).tiny) if kept.numel() else kept
    squares = shares.square().sum() * max(1, shares.numel())
    return shares.sum().square() / squares.clamp(min=torch.finfo(kept.dtype).tiny)


def self_normalized(
    weights: Tensor, *, mode: WeightNormalization, valid: Tensor | None = None
) -> Tensor:
    """Weights of mean 1: departure 5. Their ratios stay the same, so some may exceed the clip now.

    Args:
        weights: ``[P, K]``, none negative, 0 where not valid.
        mode: ``"batch"`` divides by the mean over all, ``"per_prompt"`` by the mean over the
            prompt, ``"none"`` by nothing.
        valid: ``[P, K]`` boolean, the completions that count; absent: all.

    Returns:
        ``[P, K]``; weights whose mean is 0 stay 0.

    Raises:
        ValueError: ``mode`` is unknown.
    """
    if mode == "none":
        return weights
    if mode not in ("batch", "per_prompt"):
        raise ValueError(f"unknown mode {mode!r}")
    valid_PK = _all_of(weights) if valid is None else valid
    dims = (0, 1) if mode == "batch" else (1,)
    sums = weights.sum(dim=dims, keepdim=True)
    means = sums / valid_PK.sum(dim=dims, keepdim=True).clamp(min=1)
    return weights / means.clamp(min=torch.finfo(weights.dtype).tiny)


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


def control_variates(policy_logps: Tensor, behavior_logps: Tensor, *, clip: float) -> Tensor:
    """What is taken from each weight before training: departure 8.

    Args:
        policy_logps: Log-probabilities under the trained policy, any shape, nats.
        behavior_logps: Log-probabilities under the sampled distribution, same shape, nats.
        clip: Largest value; above 0.

    Returns:
        ``pi / mu`` in ``[0, clip]``, same shape; constants to autograd.
    """
    log_ratios = precise(policy_logps.detach()) - precise(behavior_logps)
    return log_ratios.clamp(max=MAX_LOG_WEIGHT).exp().clamp(max=clip)


def precise(values: Tensor) -> Tensor:
    """``values`` in float32, or still in float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _all_of(values: Tensor) -> Tensor:
    return torch.ones_like(values, dtype=torch.bool)
