"""How much reward a distance from the reference buys, estimated before anything is trained.

Training converges to pi_alpha ~ pi_ref exp(r / alpha) (see `dar.training.demo.brackets`). Its
expectations are those of the reference under the weights exp(r / alpha). So the rewards of samples
that are drawn once give, for every alpha, the reward and the KL at which training ends:

    log v_i = log pi_ref(y_i) - log mu(y_i) + r_i / alpha        mu: the distribution that sampled
    w_i     = v_i / sum_j v_j                                    of one prompt
    R       = sum_i w_i r_i
    KL      = sum_i w_i r_i / alpha - log( mean_i v_i )          KL(pi_alpha || pi_ref)

averaged over the prompts. Both have a bias of order 1/n for n samples of a prompt. With the same
figures of half the samples, twice the first minus the second removes it. The difference of the two
also shows whether there are enough samples: see `Point.is_trusted`. Where there are not, the alpha
of the estimate is still closer to the budget than the last one for which they suffice.

Rewards are measured in their own unit, the pooled deviation of a prompt's rewards from their mean.
If all rewards are multiplied by a power of two, then so is alpha, to the last bit.

Shapes: P prompts, N samples of each, S splits into two halves.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Flags = NDArray[np.bool_]

LEAST_SAMPLES = 8
"""A prompt with fewer usable rewards is left out of the estimate."""
MOST_DIFFERENCE = 0.1
"""Largest relative difference between the KL of all samples and that of half of them."""
SPLITS = 8
"""Random splits into halves that are averaged: each sample lies in one half of every split."""
GRID = tuple(2.0 ** (6 - j / 4) for j in range(53))
"""Values of alpha that are tried, largest first, in units of the rewards' deviation."""
HALVINGS = 30
"""Halvings of an interval of `GRID`."""
SATURATION = 0.95
"""Share of the largest KL from which on a smaller alpha is not worth its larger weights."""

Ending = Literal["reached", "untrusted", "saturated"]
"""Whether an alpha has the KL that was wanted; ``untrusted``: the samples are too few to say so;
``saturated``: no alpha has a KL that large, as with two values of reward."""


@dataclass(frozen=True, slots=True)
class Point:
    """Where training with an alpha is expected to end."""

    alpha: float
    """In units of reward, for a baseline of the other completions (c = 1)."""
    reward: float
    """Mean reward."""
    kl: float
    """Mean KL to the reference, in nats per completion."""
    is_resolved: bool
    """Whether the KL to the sampling distribution is at most log n - 1, as with n samples no
    estimate of it exceeds log n."""
    is_trusted: bool
    """Whether the samples suffice: it is resolved, and the KLs of halves of them differ from that
    of all by at most `MOST_DIFFERENCE` on average."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The alpha for a budget."""

    point: Point
    ending: Ending


class Frontier:
    """Reward against KL for every alpha, from samples and their rewards.

    Args:
        rewards: ``[P, N]``; NaN where a sample has none.
        log_ratios: ``[P, N]`` log pi_ref - log mu of each sample, in nats; None: the reference
            itself was sampled. Not finite: the sample is left out.

    Raises:
        ValueError: No prompt has at least `LEAST_SAMPLES` usable rewards.
    """

    def __init__(self, rewards: Values, log_ratios: Values | None = None) -> None:
        ratios_PN = np.zeros_like(rewards) if log_ratios is None else log_ratios
        usable_PN = np.isfinite(rewards) & np.isfinite(ratios_PN)
        enough_P = usable_PN.sum(axis=1) >= LEAST_SAMPLES
        if not enough_P.any():
            raise ValueError(f"no prompt has {LEAST_SAMPLES} usable rewards")
        usable_PN = usable_PN[enough_P]
        self.prompt_count = len(usable_PN)
        """Prompts with enough rewards."""
        self.sample_count = int(usable_PN.sum(axis=1).min())
        """Usable rewards of a prompt, of the one that has fewest."""
        rewards_PN = np.where(usable_PN, rewards[enough_P], 0.0)
        counts_P1 = usable_PN.sum(axis=1, keepdims=True)
        means_P1 = rewards_PN.sum(axis=1, keepdims=True) / counts_P1
        centred_PN = np.where(usable_PN, rewards_PN - means_P1, 0.0)
        self.mean = float(means_P1.mean())
        """Mean reward of the samples' prompts."""
        self.unit = _pooled(centred_PN, int((counts_P1 - 1).sum()))
        """Pooled deviation of the rewards from their prompt's mean; 0 if all are equal."""
        self._usable_PN = usable_PN
        self._ratios_PN = np.where(usable_PN, ratios_PN[enough_P], 0.0)
        self._known: dict[float, Point] = {}
        self._units_PN = centred_PN / self.unit if self.unit > 0 else centred_PN

    @cached_property
    def _halves(self) -> Flags:
        """Which samples form a half: twice `SPLITS` halves of every prompt, of equal size."""
        halves = []
        for split in range(SPLITS):
            order = np.random.Generator(np.random.Philox(key=split)).permutation(
                self._usable_PN.shape[1]
            )
            in_order_PN = self._usable_PN[:, order]
            places_PN = np.cumsum(in_order_PN, axis=1)
            size_P1 = in_order_PN.sum(axis=1, keepdims=True) // 2
            for first_P1 in (0 * size_P1, size_P1):
                half_PN = np.zeros_like(self._usable_PN)
                half_PN[:, order] = (
                    in_order_PN & (places_PN > first_P1) & (places_PN <= first_P1 + size_P1)
                )
                halves.append(half_PN)
        return np.stack(halves)

    def at(self, alpha: float) -> Point:
        """Where training with this alpha is expected to end.

        Raises:
            ValueError: All rewards of each prompt are equal, or alpha is not above 0.
        """
        if self.unit == 0 or not alpha > 0:
            raise ValueError("needs an alpha above 0 and rewards that differ")
        return self._at(alpha / self.unit)

    def _at(self, temperature: float) -> Point:
        """The point of an alpha in units of the rewards' deviation."""
        if temperature not in self._known:
            self._known[temperature] = self._measured(temperature)
        return self._known[temperature]

    def _measured(self, temperature: float) -> Point:
        [gain], [kl], [spread] = _tilted(
            self._units_PN, self._ratios_PN, self._usable_PN[None], temperature
        )
        gain_S, kl_S, _ = _tilted(self._units_PN, self._ratios_PN, self._halves, temperature)
        difference = float(np.abs(kl_S - kl).mean())
        is_resolved = bool(spread <= math.log(self.sample_count) - 1)
        return Point(
            alpha=temperature * self.unit,
            reward=self.mean + (2 * gain - float(gain_S.mean())) * self.unit,
            kl=2 * kl - float(kl_S.mean()),
            is_resolved=is_resolved,
            is_trusted=is_resolved and difference <= MOST_DIFFERENCE * abs(kl),
        )

    def _resolved(self) -> Iterator[tuple[float, Point]]:
        """Points of `GRID` from the largest alpha down to the last one that is resolved."""
        for temperature in GRID:
            point = self._at(temperature)
            if not point.is_resolved:
                return
            yield temperature, point

    def choose(self, budget: float) -> Choice | None:
        """The alpha at which training is expected to end with this KL.

        Args:
            budget: KL in nats per completion, above 0.

        Returns:
            That alpha; where no alpha that the samples resolve has a KL as large, the one that
            comes close to the largest; None where they resolve none, or the rewards do not differ.
        """
        if self.unit == 0:
            return None
        found: list[tuple[float, Point]] = []
        for temperature, point in self._resolved():
            if point.kl >= budget and not found:
                return None  # the log-ratios are not those of the samples
            if point.kl >= budget:
                solved = self._solved(budget, found[-1][0], temperature)
                return (
                    Choice(solved, "reached")
                    if solved.is_trusted
                    else self._doubtful(solved, budget)
                )
            found.append((temperature, point))
        if not found:
            return None
        largest = max(point.kl for _, point in found)
        enough = next(point for _, point in found if point.kl >= SATURATION * largest)
        is_known = len(found) == len(GRID) and found[-1][1].is_trusted
        return Choice(enough, "saturated") if is_known else self._doubtful(enough, budget)

    def _doubtful(self, point: Point, budget: float) -> Choice:
        """An untrusted choice: this point, or that of the deviation alone if its alpha is larger.

        Few samples overestimate how small alpha must be, most of all for normally distributed
        rewards, where s / sqrt(2 budget) is exact.
        """
        normal = 1 / math.sqrt(2 * budget)
        return Choice(self._at(normal) if normal * self.unit > point.alpha else point, "untrusted")

    def _solved(self, budget: float, above: float, below: float) -> Point:
        """The point with this KL between two temperatures, with less KL above and more below."""
        for _ in range(HALVINGS):
            middle = math.sqrt(above * below)
            if self._at(middle).kl >= budget:
                below = middle
            else:
                above = middle
        return self._at(below)

    def points(self, budgets: Sequence[float]) -> list[Point]:
        """The points with these KLs, as far as the estimate is trusted."""
        chosen = [self.choose(budget) for budget in budgets]
        return [one.point for one in chosen if one is not None and one.ending == "reached"]


def _pooled(centred_PN: Values, degrees: int) -> float:
    """Pooled deviation; first divided by a power of two, so that no square leaves float64."""
    largest = float(np.abs(centred_PN).max(initial=0.0))
    if largest == 0 or degrees == 0:
        return 0.0
    exponent = math.frexp(largest)[1]
    scaled_PN = np.ldexp(centred_PN, -exponent)
    return math.ldexp(math.sqrt(float(np.square(scaled_PN).sum()) / degrees), exponent)


def pooled_deviation(rewards: Values) -> float:
    """Pooled deviation of the rewards ``[P, N]`` of prompts from their means; NaN: no reward."""
    usable_PN = np.isfinite(rewards)
    counts_P1 = usable_PN.sum(axis=1, keepdims=True)
    rewards_PN = np.where(usable_PN, rewards, 0.0)
    means_P1 = rewards_PN.sum(axis=1, keepdims=True) / np.maximum(counts_P1, 1)
    centred_PN = np.where(usable_PN, rewards_PN - means_P1, 0.0)
    return _pooled(centred_PN, int(np.maximum(counts_P1 - 1, 0).sum()))


def _tilted(
    units_PN: Values, ratios_PN: Values, masks_SPN: Flags, temperature: float
) -> tuple[Values, Values, Values]:
    """Gain in reward, KL to the reference and KL to the sampling distribution, ``[S]`` each.

    Args:
        units_PN: Rewards less their prompt's mean, in units of their deviation.
        ratios_PN: log pi_ref - log mu.
        masks_SPN: Which samples count; the results are means over the prompts.
        temperature: alpha in the same units.
    """
    tilts_PN = units_PN / temperature
    logs_SPN = np.where(masks_SPN, ratios_PN + tilts_PN, -np.inf)
    largest_SP1 = logs_SPN.max(axis=2, keepdims=True)
    weights_SPN = np.exp(logs_SPN - largest_SP1)
    sums_SP1 = weights_SPN.sum(axis=2, keepdims=True)
    shares_SPN = weights_SPN / sums_SP1
    counts_SP = masks_SPN.sum(axis=2)
    log_mean_SP = (largest_SP1 + np.log(sums_SP1))[..., 0] - np.log(counts_SP)
    kl_SP = (shares_SPN * tilts_PN).sum(axis=2) - log_mean_SP
    spread_SP = (shares_SPN * (ratios_PN + tilts_PN)).sum(axis=2) - log_mean_SP
    gain_SP = (shares_SPN * units_PN).sum(axis=2)
    return gain_SP.mean(axis=1), kl_SP.mean(axis=1), spread_SP.mean(axis=1)
