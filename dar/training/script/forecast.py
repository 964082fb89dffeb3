"""The output of ``dar forecast``: the frontier of reward against KL, before anything is trained."""

from rich.console import Console
from rich.table import Table

from dar.errors import RewardContractError
from dar.protocol.budget_checks import RATIO
from dar.training.calibration.calibration import SHOWN_BUDGETS, Samples
from dar.training.calibration.frontier import LEAST_SAMPLES

TITLE = "Where training is expected to end, by kl_budget"


def show_forecast(samples: Samples, console: Console, gain: float) -> None:
    """Show reward and alpha for each KL that the samples can show.

    Args:
        samples: Of the base model.
        console: Target of the output.
        gain: Growth of an advantage with its reward, as alpha is in units of advantages.

    Raises:
        RewardContractError: The rewards are too few, or all equal.
    """
    frontier = samples.frontier()
    if frontier is None:
        raise RewardContractError(
            f"a forecast needs at least {LEAST_SAMPLES} rewards of each of a few prompts, and "
            f"{samples.completions} completions did not give them; offline, rows need "
            "behavior_logps and as many completions"
        )
    if frontier.unit == 0:
        raise RewardContractError(
            f"the rewards of {samples.completions} completions are equal for every prompt, so "
            "nothing distinguishes them; look at what the reward depends on"
        )
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name in ("KL (nats)", "mean reward", "alpha", "beta"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("0", f"{frontier.mean:.4g}", "", "")
    for point in frontier.points(SHOWN_BUDGETS):
        alpha = gain * point.alpha
        values = (f"{one:.4g}" for one in (point.reward, alpha, RATIO * alpha))
        table.add_row(f"{point.kl:.2f}", *values)
    console.print(f"[bold]{TITLE}[/bold]")
    console.print(table)
    largest = max((point.kl for point in frontier.points(SHOWN_BUDGETS)), default=0.0)
    console.print(
        f"From {samples.completions:,} completions of {len(samples.rewards)} prompts. "
        + (
            f"More than {largest:.2f} nats: not known, as these samples are too few or no alpha "
            "leads there."
            if largest < SHOWN_BUDGETS[-1]
            else ""
        ),
        soft_wrap=True,
        markup=False,
    )
