"""The output of ``dar train --dry_run``.

A dry run loads everything, samples and scores two prompts, and writes nothing.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from dar.errors import RewardContractError
from dar.training.config.config import DARConfig
from dar.training.report.console import samples_table, show_facts, size
from dar.training.step.degenerate import DegenerateWatch
from dar.training.step.learning import LearningWatch
from dar.training.step.metrics import sample_rows
from dar.training.step.records import ScoredStep
from dar.training.trainer import DARTrainer

PREVIEWED_PROMPTS = 2


def show_preview(
    trainer: DARTrainer, step: ScoredStep, console: Console, given: Mapping[str, Any]
) -> None:
    """Show the completions of the first prompts, and the facts of a run.

    Args:
        trainer: The trainer of the run.
        step: Its preview.
        console: Target of the output.
        given: Arguments as the user gave them; the trainer's own are changed to write nothing.

    Raises:
        RewardContractError: A completion got no reward.
    """
    console.print("[bold]Completions of the first prompts[/bold]")
    console.print(samples_table(sample_rows(step)))
    show_facts(console, "What a run would do (nothing was written)", _facts(trainer, given))
    for message in _warnings(trainer, step):
        console.print(f"warn: {message}", markup=False, soft_wrap=True)
    failed = [reward for reward in step.rewards if reward.status == "error"]
    if failed:
        raise RewardContractError(
            f"{len(failed)} of the {_sampled(step)} got no reward: {failed[0].message}"
        )
    if step.rewards and all(reward.status == "skip" for reward in step.rewards):
        raise RewardContractError(
            f"every reward of the {_sampled(step)} was skipped, so a run would train nothing: "
            f"{step.rewards[0].message}"
        )


def _warnings(trainer: DARTrainer, step: ScoredStep) -> Iterator[str]:
    config = trainer.args
    if trainer.hub.reward_names and (why := config.convergence_problem):
        yield why
    assert config.learning_rate is not None  # the trainer has chosen one
    watches: list[DegenerateWatch | LearningWatch] = [DegenerateWatch(config)]
    if config.kl_budget is None:  # else alpha and beta are not chosen yet
        watches.append(LearningWatch(config))
    for watch in watches:
        found = watch.add(step, last_step=step.number, learning_rate=config.learning_rate)
        yield from (message for message, _ in found)


def _sampled(step: ScoredStep) -> str:
    return f"{len(step.rewards)} completions of the first {len(step.prompts)} prompts"


def _facts(trainer: DARTrainer, given: Mapping[str, Any]) -> dict[str, str]:
    config, memory, rows = trainer.args, trainer.memory(), len(trainer.train_dataset)
    plan = config.step_plan(rows, is_replay=not trainer.hub.reward_names)
    prompts = plan.per_step
    output = str(given["output_dir"])
    facts = {
        "steps": f"{config.max_steps}: {plan.end(config.max_steps) / rows:.3g} passes over "
        f"{rows:,} rows",
        "memory": " + ".join(f"{size(count)} {name}" for name, count in memory.items())
        + f" = {size(sum(memory.values()))}, and activations",
        "learns at": _learning_rate(config),
        "writes to": output + (", checkpoints too" if config.save_strategy != "no" else ""),
    }
    if trainer.hub.reward_names:
        completions = prompts * config.dar_k
        facts |= {
            "each step": f"{prompts} prompts x {config.dar_k} completions = {completions} "
            f"completions, at most {completions * config.max_new_tokens:,} new tokens",
            "rewards": ", ".join(trainer.hub.reward_names),
        }
    else:
        facts |= {"each step": f"{prompts} prompts with the completions and rewards of the data"}
    if config.kl_budget is not None:
        samples = (
            f"at most {trainer.calibration.allowed:,} completions before the first step"
            if trainer.hub.reward_names
            else "rewards of the data"
        )
        facts["goes to"] = (
            f"a KL of {config.kl_budget:g} to the base model (kl_budget); alpha and beta are "
            f"chosen from {samples}"
        )
    if given.get("push_to_hub"):
        facts["pushes to"] = str(given.get("hub_model_id") or Path(output).absolute().name)
    order = (
        "steps",
        "each step",
        "learns at",
        "goes to",
        "rewards",
        "memory",
        "writes to",
        "pushes to",
    )
    return {label: facts[label] for label in order if label in facts}


def _learning_rate(config: DARConfig) -> str:
    how = "" if config.chosen_rate is None else f", chosen for {config.chosen_rate.subject}"
    return f"a peak learning rate of {config.learning_rate:g}{how}"
