"""The learning rate of a run that gives none: by the size of its model, and what of it is trained.

A learning rate that moves a small model is too large for a large one, and an adapter needs a larger
one than full weights. All numbers are in `RATE_RULES`. Decision 15 (docs/decisions) has the
experiments behind them, and says which sizes were never tried. Under a ``kl_budget`` the length of
the run counts as well; decision 23 has the experiments.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Literal, Protocol

from transformers.training_args import OptimizerNames

from dar.errors import InvalidRequestError
from dar.protocol.spec_checks import RATE_PRODUCT

Trained = Literal["full", "adapter"]

KNOWN_OPTIMIZERS = ("adam", "adafactor")
"""Parts of the names of optimizers that the rules hold for. Their updates do not depend on the
scale of a gradient, so the learning rate is the size of a step."""


@dataclass(frozen=True, slots=True)
class RateRule:
    """A learning rate as a power of the number of weights, within two bounds."""

    at_a_million: float
    """Learning rate of a model with a million weights."""
    exponent: float
    least: float
    most: float

    def rate(self, weights: int, factor: float = 1.0) -> float:
        """The learning rate of a model of this size, times a factor, to two digits.

        The product is at most ``most``, so a factor may leave the rate of a small model as it is.
        """
        raw = self.at_a_million * (max(1, weights) / 1e6) ** self.exponent
        return float(f"{min(self.most, factor * max(self.least, raw)):.1e}")


@dataclass(frozen=True, slots=True)
class BudgetedRun:
    """What decides the learning rate of a run with a ``kl_budget``, besides its model.

    AdamW's steps have the size of the rate also where the gradient is noise. So a policy diffuses
    in directions that the reward does not see, by a KL that grows with the square of the rate and
    with the number of steps. A step of more completions has less noise.
    """

    steps: int
    completions: int
    """Of each step."""

    @property
    def factor(self) -> float:
        """What the rate is multiplied by; at most 1."""
        return min(1.0, math.sqrt(self.completions / (2 * self.steps)))


RATE_RULES: Mapping[Trained, RateRule] = {
    "full": RateRule(at_a_million=4e-4, exponent=-0.6, least=5e-7, most=1e-3),
    "adapter": RateRule(at_a_million=3.5e-3, exponent=-0.4, least=2e-5, most=3e-3),
}


@dataclass(frozen=True, slots=True)
class ChosenRate:
    """The learning rate that was chosen for a run, and what it was chosen by."""

    trained: Trained
    weights: int
    """Of the model; those of an adapter do not count."""
    trained_weights: int
    multiplier: float
    budgeted: BudgetedRun | None = None
    """The run, if it has a ``kl_budget``."""

    @property
    def value(self) -> float:
        """The peak learning rate, with the multiplier."""
        return self.unmultiplied * self.multiplier

    @property
    def unmultiplied(self) -> float:
        """The peak learning rate without the multiplier."""
        rule = RATE_RULES[self.trained]
        return rule.rate(self.weights, 1.0 if self.budgeted is None else self.budgeted.factor)

    @property
    def without_budget(self) -> float:
        """What earlier versions chose, with the multiplier."""
        return replace(self, budgeted=None).value

    @property
    def subject(self) -> str:
        """What it was chosen for, in words."""
        total = _count(self.weights)
        further = f", times the multiplier {self.multiplier:g}" if self.multiplier != 1 else ""
        if self.budgeted is not None:
            steps, completions = self.budgeted.steps, self.budgeted.completions
            further = f", for kl_budget in {steps} steps of {completions} completions{further}"
        if self.trained == "adapter":
            return f"an adapter of {_count(self.trained_weights)} weights on a model of {total}{further}"
        if self.trained_weights == self.weights:
            return f"the full weights of a model of {total}{further}"
        return f"{_count(self.trained_weights)} of the {total} weights of a model{further}"

    @property
    def message(self) -> str:
        """The choice as a sentence."""
        return (
            f"the peak learning rate is {self.value:g}, chosen for {self.subject}; give "
            "learning_rate to use another"
        )

    @property
    def facts(self) -> dict[str, object]:
        """The choice as the data of an event."""
        return {
            "kind": "learning_rate",
            "learning_rate": self.value,
            "trained": self.trained,
            "weights": self.weights,
            "trained_weights": self.trained_weights,
            "multiplier": self.multiplier,
            **({} if self.budgeted is None else asdict(self.budgeted)),
        }


class RateArguments(Protocol):
    """Arguments of `dar.DARConfig` that decide the learning rate."""

    learning_rate: float | None
    learning_rate_multiplier: float
    chosen_rate: ChosenRate | None
    optim: OptimizerNames | str
    kl_budget: float | None
    max_steps: int


def settle_learning_rate(
    config: RateArguments, *, weights: int, trained_weights: int, is_adapter: bool, completions: int
) -> None:
    """Choose the learning rate of ``config`` if it has none, and multiply it, in place.

    Args:
        config: Gets ``learning_rate``, and in ``chosen_rate`` how it was chosen.
        weights: How many the model has, without an adapter.
        trained_weights: How many are trained.
        is_adapter: Whether these are those of an adapter.
        completions: How many each step trains on.

    Raises:
        InvalidRequestError: Nothing is known about learning rates of its optimizer, or rate and
            multiplier have no product above 0.
    """
    multiplier = config.learning_rate_multiplier
    config.chosen_rate = None
    if (given := config.learning_rate) is None:
        optimizer = str(getattr(config.optim, "value", config.optim))
        if not any(part in optimizer for part in KNOWN_OPTIMIZERS):
            raise InvalidRequestError(
                "learning_rate is missing: one is chosen for AdamW and Adafactor only, and optim "
                f"is {optimizer!r}; give learning_rate",
                param="learning_rate",
            )
        budgeted = BudgetedRun(config.max_steps, completions) if config.kl_budget else None
        chosen = ChosenRate(
            "adapter" if is_adapter else "full", weights, trained_weights, multiplier, budgeted
        )
        config.chosen_rate, given = chosen, chosen.unmultiplied
    if not 0 < given * multiplier < math.inf:
        raise InvalidRequestError(
            RATE_PRODUCT.format(given, multiplier, given * multiplier),
            param="learning_rate_multiplier",
        )
    config.learning_rate = given * multiplier
    config.learning_rate_multiplier = 1.0  # it is in the rate now, also for who reuses the config


def _count(weights: int) -> str:
    """A number of weights in words, like ``135 million``."""
    for name, size in (("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if weights >= size:
            return f"{weights / size:.3g} {name}"
    return str(weights)
