"""The learning rate of a run that gives none: by the size of its model, and what of it is trained.

A learning rate that moves a small model is too large for a large one, and an adapter needs a larger
one than full weights. All numbers are in `RATE_RULES`. Decision 15 (docs/decisions) has the
experiments behind them, and says which sizes were never tried.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
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

    def rate(self, weights: int) -> float:
        """The learning rate of a model of this size, to two digits."""
        raw = self.at_a_million * (max(1, weights) / 1e6) ** self.exponent
        return float(f"{min(self.most, max(self.least, raw)):.1e}")


RATE_RULES: Mapping[Trained, RateRule] = {
    "full": RateRule(at_a_million=4e-4, exponent=-0.6, least=5e-7, most=1e-3),
    "adapter": RateRule(at_a_million=3.5e-3, exponent=-0.4, least=2e-5, most=3e-3),
}


@dataclass(frozen=True, slots=True)
class ChosenRate:
    """The learning rate that was chosen for a run, and what it was chosen by."""

    value: float
    """The peak learning rate, with the multiplier."""
    trained: Trained
    weights: int
    """Of the model; those of an adapter do not count."""
    trained_weights: int
    multiplier: float

    @property
    def subject(self) -> str:
        """What it was chosen for, in words."""
        total = _count(self.weights)
        factor = f", times the multiplier {self.multiplier:g}" if self.multiplier != 1 else ""
        if self.trained == "adapter":
            return f"an adapter of {_count(self.trained_weights)} weights on a model of {total}{factor}"
        if self.trained_weights == self.weights:
            return f"the full weights of a model of {total}{factor}"
        return f"{_count(self.trained_weights)} of the {total} weights of a model{factor}"

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
        }


class RateArguments(Protocol):
    """Arguments of `dar.DARConfig` that decide the learning rate."""

    learning_rate: float | None
    learning_rate_multiplier: float
    chosen_rate: ChosenRate | None
    optim: OptimizerNames | str


def settle_learning_rate(
    config: RateArguments, *, weights: int, trained_weights: int, is_adapter: bool
) -> None:
    """Choose the learning rate of ``config`` if it has none, and multiply it, in place.

    Args:
        config: Gets ``learning_rate``, and in ``chosen_rate`` how it was chosen.
        weights: How many the model has, without an adapter.
        trained_weights: How many are trained.
        is_adapter: Whether these are those of an adapter.

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
        trained: Trained = "adapter" if is_adapter else "full"
        given = RATE_RULES[trained].rate(weights)
        value = given * multiplier
        config.chosen_rate = ChosenRate(value, trained, weights, trained_weights, multiplier)
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
