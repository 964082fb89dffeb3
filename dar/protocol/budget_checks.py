"""`kl_budget`: its default, and what it cannot be combined with.

Job specs and `dar.DARConfig` both read this.

With ``kl_budget`` the trainer chooses alpha and beta, from the distribution to which training
converges: pi_ref exp(r / alpha). Every option here leads to another one, or to none.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

DEFAULT_BUDGET = 1.0
"""``kl_budget`` of an online run that sends neither it nor alpha nor beta, and no option that
conflicts with it; in nats."""
RATIO = 3.0
"""beta / alpha under a ``kl_budget``; a fixed ratio, so that no unit of reward is left."""
CHOSEN = ("alpha", "beta")
"""Hyperparameters that ``kl_budget`` chooses."""
NEUTRAL: Mapping[str, tuple[object, str]] = {
    "adv_norm": ("none", "divides the rewards by a deviation that changes while training"),
    "weight_norm": ("none", "changes the weights so that training ends elsewhere"),
    "log_ratio": ("sum", "weakens the pull towards the reference by a completion's length"),
    "drop_ties": (False, "leaves out prompts that the pull towards the reference acts on"),
    "behavior": ("sampled", "changes the weights by the difference to what was sampled"),
}
"""Options that must have this value, and what any other one does."""
UNUSABLE = ("running", "group")
"""Normalisations of a reward component whose unit changes while training."""
COLDEST = RATIO / (1 + RATIO)
"""At or below this sampling temperature training with this ratio does not converge."""


def has_default(values: Mapping[str, Any], given: Collection[str], temperature: float) -> bool:
    """Whether a run that samples gets `DEFAULT_BUDGET`, as far as its options decide it.

    Args:
        values: Values of all options by name.
        given: Options that the user or a preset has set.
        temperature: Of sampling.
    """
    if not {"kl_budget", *CHOSEN}.isdisjoint(given) or temperature_conflict(temperature):
        return False
    return not any(option_conflicts({**values, "kl_budget": DEFAULT_BUDGET}, ()))


def option_conflicts(
    values: Mapping[str, Any], given: Collection[str]
) -> Iterator[tuple[str, str]]:
    """Options that ``kl_budget`` cannot be combined with: the name, and why, as a sentence.

    Args:
        values: Values of all options by name.
        given: Options that the user has set.
    """
    budget = values["kl_budget"]
    for name in CHOSEN:
        if name in given:
            yield (
                name,
                f"{name} is {values[name]!r} and kl_budget is {budget!r}, but kl_budget chooses "
                "alpha and beta by itself; leave out the one or the other",
            )
    for name, (neutral, effect) in NEUTRAL.items():
        if values[name] != neutral:
            yield (
                name,
                f"{name} {values[name]!r} {effect}, so kl_budget cannot say where training ends; "
                f"leave {name} at {neutral!r}, or set alpha and beta instead of kl_budget",
            )


def temperature_conflict(temperature: float) -> str | None:
    """Why no ``kl_budget`` is possible at this sampling temperature; None: it is possible."""
    if temperature > COLDEST:
        return None
    return (
        f"temperature {temperature:g} is not above {COLDEST:g}, and kl_budget sets beta to "
        f"{RATIO:g} alpha, with which training does not converge there; raise temperature, or set "
        "alpha and beta instead of kl_budget"
    )


def component_conflict(name: str, normalize: object) -> str | None:
    """Why no ``kl_budget`` is possible with a reward component; None: it is possible."""
    if normalize not in UNUSABLE:
        return None
    return (
        f"the reward component {name} has normalize {normalize!r}, which changes its unit while "
        "training, so kl_budget cannot say where training ends; leave normalize at 'none', or set "
        "alpha and beta instead of kl_budget"
    )
