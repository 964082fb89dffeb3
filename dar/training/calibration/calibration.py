"""`Calibration`: chooses alpha and beta for ``kl_budget``, before the first step.

The base model is sampled on some prompts of the training data, and the rewards of these completions
say at which alpha training ends at the wanted KL: see `Frontier`. There are 16 prompts and 16
completions of each, or a sixteenth of the run's completions. Their number is doubled until the
estimate is trusted, or a quarter of the run's completions is spent, or 4096. Offline, rows of the
data set take the place of samples.

If there are too few rewards for an estimate, alpha is their pooled deviation divided by
sqrt(2 budget): exact for normally distributed rewards, and in the rewards' own unit in any case. If
there is one that is not trusted in the end, the larger of the two is taken, with a warning.

Where the base model's samples do not suffice for the budget, there is one second calibration with
samples of the trained policy, which is near the distribution in question. It waits for a third of
the steps, at least 60, and until the KL is at rest. From then on alpha and beta stay.

A calibration is an evaluation in all else: services get ``mode="eval"``, and it draws from random
numbers of its own. A run that is stopped within one repeats it with the same numbers.
"""

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dar.protocol.budget_checks import RATIO
from dar.protocol.jobs import Forecast, ForecastPoint
from dar.training.calibration.frontier import (
    LEAST_SAMPLES,
    Frontier,
    Values,
    pooled_deviation,
)
from dar.training.config.config import DARConfig
from dar.training.data.rows import Rows
from dar.training.evaluation import undisturbed
from dar.training.run_context import RunContext
from dar.training.sampling.prompts import PromptOrder
from dar.training.step.records import ScoredStep, StepSource, group_rows

PROMPTS = 16
"""Most prompts that are sampled."""
LEAST_PROMPTS = 4
"""With fewer, unless the data have fewer, no frontier is estimated."""
SAMPLES = 16
"""Completions of a prompt in the first round; more where there are fewer prompts."""
FEW_SAMPLES = 4
"""The same where the run is too short for a frontier: only a deviation is measured."""
SHARE = 4
"""A calibration may spend one in so many of the run's completions."""
LEAST_SHARE = 4
"""The first round takes one in so many of these, if that is more: rewards are noisier than KLs."""
STORED_ROWS = 64
"""Most rows that an offline run reads."""
SEED_TAG = 0x6B6C
"""Makes the seeds of a calibration other ones than those of training."""
LEAST_STEPS = 60
"""Steps before a second calibration, which also waits for a third of the run."""
WINDOW = 20
"""Steps whose mean KL is compared with that of as many before."""
AT_REST = 0.1
"""Largest relative difference of these two means."""
MOST_COMPLETIONS = 4096
"""Most completions of a calibration, however long the run is: 256 of each prompt say where 1.5 nats
of normally distributed rewards end."""
PREVIEWED_BUDGET = 1.5
"""KL in nats up to which a preview samples, where no ``kl_budget`` is set."""
SHOWN_BUDGETS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
"""KLs of the points of a frontier that are reported."""

Phase = Literal["base", "policy"]
"""Whose samples: the base model's before the first step, or the trained policy's."""
MakeSource = Callable[[Rows, DARConfig], StepSource]
"""Makes the step source of some rows, as for an evaluation."""


@dataclass(slots=True)
class Samples:
    """Rewards of completions of several prompts."""

    rewards: Values
    """``[P, N]``; NaN: no reward."""
    log_ratios: Values
    """``[P, N]`` log pi_ref - log mu; NaN: not known."""
    completions: int = 0
    tokens: int = 0

    def joined(self, other: "Samples") -> "Samples":
        """These, and further ones of the same prompts."""
        return Samples(
            np.concatenate([self.rewards, other.rewards], axis=1),
            np.concatenate([self.log_ratios, other.log_ratios], axis=1),
            self.completions + other.completions,
            self.tokens + other.tokens,
        )

    def frontier(self) -> Frontier | None:
        """Their frontier; None where they are too few."""
        usable = np.isfinite(self.rewards) & np.isfinite(self.log_ratios)
        if (usable.sum(axis=1) >= LEAST_SAMPLES).sum() < min(LEAST_PROMPTS, len(usable)):
            return None
        return Frontier(self.rewards, self.log_ratios)


class Calibration:
    """Chooses alpha and beta of a run with ``kl_budget``; without one, it does nothing.

    All processes call its methods together.

    Args:
        run: The training run.
        source_of: Makes the step source of rows.
        opened: Keeps the rewards open.
        note: Adds metrics to those of the last step.
        is_replay: Whether rows hold their completions and rewards.
    """

    def __init__(
        self,
        run: RunContext,
        *,
        source_of: MakeSource,
        opened: Callable[[], AbstractContextManager[None]],
        note: Callable[[dict[str, float]], None],
        is_replay: bool,
    ) -> None:
        self._run = run
        self._source_of = source_of
        self._opened = opened
        self._note = note
        self._is_replay = is_replay
        self._forecast: Forecast | None = None
        self._is_final = False
        """Whether alpha and beta stay as they are."""
        self._kls: list[float] = []
        """Mean KL of the last steps, while a second calibration may come."""

    @property
    def _args(self) -> DARConfig:
        return self._run.trainer.args

    def preview(self) -> Samples:
        """Rewards of the base model's completions; nothing is trained, chosen or written.

        Raises:
            RewardError: No completion could be scored.
            TrainingError: The model cannot be sampled from.
        """
        with self._run.ranks.together(), self._opened(), undisturbed(self._args.device):
            return self._stored() if self._is_replay else self._sampled(MOST_COMPLETIONS)

    def begin(self) -> None:
        """Begin a training run."""
        self._forecast, self._is_final, self._kls = None, False, []

    def begin_step(self) -> None:
        """Calibrate if it is due before the next step.

        Raises:
            StopRequestedError: A stop was requested meanwhile.
            RewardError: No completion could be scored.
            TrainingError: A probability of the policy is not finite.
        """
        if self._args.kl_budget is None:
            return
        if self._forecast is None:
            self._calibrate("base")
        elif not self._is_final and self._is_at_rest():
            self._calibrate("policy")

    def end_step(self, step: ScoredStep) -> None:
        """Note the KL of a trained step, and its distance from the frontier."""
        rows = step.valid_rows
        if self._forecast is None or step.ref_logps_B is None or not rows:
            return
        kl = (step.behavior_logps_B[rows] - step.ref_logps_B[rows]).mean().item()
        rewards = [one.reward for one in step.rewards if one.reward is not None]
        least = least_kl(self._forecast, sum(rewards) / len(rewards))
        if least is not None:
            self._note({"dar/kl_excess": kl - least})
        if not self._is_final:
            self._kls = [*self._kls, kl][-2 * WINDOW :]

    def _is_at_rest(self) -> bool:
        least = max(LEAST_STEPS, math.ceil(self._args.max_steps / 3))
        if self._run.trainer.state.global_step < least or len(self._kls) < 2 * WINDOW:
            return False
        before, now = np.mean(self._kls[:WINDOW]), np.mean(self._kls[WINDOW:])
        return bool(abs(now - before) < AT_REST * abs(now))

    # --- choosing ------------------------------------------------------------------------------

    def _calibrate(self, phase: Phase) -> None:
        if phase == "base":
            self._run.sink.event(
                "info",
                f"kl_budget {self._args.kl_budget:g}: alpha and beta are chosen from "
                + ("rows of the data set" if self._is_replay else "samples of the base model"),
                {"kind": "calibration_start", "kl_budget": self._args.kl_budget},
            )
        with undisturbed(self._args.device):
            samples = self._stored() if self._is_replay else self._sampled(self.allowed)
        frontier = samples.frontier()
        choice = None if frontier is None else frontier.choose(self._budget)
        if phase == "policy" and choice is None:
            self._keep(samples)
            return
        deviation = pooled_deviation(samples.rewards) if frontier is None else frontier.unit
        start = None if frontier is None else frontier.mean
        if phase == "policy" and self._forecast is not None:
            start = self._forecast.start_reward  # the base model's
        if choice is not None:
            self._set(choice.point.alpha * self.gain)
        elif deviation > 0:
            self._set(deviation / math.sqrt(2 * self._budget) * self.gain)
        self._forecast = forecast = Forecast(
            step=int(self._run.trainer.state.global_step),
            phase=phase,
            method="deviation" if choice is None else "frontier",
            ending="untrusted" if choice is None else choice.ending,
            kl_budget=self._budget,
            alpha=self._args.alpha,
            beta=self._args.beta,
            reward_std=deviation,
            prompts=len(samples.rewards),
            completions=samples.completions,
            tokens=samples.tokens,
            **self._spent(samples),
            samples_per_prompt=None if frontier is None else frontier.sample_count,
            start_reward=start,
            reward=None if choice is None else choice.point.reward,
            kl=None if choice is None else choice.point.kl,
            frontier=[] if frontier is None else _shown(frontier, self.gain),
        )
        self._is_final = phase == "policy" or self._is_replay or forecast.ending != "untrusted"
        self._run.sink.event(
            "warn" if forecast.ending == "untrusted" else "info",
            "; ".join([*_in_words(forecast), *self._outlook()]),
            {"kind": "calibration", **forecast.model_dump(mode="json")},
        )

    def _keep(self, samples: Samples) -> None:
        """Keep alpha and beta for good: the trained policy's samples do not suffice either."""
        assert self._forecast is not None
        self._is_final = True
        self._forecast = forecast = self._forecast.model_copy(update=self._spent(samples))
        self._run.sink.event(
            "warn",
            f"kl_budget {forecast.kl_budget:g}: alpha stays {forecast.alpha:.4g} and beta "
            f"{forecast.beta:.4g}, because {samples.completions:,} completions of the trained policy "
            "are too few to choose better ones",
            {"kind": "calibration", **forecast.model_dump(mode="json")},
        )

    def _spent(self, samples: Samples) -> dict[str, int]:
        """Completions and tokens sampled for calibrations, those of the last one included."""
        before = self._forecast
        is_sampled = not self._is_replay
        return {
            "spent_completions": (before.spent_completions if before else 0)
            + is_sampled * samples.completions,
            "spent_tokens": (before.spent_tokens if before else 0) + is_sampled * samples.tokens,
        }

    def _outlook(self) -> list[str]:
        """Whether alpha and beta will be chosen once more."""
        if self._is_final:
            return []
        least = max(LEAST_STEPS, math.ceil(self._args.max_steps / 3))
        if least >= self._args.max_steps:
            return [f"the run is too short to choose again: that needs more than {least} steps"]
        return [f"they are chosen once more after step {least}, when the KL is at rest"]

    @property
    def _budget(self) -> float:
        return self._args.kl_budget or PREVIEWED_BUDGET

    @property
    def gain(self) -> float:
        """Growth of an advantage with its reward: 1 - 1/K if the mean includes the completion."""
        if self._args.baseline == "leave_one_out":
            return 1.0
        compared = self._args.dar_k if self._args.dar_k > 1 else self._args.prompts_per_step
        return 1 - 1 / compared

    def _set(self, alpha: float) -> None:
        # the weigher reads them for every step
        self._args.alpha, self._args.beta = alpha, RATIO * alpha

    # --- samples -------------------------------------------------------------------------------

    def _seeded(self, number: int, **values: object) -> DARConfig:
        """A copy of the arguments with a seed of its own, and further changes."""
        config = copy.copy(self._args)
        steps_done = int(self._run.trainer.state.global_step)
        sequence = np.random.SeedSequence([self._args.seed, SEED_TAG, steps_done, number])
        config.seed = int(sequence.generate_state(1)[0])
        for name, value in values.items():
            setattr(config, name, value)
        return config

    def _rows(self, count: int) -> list[Any]:
        rows = self._run.trainer.train_dataset
        order = PromptOrder(len(rows), self._seeded(0).seed)
        return [rows[order.row(position)] for position in range(min(count, len(rows)))]

    @property
    def allowed(self) -> int:
        """Completions that a calibration may sample."""
        args = self._args
        whole = args.max_steps * args.prompts_per_step * args.dar_k
        return max(FEW_SAMPLES, min(whole // SHARE, MOST_COMPLETIONS))

    def _sampled(self, allowed: int) -> Samples:
        """Sample until the estimate is trusted or so many completions are sampled."""
        row_count = len(self._run.trainer.train_dataset)
        prompts = min(PROMPTS, row_count, allowed // SAMPLES)
        if prompts < min(LEAST_PROMPTS, row_count):
            prompts = min(PROMPTS, row_count, max(1, allowed // FEW_SAMPLES))
            return self._round(self._rows(prompts), FEW_SAMPLES, number=1)
        rows = self._rows(prompts)
        first = min(max(PROMPTS * SAMPLES, allowed // LEAST_SHARE), allowed)
        count = first // (prompts * SAMPLES) * SAMPLES
        samples = self._round(rows, count, number=1)
        while 2 * samples.completions <= allowed and not self._is_enough(samples.frontier()):
            count = samples.rewards.shape[1]
            samples = samples.joined(self._round(rows, count, number=count))
        return samples

    def _round(self, rows: Rows, count: int, *, number: int) -> Samples:
        """Sample so many completions of each row, with the random numbers of this round."""
        source = self._source_of(rows, self._seeded(number, dar_k=count))
        return _samples_of(source(int(self._run.trainer.state.global_step)))

    def _is_enough(self, frontier: Frontier | None) -> bool:
        """Whether more samples would not change the choice, or there can be none."""
        if frontier is None or frontier.unit == 0:
            return True
        choice = frontier.choose(self._budget)
        return choice is not None and choice.ending != "untrusted"

    def _stored(self) -> Samples:
        """Rewards of the data set's rows."""
        config = self._seeded(0)
        source = self._source_of(self._rows(STORED_ROWS), config)
        return _samples_of(source(int(self._run.trainer.state.global_step)), is_stored=True)

    # --- resuming ------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What was chosen, and the KLs since."""
        if self._forecast is None:
            return {}
        return {
            "calibration": {
                "forecast": self._forecast.model_dump(mode="json"),
                "is_final": self._is_final,
                "kls": self._kls,
            }
        }

    def restore(self, state: dict[str, Any]) -> None:
        found = state.get("calibration")
        if found is None:
            return
        self._forecast = Forecast.model_validate(found["forecast"])
        self._is_final = found["is_final"]
        self._kls = list(found["kls"])
        self._args.alpha, self._args.beta = self._forecast.alpha, self._forecast.beta


def least_kl(forecast: Forecast, reward: float) -> float | None:
    """The KL at which a forecast's frontier has this mean reward; None where it does not."""
    start = forecast.start_reward
    if start is None:
        return None
    points = [point for point in forecast.frontier if point.reward > start]
    if not points or reward > points[-1].reward:
        return None
    rewards, kls = [start, *(p.reward for p in points)], [0.0, *(p.kl for p in points)]
    return float(np.interp(reward, rewards, kls))


def _shown(frontier: Frontier, gain: float) -> list[ForecastPoint]:
    points = frontier.points(SHOWN_BUDGETS)
    return [ForecastPoint(alpha=gain * one.alpha, reward=one.reward, kl=one.kl) for one in points]


def _in_words(forecast: Forecast) -> list[str]:
    words = [
        f"kl_budget {forecast.kl_budget:g}: alpha is {forecast.alpha:.4g} and beta "
        f"{forecast.beta:.4g}"
    ]
    if forecast.method == "frontier":
        words.append(
            f"training is expected to end at a mean reward of {forecast.reward:.4g} and "
            f"{forecast.kl:.2f} nats from the reference"
            + ("" if (start := forecast.start_reward) is None else f" (base model: {start:.4g})")
        )
    elif forecast.reward_std > 0:
        words.append(
            f"there are too few rewards for a forecast, so alpha follows from their deviation, "
            f"{forecast.reward_std:.4g}, and how far training goes is not known"
        )
    else:
        words.append("the rewards of every prompt are equal, so nothing could be chosen")
    if forecast.ending == "saturated":
        words.append("no alpha leads to as much KL as the budget allows")
    elif forecast.method == "frontier" and forecast.ending == "untrusted":
        words.append("the completions are too few to be sure of it")
    return words


def _samples_of(step: ScoredStep, *, is_stored: bool = False) -> Samples:
    """The rewards of a step, by group.

    Args:
        step: After its rewards have arrived.
        is_stored: Whether it was read from the data set: then a log-ratio is known only where the
            row holds the behavior log-probability, and has other completions of its prompt.
    """
    groups_GK = group_rows(step.counts)
    rewards_B = np.array(
        [math.nan if one.reward is None or one.is_fallback else one.reward for one in step.rewards],
        dtype=np.float64,
    )
    assert step.ref_logps_B is not None
    ratios_B = (step.ref_logps_B.double() - step.behavior_logps_B.double()).numpy()
    if is_stored:
        known = [
            one.behavior_logp is not None and len(prompt.completions) > 1
            for prompt in step.prompts
            for one in prompt.completions
        ]
        ratios_B = np.where(known, ratios_B, math.nan)
    index = groups_GK.numpy()
    is_hole = index < 0
    return Samples(
        np.where(is_hole, math.nan, rewards_B[index]),
        np.where(is_hole, math.nan, ratios_B[index]),
        completions=len(step.pairs),
        tokens=int(step.lengths.sum()),
    )
