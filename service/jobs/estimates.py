"""What a job would take: completions, requests to reward services and time."""

from typing import Any

from dar.protocol.job_validation import JobEstimate
from dar.protocol.reward_spec import RewardComponent
from dar.protocol.spec import DARSpec, JobSpec, StepPlan, total_steps
from service.store.pace import KnownPace

NO_PACE = (
    "no earlier job of this project has trained this model, so its speed is not known; submit a job "
    "with few steps to find out"
)


def of_job(
    spec: JobSpec, num_rows: int | None, validation_rows: int | None, known: KnownPace | None
) -> JobEstimate:
    """The estimate of a job.

    Args:
        spec: Its spec.
        num_rows: Rows of its training file; None: they are on a hub.
        validation_rows: Rows of its validation file; None: it has none.
        known: How fast an earlier job with its model was; None: there is none.
    """
    dar = spec.dar
    steps = total_steps(dar.hyperparameters, num_rows or 0, dar.resources.processes)
    prompts = _prompts(dar, num_rows, steps)
    completions = 0 if dar.rewards is None else prompts * dar.hyperparameters.dar_k
    seconds, message = _seconds(dar, steps, known)
    calls = None
    if dar.rewards is not None:
        calls = reward_calls(dar, steps, prompts)
        calls += reward_calls(dar, *_evaluated(dar, steps, validation_rows))
    return JobEstimate(
        total_steps=steps,
        completions=completions,
        most_completion_tokens=completions * dar.sampling.max_new_tokens,
        reward_calls=calls,
        seconds=seconds,
        message=message,
    )


def _prompts(dar: DARSpec, num_rows: int | None, steps: int) -> int:
    """Prompts of all steps."""
    hyper = dar.hyperparameters
    epochs = None if hyper.max_steps is not None else hyper.n_epochs or 1.0
    if epochs is None:
        return steps * hyper.batch_size
    plan = StepPlan.of(num_rows or 0, hyper.batch_size, epochs, chunk=dar.resources.processes)
    return plan.end(steps)


def _evaluated(dar: DARSpec, steps: int, rows: int | None) -> tuple[int, int]:
    """Number of evaluations, and the prompts of all of them: before the first step, and then."""
    if dar.evaluation is None or rows is None:
        return 0, 0
    times = 1 + -(-steps // dar.evaluation.every_steps)
    return times, times * min(rows, dar.evaluation.max_prompts or rows)


def reward_calls(dar: DARSpec, batches: int, prompts: int) -> int:
    """Requests for the completions of so many prompts, which come in so many batches.

    A request has whole prompts, unless the completions of one are too many for it.
    """
    if dar.rewards is None or not batches:
        return 0
    completions = dar.hyperparameters.dar_k
    services = [one for one in dar.rewards.components if one.kind == "http"]
    return sum(_calls_of(one, batches, prompts, completions) for one in services)


def _calls_of(component: RewardComponent, batches: int, prompts: int, completions: int) -> int:
    most = component.batch.max_samples
    if completions > most:
        return prompts * -(-completions // most)
    in_batch = -(-prompts // batches)
    return batches * -(-in_batch // (most // completions))


def _seconds(dar: DARSpec, steps: int, known: KnownPace | None) -> tuple[float | None, str]:
    """Running time by that of an earlier job, in proportion to the tokens of a step."""
    if known is None:
        return None, NO_PACE
    hyper = dar.hyperparameters
    own = hyper.batch_size * hyper.dar_k * dar.sampling.max_new_tokens
    share = own / _most_tokens(known.spec)
    how = (
        f"by the steps of job {known.job_id} with the same model, which took {known.seconds:.3g} s"
    )
    return steps * known.seconds * share, how


def _most_tokens(spec: dict[str, Any]) -> int:
    parsed = DARSpec.model_validate(spec)
    hyper = parsed.hyperparameters
    return hyper.batch_size * hyper.dar_k * parsed.sampling.max_new_tokens
