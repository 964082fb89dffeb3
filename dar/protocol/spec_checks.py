"""Spec checks that need no data. They run at submission only, not for jobs accepted earlier."""

import math
from collections.abc import Iterator

from dar.errors import Problem
from dar.protocol.budget_checks import component_conflict, option_conflicts, temperature_conflict
from dar.protocol.presets import ONLINE_ONLY, PRESETS
from dar.protocol.spec import Hyperparameters, JobSpec, Sampling, total_steps
from dar.protocol.target_patterns import SHOWN_PATTERN, problem_of

SHARDING = ("fsdp", "zero2", "zero3")
NOTHING_TO_COMPARE = (
    "one completion of one prompt has nothing to be compared with, so every advantage would be 0"
)
ONE_STEP = (
    "warmup_steps is {}, but {} has one step, and the first step of a warm-up has learning rate 0, "
    "so nothing would be trained; set warmup_steps to 0, or train for more steps"
)
"""Its values: the warm-up, and what has one step."""
RATE_PRODUCT = (
    "learning_rate {:g} times learning_rate_multiplier {:g} is {:g}; send numbers whose product is "
    "finite and above 0"
)
"""Its values: the two, and their product."""
NO_TARGET = (
    "target_modules names no module, or has an empty name, so there would be nothing to train; send "
    "'all-linear', a regular expression, or a list of names"
)
ONE_PROCESS = (
    "strategy {!r} shares a model among processes, but the job has one; send resources.processes "
    "of at least 2, or leave strategy at auto"
)


def problems_of(spec: JobSpec) -> list[Problem]:
    """All settings of a spec that would have no effect or cannot work, whatever the data."""
    return [
        *_of_sampling(spec),
        *_of_lengths(spec),
        *_of_groups(spec),
        *_of_rate(spec),
        *_of_budget(spec),
        *_of_targets(spec),
        *_of_resources(spec),
    ]


def length_problems(spec: JobSpec, num_rows: int | None) -> list[Problem]:
    """What is wrong with a job's number of steps.

    Args:
        spec: Spec of the job.
        num_rows: Rows of its training file; None: not known, so ``max_steps`` is given.
    """
    hyper = spec.dar.hyperparameters
    steps = total_steps(hyper, num_rows or 0, spec.dar.resources.processes)
    if steps != 1 or not hyper.warmup_steps:
        return []
    return [
        Problem(
            ONE_STEP.format(hyper.warmup_steps, "the job"),
            "method.dar.hyperparameters.warmup_steps",
            "no_learning_rate",
        )
    ]


def _of_rate(spec: JobSpec) -> Iterator[Problem]:
    hyper = spec.dar.hyperparameters
    given, multiplier = hyper.learning_rate, hyper.learning_rate_multiplier
    if given is not None and not 0 < given * multiplier < math.inf:
        yield Problem(
            RATE_PRODUCT.format(given, multiplier, given * multiplier),
            "method.dar.hyperparameters.learning_rate_multiplier",
            "no_learning_rate",
        )


def _of_sampling(spec: JobSpec) -> Iterator[Problem]:
    """Without rewards, completions are read from a file, and options of sampling have no effect."""
    if spec.dar.rewards is not None:
        return
    preset = PRESETS[spec.dar.preset]
    parts = (
        ("hyperparameters", spec.dar.hyperparameters, Hyperparameters(**preset.hyperparameters)),
        ("sampling", spec.dar.sampling, Sampling(**preset.sampling)),
    )
    for part, sent, usual in parts:
        for name in type(sent).model_fields:
            if name in ONLINE_ONLY and getattr(sent, name) != getattr(usual, name):
                yield Problem(
                    f"{name} has no effect without rewards, because the completions are read from "
                    "the training file; leave it out, or send rewards",
                    f"method.dar.{part}.{name}",
                    "online_only",
                )


def _of_lengths(spec: JobSpec) -> Iterator[Problem]:
    sampling = spec.dar.sampling
    if spec.dar.rewards is None or sampling.max_length is None:
        return
    if not leaves_room(sampling, sampling.max_length):
        yield Problem(
            f"a prompt and {sampling.max_new_tokens} new tokens do not fit into max_length, which "
            f"is {sampling.max_length}; lower max_new_tokens, or raise max_length",
            "method.dar.sampling.max_new_tokens",
            "max_length_exceeded",
        )


def leaves_room(sampling: Sampling, longest: int) -> bool:
    """Whether a sequence of ``longest`` tokens has room for a prompt beside the completion.

    With a ``max_prompt_length`` below that, a completion gets what its prompt leaves.
    """
    bound = sampling.max_prompt_length
    return (bound is not None and bound < longest) or sampling.max_new_tokens < longest


def _of_targets(spec: JobSpec) -> Iterator[Problem]:
    """An adapter for no module, or a pattern that is none or whose matching might never end."""
    peft = spec.dar.peft
    if peft is None:
        return
    targets = peft.target_modules
    names = [targets] if isinstance(targets, str) else targets
    if not names or not all(name.strip() for name in names):
        yield Problem(NO_TARGET, "method.dar.peft.target_modules", "no_target")
        return
    if not isinstance(peft.target_modules, str):
        return
    if why := problem_of(peft.target_modules):
        yield Problem(
            f"target_modules {peft.target_modules[:SHOWN_PATTERN]!r} is no pattern of modules: {why}; "
            "send 'all-linear', a regular expression, or a list of names",
            "method.dar.peft.target_modules",
            "invalid_pattern",
        )


def _of_groups(spec: JobSpec) -> Iterator[Problem]:
    hyper = spec.dar.hyperparameters
    if spec.dar.rewards is not None and hyper.dar_k == 1 and hyper.batch_size == 1:
        yield Problem(
            f"{NOTHING_TO_COMPARE}; send a dar_k or a batch_size of at least 2",
            "method.dar.hyperparameters.dar_k",
            "nothing_to_compare",
        )


def _of_budget(spec: JobSpec) -> Iterator[Problem]:
    """Options, a temperature or normalised components that ``kl_budget`` does not allow."""
    hyper, rewards = spec.dar.hyperparameters, spec.dar.rewards
    if hyper.kl_budget is None:
        return
    sent = hyper.model_fields_set - PRESETS[spec.dar.preset].hyperparameters.keys()
    for name, why in option_conflicts(dict(hyper), sent):
        yield Problem(why, f"method.dar.hyperparameters.{name}", "kl_budget_conflict")
    if rewards is None:
        return
    if cold := temperature_conflict(spec.dar.sampling.temperature):
        yield Problem(cold, "method.dar.sampling.temperature", "kl_budget_conflict")
    for index, component in enumerate(rewards.components):
        if unusable := component_conflict(component.name, component.normalize):
            place = f"method.dar.rewards.components.{index}.normalize"
            yield Problem(unusable, place, "kl_budget_conflict")


def _of_resources(spec: JobSpec) -> Iterator[Problem]:
    resources = spec.dar.resources
    if resources.strategy not in SHARDING:
        return
    if resources.processes == 1:
        yield Problem(
            ONE_PROCESS.format(resources.strategy),
            "method.dar.resources.strategy",
            "one_process",
        )
    if resources.strategy.startswith("zero") and spec.dar.hyperparameters.optim == "adafactor":
        yield Problem(
            f"strategy {resources.strategy!r} updates slices of the weights, which "
            f"{spec.dar.hyperparameters.optim} cannot; send optim adamw, or another strategy",
            "method.dar.hyperparameters.optim",
            "optimizer_not_sharded",
        )
