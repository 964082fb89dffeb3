"""The output of the demo, all on stderr: progress bars, a line for each finished part, samples."""

import contextlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dar.protocol.jobs import Job
from dar.settings import Settings


@dataclass(frozen=True, slots=True)
class Scores:
    """Fresh samples of one model, with their rewards."""

    completions: list[list[str]]
    rewards: list[float]

    @property
    def mean(self) -> float:
        """Mean reward."""
        return sum(self.rewards) / len(self.rewards)


class DemoScreen:
    """Prints on stderr: a progress bar for each long part, and a line for each finished one."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)

    def introduce(self, text: str) -> None:
        self.console.print(f"{text}\n", soft_wrap=True)

    def note(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False)

    def done(self, what: str, detail: str) -> None:
        """Print that a part is finished."""
        self.console.print(f"[green]✓[/green] [bold]{what:<15}[/bold] {detail}", soft_wrap=True)

    @contextlib.contextmanager
    def bar(self, what: str, total: int) -> Iterator["Bar"]:
        """A progress bar; without a terminal, a line after each quarter."""
        with Progress(
            TextColumn(f"  [bold]{what:<15}[/bold]"),
            BarColumn(bar_width=32),
            TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[note]}"),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        ) as progress:
            yield Bar(self, what, total, progress)


class Bar:
    """One running progress bar."""

    def __init__(self, screen: DemoScreen, what: str, total: int, progress: Progress) -> None:
        self._screen, self._what, self._total, self._progress = screen, what, total, progress
        self._task = progress.add_task(what, total=total, note="")
        self._next_line = 0

    def at(self, completed: int, note: str) -> None:
        self._progress.update(self._task, completed=completed, note=note)
        if not self._screen.console.is_terminal and completed >= self._next_line:
            self._screen.console.print(f"  {self._what:<15} {completed}/{self._total}  {note}")
            self._next_line = completed + max(1, self._total // 4)


def show_samples(screen: DemoScreen, prompts: Sequence[str], before: Scores, after: Scores) -> None:
    """Print a table of completions of the base model and of the trained one."""
    table = Table(title="The same prompts and seed, before and after", title_justify="left")
    for title in ("prompt", f"before: mean reward {before.mean:+.2f}", f"after: {after.mean:+.2f}"):
        table.add_column(title, overflow="fold")
    for row in range(0, len(prompts), max(1, len(prompts) // 6)):
        table.add_row(
            prompts[row], before.completions[row][0].strip(), after.completions[row][0].strip()
        )
    screen.console.print(table)


def show_next(screen: DemoScreen, settings: Settings, job: Job, weights: Path) -> None:
    """Print how to inspect the job."""
    key = settings.home / "api_key"
    url = settings.service_url
    # `make demo` runs the command of a virtual environment that is not on the PATH.
    dar = "dar" if shutil.which("dar") else sys.argv[0]
    home = f" --home {settings.home}" if "home" in settings.model_fields_set else ""
    screen.console.print(
        f"""
The weights are in {weights}
Everything is stopped now. To look at the job again:

  {dar} up{home}
  curl -H "Authorization: Bearer $(cat {key})" {url}/v1/fine_tuning/jobs/{job.id}
  curl -H "Authorization: Bearer $(cat {key})" {url}/v1/fine_tuning/jobs/{job.id}/metrics
  curl -H "Authorization: Bearer $(cat {key})" '{url}/v1/fine_tuning/jobs/{job.id}/samples?limit=3'

Your own reward is a function and a URL: see the README.""",
        soft_wrap=True,
        markup=False,
    )
